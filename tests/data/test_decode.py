import io
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from dinov2.data import decode
from dinov2.data.decode import UnreadableImage, decode_channels, decode_rgb, read_channels, read_header, read_rgb


def picture(height=40, width=56, seed=0):
    """A smooth colour picture, so that lossy formats stay close to it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))


def encoded(image, format, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_deflate"}),
        ("TIFF", {"compression": "packbits"}),
    ],
)
def test_a_lossless_file_gives_back_its_pixels(format, options):
    image = picture()
    np.testing.assert_array_equal(decode_rgb(encoded(image, format, **options)), image)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 40}])
def test_a_jpeg_gives_the_pixels_that_pillow_gives(options):
    data = encoded(picture(), "JPEG", **options)
    np.testing.assert_array_equal(decode_rgb(data), np.asarray(Image.open(io.BytesIO(data))))


def test_a_jpeg_inside_a_tiff_is_close_to_the_picture():
    image = picture()
    error = np.abs(decode_rgb(encoded(image, "TIFF", compression="jpeg", quality=95)).astype(int) - image)
    assert error.mean() < 3


def test_the_content_decides_not_the_name(tmp_path):
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encoded(picture(), "PNG"))
    np.testing.assert_array_equal(read_rgb(path), picture())


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_gray_palette_and_black_and_white_become_rgb(format, mode):
    image = Image.fromarray(picture()).convert(mode)
    np.testing.assert_array_equal(decode_rgb(encoded(image, format)), np.asarray(image.convert("RGB")))


def test_a_gray_jpeg_becomes_rgb_with_equal_channels():
    image = decode_rgb(encoded(Image.fromarray(picture()).convert("L"), "JPEG"))
    assert image.shape == (40, 56, 3)
    assert (image == image[..., :1]).all()


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_composited_on_white(format):
    rgba = np.dstack([picture(), np.full((40, 56), 128, np.uint8)])
    rgba[0] = (0, 0, 0, 0)
    image = decode_rgb(encoded(rgba, format, **({"lossless": True, "exact": True} if format == "WEBP" else {})))
    assert (image[0] == 255).all()
    want = 255 + (picture()[1:].astype(float) - 255) * 128 / 255
    assert np.abs(image[1:] - want).max() <= 0.5 + 1e-6


def test_a_palette_with_a_transparent_colour_is_composited_on_white():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    np.testing.assert_array_equal(decode_rgb(encoded(image, "PNG", transparency=1)), [[[10, 20, 30], [255, 255, 255]]])


def test_an_alpha_channel_of_zeros_everywhere_is_ignored():
    rgba = np.dstack([picture(), np.zeros((40, 56), np.uint8)])
    np.testing.assert_array_equal(decode_rgb(encoded(rgba, "PNG")), picture())


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb_as_pillow_does_it(format):
    data = encoded(Image.fromarray(picture()).convert("CMYK"), format)
    np.testing.assert_array_equal(decode_rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(("largest", "bits"), [(255, 8), (256, 12), (4095, 12), (4096, 16), (65535, 16)])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_rescaled_by_the_smallest_of_8_12_and_16_bits_that_holds_it(format, largest, bits):
    values = np.linspace(0, largest, 64).astype(np.uint16).reshape(8, 8)
    image = decode_rgb(encoded(Image.fromarray(values), format))
    np.testing.assert_array_equal(image[..., 0], np.rint(values / (2**bits - 1) * 255))


def test_sixteen_bit_colour_tiff_keeps_its_colours():
    np.testing.assert_array_equal(decode_rgb(tiff(picture().astype(np.uint16) * 257, photometric="rgb")), picture())


@pytest.mark.parametrize("scale", [1 / 255, 1.0])
def test_a_float_tiff_within_0_and_1_or_0_and_255_keeps_its_brightness(scale):
    image = picture()
    image[0, 0] = 255
    np.testing.assert_array_equal(decode_rgb(tiff(image.astype(np.float32) * scale, photometric="rgb")), image)


def test_a_float_tiff_of_another_range_is_stretched_between_its_percentiles():
    values = np.linspace(-500, 1500, 10_000, dtype=np.float32).reshape(100, 100)
    values[3, 4] = np.nan
    gray = decode_rgb(tiff(values))[..., 0]
    assert (gray.min(), gray.max()) == (0, 255)
    assert abs(int(gray[50, 0]) - 127) <= 2


def test_a_planar_tiff_and_a_white_is_zero_tiff_are_understood():
    planes = picture().transpose(2, 0, 1).copy()
    np.testing.assert_array_equal(decode_rgb(tiff(planes, photometric="rgb", planarconfig="separate")), picture())
    gray = picture()[..., 0]
    np.testing.assert_array_equal(decode_rgb(tiff(gray, photometric="miniswhite"))[..., 1], 255 - gray)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decode_rgb(data), want)


def test_a_damaged_exif_block_does_not_cost_the_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(), "JPEG", exif=exif)
    start = data.index(b"Exif\0\0") + 6
    damaged = data[:start] + b"\xff" * 8 + data[start + 8 :]
    np.testing.assert_array_equal(decode_rgb(damaged), decode_rgb(encoded(picture(), "JPEG")))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_or_a_stack_the_first_frame_counts(format):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 255)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (decode_rgb(data) == 0).all()
    assert read_header(data).frames == 2


def test_a_jpeg_that_only_lacks_its_end_marker_has_all_its_pixels():
    data = encoded(picture(), "JPEG")
    np.testing.assert_array_equal(decode_rgb(data[:-2]), decode_rgb(data))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.97])
def test_a_truncated_file_is_refused(format, keep):
    data = encoded(picture(), format)
    with pytest.raises(UnreadableImage):
        decode_rgb(data[: int(len(data) * keep)])


def test_an_empty_file_and_a_text_file_say_so(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(UnreadableImage, match=r"empty\.jpg: empty file \(0 bytes\)"):
        read_rgb(tmp_path / "empty.jpg")
    with pytest.raises(UnreadableImage, match=r"notes\.png: not an image of a known format"):
        decode_rgb(b"hello world", path="notes.png")


def test_a_missing_file_is_an_unreadable_image_that_names_itself(tmp_path):
    with pytest.raises(UnreadableImage, match=r"gone\.jpg: No such file") as caught:
        read_rgb(tmp_path / "gone.jpg")
    assert caught.value.path == str(tmp_path / "gone.jpg")


def test_the_error_survives_the_way_out_of_a_worker_process():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.jpg", "truncated")))
    assert (error.path, error.reason, str(error)) == ("a.jpg", "truncated", "a.jpg: truncated")


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb(width=60_000, height=60_000):
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", zlib.compress(bytes(10**6))) + png_chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_before_memory_is_asked_for():
    jpeg = encoded(picture(), "JPEG")
    size = jpeg.index(b"\xff\xc0") + 5
    bombs = [
        png_bomb(),
        png_bomb(12_000, 12_000),  # Pillow alone would only warn
        jpeg[:size] + struct.pack(">HH", 65_000, 65_000) + jpeg[size + 4 :],
        tiff(np.zeros((16, 16), np.uint8)).replace(
            struct.pack("<HHII", 256, 4, 1, 16), struct.pack("<HHII", 256, 4, 1, 1 << 30)
        ),
        b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 1 << 20, 1 << 20, 1, 24, 0, 0, 0, 0, 0, 0),
    ]
    for bomb in bombs:
        with pytest.raises(UnreadableImage, match="bomb"):
            decode_rgb(bomb)


def test_a_jpeg_of_a_thousand_scans_is_refused():
    data = encoded(picture(), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    with pytest.raises(UnreadableImage, match="scans"):
        decode_rgb(data[:scan] + data[scan:-2] * 1000 + b"\xff\xd9")


def test_a_tiff_whose_compression_is_not_known_to_be_safe_is_refused():
    with pytest.raises(UnreadableImage, match=r"compression .* is not read"):
        decode_rgb(tiff(picture(), compression="webp"))


def test_headers_tell_what_is_odd_about_a_file():
    rgba = np.dstack([picture(), picture()[..., 0]])
    assert read_header(encoded(picture(), "JPEG"))[:5] == ("jpeg", 56, 40, "RGB", 8)
    assert read_header(encoded(rgba, "PNG")).alpha
    assert read_header(encoded(picture()[..., 0].astype(np.uint16), "PNG")).bits == 16
    assert read_header(tiff(picture().astype(np.uint16), photometric="rgb")).bits == 16
    assert read_header(encoded(Image.fromarray(picture()).convert("CMYK"), "JPEG")).mode == "CMYK"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_channels_of_an_ome_tiff_keep_their_number_and_their_values(tmp_path, dtype):
    planes = (np.random.default_rng(0).random((5, 20, 30)) * 200).astype(dtype)
    tifffile.imwrite(tmp_path / "cells.ome.tif", planes, metadata={"axes": "CYX"})
    image = read_channels(tmp_path / "cells.ome.tif", channels=5)
    assert image.dtype == dtype
    np.testing.assert_array_equal(image, planes.transpose(1, 2, 0))


def test_channels_stored_as_pages_or_as_samples_are_found():
    planes = np.random.default_rng(0).integers(0, 999, (4, 20, 30), dtype=np.uint16)
    pages = tiff(planes, photometric="minisblack", metadata=None)
    samples = tiff(planes.transpose(1, 2, 0).copy(), photometric="minisblack", planarconfig="contig")
    for data in (pages, samples):
        np.testing.assert_array_equal(decode_channels(data), planes.transpose(1, 2, 0))


def test_one_channel_pictures_have_one_channel():
    gray = picture()[..., 0]
    for data in (encoded(gray, "PNG"), encoded(gray.astype(np.uint16) * 200, "PNG"), encoded(gray, "JPEG"), tiff(gray)):
        assert decode_channels(data).shape == (40, 56, 1)


def test_a_wrong_number_of_channels_and_a_z_stack_are_refused_in_words():
    with pytest.raises(UnreadableImage, match=r"has 3 channel\(s\) where student.in_chans asks for 5"):
        decode_channels(encoded(picture(), "PNG"), channels=5)
    with pytest.raises(UnreadableImage, match="project z and time"):
        decode_channels(tiff(np.zeros((3, 4, 8, 8), np.uint8), imagej=True, metadata={"axes": "ZCYX"}))


HOSTILE = """
import sys
import numpy as np
sys.path.insert(0, {folder!r})
import test_decode
print(test_decode.attack(rounds={rounds}, seed={seed}))
"""


def originals():
    image = picture(64, 80)
    pil = Image.fromarray(image)
    rgba = np.dstack([image, image[..., 0]])
    deep = image.astype(np.uint16) * 257
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        encoded(image, "JPEG", exif=exif),
        encoded(image, "JPEG", progressive=True),
        encoded(pil.convert("CMYK"), "JPEG"),
        encoded(image, "PNG"),
        encoded(pil.convert("P"), "PNG", transparency=3),
        encoded(rgba, "PNG"),
        encoded(deep[..., 0], "PNG"),
        encoded(image, "BMP"),
        encoded(pil.convert("P"), "BMP"),
        encoded(image, "WEBP"),
        encoded(rgba, "WEBP", lossless=True),
        encoded(pil, "WEBP", save_all=True, append_images=[pil.rotate(90)]),
        encoded(pil, "GIF", save_all=True, append_images=[pil.rotate(90)]),
        encoded(image, "TIFF", compression="tiff_lzw"),
        encoded(image, "TIFF", compression="jpeg"),
        encoded(pil.convert("1"), "TIFF", compression="group4"),
        encoded(pil.convert("1"), "TIFF", compression="group3"),
        tiff(deep, compression="zlib", predictor=True),
        tiff(image, tile=(32, 32), compression="packbits", bigtiff=True),
        tiff(image.astype(np.float32), photometric="rgb", compression="zstd"),
        tiff(deep.transpose(2, 0, 1).copy(), photometric="minisblack", metadata={"axes": "CYX"}, ome=True),
    ]


def mutate(data, rng):
    """Damage a file in one of seven ways."""
    data = bytearray(data)
    way = rng.integers(7)
    if way == 0:
        return bytes(data[: rng.integers(len(data))])
    if way == 1:  # a few flips anywhere
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    elif way == 2:  # one byte of the header
        data[rng.integers(min(len(data), 400))] = rng.integers(256)
    elif way == 3:  # huge numbers where sizes and offsets live
        start = rng.integers(min(len(data), 400))
        data[start : start + 4] = rng.choice(
            [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff"]
        )
    elif way == 4:  # a block of rubbish
        start = rng.integers(len(data))
        data[start : start + 64] = rng.bytes(min(64, len(data) - start))
    elif way == 5:  # a block moved
        start, stop = sorted(rng.integers(len(data), size=2))
        data = data[:start] + data[stop:] + data[start:stop]
    elif data.startswith(b"\x89PNG"):  # damage that the checksums do not betray
        data[rng.integers(8, len(data))] ^= 1 << rng.integers(8)
        position = 8
        while position + 12 <= len(data):
            length = struct.unpack_from(">I", data, position)[0]
            if position + 12 + length > len(data):
                break
            checksum = zlib.crc32(data[position + 4 : position + 8 + length])
            struct.pack_into(">I", data, position + 8 + length, checksum)
            position += 12 + length
    else:  # the end of the file, where TIFF keeps its directories
        data[len(data) - 1 - rng.integers(min(len(data), 400))] = rng.integers(256)
    return bytes(data)


def attack(rounds, seed):
    """Decode damaged files; anything but pixels or an UnreadableImage is an error. Returns counts for the reader."""
    import logging
    import resource
    import signal
    import warnings

    logging.disable(logging.CRITICAL)  # tifffile reports each damaged tag
    warnings.simplefilter("ignore")  # as does Pillow
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # a bomb shows up as an error, not as a full machine
    rng = np.random.default_rng(seed)
    tried = refused = 0
    files = originals()
    for _ in range(rounds):
        for file in files:
            data = mutate(file, rng)
            for function in (decode_rgb, decode_channels, read_header):
                signal.alarm(20)  # a hang ends the process, which the test sees
                tried += 1
                try:
                    function(data)
                except UnreadableImage:
                    refused += 1
            signal.alarm(0)
    return f"tried {tried} refused {refused}"


def run_attack(rounds, seed):
    script = HOSTILE.format(folder=str(Path(__file__).parent), rounds=rounds, seed=seed)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    _, tried, _, refused = done.stdout.split()
    return int(tried), int(refused)


def test_a_thousand_damaged_files_neither_end_nor_hang_the_process():
    tried, refused = run_attack(rounds=50, seed=0)
    assert tried == 50 * len(originals()) * 3
    assert refused > tried // 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_thousand_damaged_files_neither_end_nor_hang_the_process(seed):
    tried, _ = run_attack(rounds=400, seed=seed + 1)
    assert tried == 400 * len(originals()) * 3


def test_no_decoder_but_the_safe_ones_is_used():
    source = Path(decode.__file__).read_text()
    assert "import torch" not in source
    assert "imagecodecs" not in [line.split()[-1] for line in source.splitlines() if line.startswith("import")]
