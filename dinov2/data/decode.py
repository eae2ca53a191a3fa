"""From the bytes of one image file to pixels, whatever the file holds and however it is damaged.

The decoder follows the first bytes of the file, never its name, and is chosen per format so that no input can end the
process: simplejpeg (strict) for JPEG, Pillow for PNG, BMP, WebP and GIF, tifffile for TIFF. Faster PNG decoders exist,
but torchvision's and imagecodecs' end the interpreter on damaged files. docs/data.md has the decisions in one table.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
import tifffile
from PIL import Image

logger = logging.getLogger("dinov2")

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485  # 256 MiB as RGB: larger images are taken for decompression bombs
MAX_FILE_BYTES = 1 << 30
MAX_JPEG_SCANS = 100  # a progressive JPEG has about ten; thousands are an attack on the decoder's time

_ORIENTATION_TAG = 0x0112
_JPEG_END = b"\xff\xd9"
# Compressions that survived the hostile-input tests; imagecodecs' PNG inside a TIFF, for one, can abort the process.
_TIFF_COMPRESSIONS = {1, 2, 3, 4, 5, 7, 8, 32773, 32946, 50000}  # none, CCITT, LZW, JPEG, deflate, PackBits, Zstandard


class UnreadableImage(ValueError):
    """An image file that gives no trustworthy pixels; `path` and `reason` say which and why."""

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(os.fspath(path), reason)  # both in args, so that it survives the way out of a worker process
        self.path, self.reason = self.args

    def __str__(self) -> str:
        return f"{self.path or 'image'}: {self.reason}"


class ImageHeader(NamedTuple):
    """What a file says of itself, read without decoding its pixels."""

    format: str  # "jpeg", "png", "bmp", "webp", "tiff" or "gif"
    width: int  # pixels, as stored: before the EXIF rotation
    height: int
    mode: str  # "1", "L", "LA", "P", "RGB", "RGBA", "CMYK", … in Pillow's words; TIFF: photometric x samples
    bits: int  # per sample
    frames: int  # animation frames or pages
    alpha: bool
    orientation: int  # EXIF, 1 to 8


def sniff(data: bytes) -> str | None:
    """Return the format that the first bytes announce ("jpeg", "png", …), or None."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if data.startswith(b"BM"):
        return "bmp"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    return None


def decode_rgb(data: bytes, *, path: str | os.PathLike = "") -> np.ndarray:
    """Decode one image to RGB, upright.

    Gray and palette images become RGB; transparency is composited on white, the background of a bright-field slide;
    more than 8 bits are rescaled by `to_uint8`; EXIF rotation is applied; of an animation or a stack the first frame
    counts.

    Args:
        data: the whole file.
        path: named in the error.

    Returns:
        uint8 array (height, width, 3), contiguous.

    Raises:
        UnreadableImage: empty, truncated, damaged, of an unknown format, or larger than MAX_PIXELS.
    """
    image = _guarded(_RGB_DECODERS, data, path)
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise UnreadableImage(path, f"decodes to an array of shape {image.shape}, not to an RGB image")
    return np.ascontiguousarray(image)


def decode_channels(data: bytes, *, path: str | os.PathLike = "", channels: int | None = None) -> np.ndarray:
    """Decode one image with its channels and values as stored: fluorescence, multiplexed or 16-bit microscopy.

    A TIFF or OME-TIFF may keep its channels as samples, as a C axis, or as equal pages; other formats give the
    channels that they have. Values are not rescaled: normalise with the data set's own mean and deviation.

    Args:
        data: the whole file.
        path: named in the error.
        channels: refuse any other number of channels (`student.in_chans`).

    Returns:
        array (height, width, channels) of the stored type: uint8, uint16, float32, …

    Raises:
        UnreadableImage: as `decode_rgb`; also several z planes or time points, or another number of channels.
    """
    image = _guarded(_CHANNEL_DECODERS, data, path)
    if channels is not None and image.shape[2] != channels:
        raise UnreadableImage(path, f"has {image.shape[2]} channel(s) where student.in_chans asks for {channels}")
    return np.ascontiguousarray(image)


def read_bytes(path: str | os.PathLike) -> bytes:
    """Return the content of a file, or raise UnreadableImage with the system's reason."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise UnreadableImage(path, f"file of {size / 2**30:.1f} GiB; cut whole slides into tiles first")
            return file.read()
    except OSError as error:
        raise UnreadableImage(path, error.strerror or str(error)) from error


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """Read one image file as RGB; see `decode_rgb`."""
    return decode_rgb(read_bytes(path), path=path)


def read_channels(path: str | os.PathLike, channels: int | None = None) -> np.ndarray:
    """Read one image file with its own channels and values; see `decode_channels`."""
    return decode_channels(read_bytes(path), path=path, channels=channels)


def read_header(data: bytes, *, path: str | os.PathLike = "") -> ImageHeader:
    """Return what the file says of itself; raises UnreadableImage where the header is damaged or of unknown format."""
    return _guarded({**dict.fromkeys(_PILLOW_FORMATS, _pillow_header), "tiff": _tiff_header}, data, path)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Rescale samples of any type to 0..255, by one rule per type.

    - unsigned integers: the smallest of 8, 12 and 16 bits that holds the largest value is mapped on 0..255, so that a
      12-bit camera in a 16-bit file is not nearly black and intensities stay comparable between images;
    - floats within 0..1 are multiplied by 255, floats within 0..255 are rounded;
    - anything else (signed, wider, other floats): the 0.1 and 99.9 percentiles are mapped on 0 and 255.

    Values that are not finite become 0.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind == "c":
        raise ValueError("complex samples have no brightness")
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0) if values.dtype.kind == "f" else values
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "u" and high <= 0xFFFF:
        low, high = 0.0, next(float(2**bits - 1) for bits in (8, 12, 16) if high < 2**bits)
    elif values.dtype.kind == "f" and low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if high <= 1 else 255.0
    else:
        low, high = (float(bound) for bound in np.percentile(values, (0.1, 99.9)))
    scaled = (values.astype(np.float32) - low) * (255.0 / max(high - low, 1e-12))
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def _guarded(decoders: dict[str, Callable], data: bytes, path: str | os.PathLike):
    """Run the decoder of the format; whatever a damaged file makes it raise becomes an UnreadableImage."""
    if not data:
        raise UnreadableImage(path, "empty file (0 bytes)")
    kind = sniff(data)
    if kind is None:
        raise UnreadableImage(path, f"not an image of a known format (starts with {data[:8]!r})")
    try:
        return decoders[kind](data)
    except _Refused as refusal:
        raise UnreadableImage(path, f"{kind}: {refusal}") from None
    except MemoryError as error:
        raise UnreadableImage(path, f"{kind}: asks for more memory than there is") from error
    except Exception as error:  # damaged files make decoders raise anything from KeyError to SyntaxError
        raise UnreadableImage(path, f"{kind}: damaged ({type(error).__name__}: {str(error)[:200]})") from error


class _Refused(Exception):
    """A reason of ours not to decode, in words fit for the user."""


def _check_size(width: int, height: int, samples: int = 1) -> None:
    if width * height * max(1, samples / 4) > MAX_PIXELS:
        raise _Refused(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} allowed (decompression bomb?)")


# ---------------------------------------------------------------------------------------------------------- JPEG


def _jpeg_to_rgb(data: bytes) -> np.ndarray:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height)
    if data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise _Refused("more than 100 scans (decompression bomb?)")
    if colorspace in ("CMYK", "YCCK"):
        return _pillow_to_rgb(data)
    return _upright(_strict_jpeg(data), _jpeg_orientation(data))


def _strict_jpeg(data: bytes) -> np.ndarray:
    """Decode, refusing what libjpeg would only warn of; a file that merely lacks its end marker has all its pixels."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError as error:
        if "Premature end of JPEG file" not in str(error):
            raise
        try:
            return simplejpeg.decode_jpeg(data + _JPEG_END, colorspace="RGB", strict=True)
        except ValueError:
            raise _Refused("truncated") from error


def _jpeg_orientation(data: bytes) -> int:
    start = data.find(b"Exif\0\0", 0, 1 << 17)
    if start < 0:
        return 1
    exif = Image.Exif()
    return _orientation(lambda: exif.load(data[start : start + (1 << 16)]) or exif)


# ---------------------------------------------------------------------------------------- PNG, BMP, WebP, GIF: Pillow

_PILLOW_FORMATS = {"jpeg": "JPEG", "png": "PNG", "bmp": "BMP", "webp": "WEBP", "gif": "GIF"}


def _open_with_pillow(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=[_PILLOW_FORMATS[sniff(data)]])
    except Image.DecompressionBombError as error:
        raise _Refused(f"more than the {MAX_PIXELS:,} pixels allowed (decompression bomb?)") from error
    _check_size(*image.size)
    return image


def _pillow_to_rgb(data: bytes) -> np.ndarray:
    return pillow_to_rgb(_open_with_pillow(data))


def pillow_to_rgb(image: Image.Image) -> np.ndarray:
    """An opened Pillow image as `decode_rgb` gives its file: uint8 (height, width, 3), upright, on white."""
    image.load()
    orientation = _orientation(image.getexif)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        rgb = _gray_to_rgb(to_uint8(_pillow_samples(image)))
    elif _has_alpha(image):
        rgba = np.asarray(image.convert("RGBA"))
        rgb = _on_white(rgba[..., :3], rgba[..., 3])
    else:
        rgb = np.asarray(image.convert("RGB"))
    return _upright(rgb, orientation)


def _pillow_samples(image: Image.Image) -> np.ndarray:
    """Return the stored samples; mode I holds 16-bit PNG or wider, as signed integers without a sign."""
    samples = np.asarray(image)
    return samples.astype(np.uint32) if image.mode == "I" and samples.min() >= 0 else samples


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _pillow_to_channels(data: bytes) -> np.ndarray:
    return pillow_to_channels(_open_with_pillow(data))


def pillow_to_channels(image: Image.Image) -> np.ndarray:
    """An opened Pillow image as `decode_channels` gives its file: (height, width, channels), upright."""
    image.load()
    orientation = _orientation(image.getexif)
    if image.mode in ("P", "PA", "1"):
        image = image.convert("RGBA" if _has_alpha(image) else "L" if image.mode == "1" else "RGB")
    samples = np.asarray(image)
    return _upright(samples[..., None] if samples.ndim == 2 else samples, orientation)


def _pillow_header(data: bytes) -> ImageHeader:
    image = _open_with_pillow(data)
    bits = 16 if image.mode.startswith("I;16") or (sniff(data) == "png" and data[24:25] == b"\x10") else 8
    bits = {"1": 1, "I": 32, "F": 32}.get(image.mode, bits)
    frames, orientation = getattr(image, "n_frames", 1), _orientation(image.getexif)
    return ImageHeader(sniff(data), *image.size, image.mode, bits, frames, _has_alpha(image), orientation)


# ---------------------------------------------------------------------------------------------------------- TIFF


def _first_page(tiff: tifffile.TiffFile, file_bytes: int) -> tifffile.TiffPage:
    if not len(tiff.pages):
        raise _Refused("no page in it (truncated?)")
    page = tiff.pages.first
    _check_page(page, file_bytes)
    return page


def _check_page(page: tifffile.TiffPage, file_bytes: int) -> None:
    _check_size(page.imagewidth, page.imagelength, page.samplesperpixel * page.imagedepth)
    if page.compression not in _TIFF_COMPRESSIONS:
        name = getattr(page.compression, "name", page.compression)
        raise _Refused(f"compression {name} is not read; save it again with LZW, deflate or none")
    if page.tilewidth * page.tilelength > MAX_PIXELS:
        raise _Refused(f"tiles of {page.tilewidth} x {page.tilelength} pixels (decompression bomb?)")
    ends = [start + count for start, count in zip(page.dataoffsets, page.databytecounts)]
    if max(ends, default=0) > file_bytes:
        raise _Refused(f"truncated ({file_bytes:,} of at least {max(ends):,} bytes)")


def _tiff_to_rgb(data: bytes) -> np.ndarray:
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page = _first_page(tiff, len(data))
        samples = _samples_last(page.asarray(), page.axes)
        rgb = _page_to_rgb(page, samples)
        return _upright(rgb, _tiff_orientation(page))


def _page_to_rgb(page: tifffile.TiffPage, samples: np.ndarray) -> np.ndarray:
    photometric = getattr(page.photometric, "name", str(page.photometric))
    if photometric == "PALETTE":
        return (page.colormap >> 8).astype(np.uint8).T[samples[..., 0]]
    if page.bitspersample < 8:
        samples = samples.astype(np.uint8) * np.uint8(255 // (2**page.bitspersample - 1))
    count = {"MINISWHITE": 1, "MINISBLACK": 1, "RGB": 3, "YCBCR": 3, "SEPARATED": 4}.get(photometric)
    alpha = samples.shape[2] == (count or 0) + 1 and bool(page.extrasamples)
    if count is None or samples.shape[2] != count + alpha:
        raise _Refused(f"{samples.shape[2]} channels of kind {photometric}; for microscopy set student.in_chans")
    samples = to_uint8(samples)
    colour = samples[..., :count]
    if photometric == "SEPARATED":
        colour = np.asarray(Image.fromarray(np.ascontiguousarray(colour), "CMYK").convert("RGB"))
    elif photometric == "YCBCR" and page.compression != 7:  # tifffile has turned JPEG into RGB already
        colour = np.asarray(Image.fromarray(np.ascontiguousarray(colour), "YCbCr").convert("RGB"))
    elif count == 1:
        colour = _gray_to_rgb(255 - colour[..., 0] if photometric == "MINISWHITE" else colour[..., 0])
    return _on_white(colour, samples[..., count]) if alpha else colour


def _tiff_to_channels(data: bytes) -> np.ndarray:
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page = _first_page(tiff, len(data))
        series = tiff.series[0]
        sizes = {axis: size for axis, size in zip(series.axes, series.shape) if size > 1 or axis in "YX"}
        extra = [axis for axis in sizes if axis not in "YX"]
        if len(extra) > 1 or any(axis in "ZT" for axis in extra) or not {"Y", "X"} <= set(sizes):
            raise _Refused(f"axes {series.axes} {series.shape}: one plane with channels is read; project z and time")
        _check_size(sizes["X"], sizes["Y"], sizes[extra[0]] if extra else 1)
        for other in series.pages:
            if other is not None and other is not page:
                _check_page(other.aspage() if hasattr(other, "aspage") else other, len(data))
        samples = series.asarray().reshape(tuple(sizes.values()))
        return _upright(_samples_last(samples, "".join(sizes)), _tiff_orientation(page))


def _samples_last(samples: np.ndarray, axes: str) -> np.ndarray:
    """Return (height, width, samples) of an array with the axes Y, X and at most one more, in any order."""
    if len(axes) > 3 or not {"Y", "X"} <= set(axes):
        raise _Refused(f"axes {axes} are not those of one picture")
    channel = next((axis for axis in axes if axis not in "YX"), None)
    if channel is None:
        samples, axes, channel = samples[..., None], axes + "S", "S"
    return samples.transpose([axes.index(axis) for axis in ("Y", "X", channel)])


def _tiff_orientation(page: tifffile.TiffPage) -> int:
    tag = page.tags.get(_ORIENTATION_TAG)
    return tag.value if tag is not None and tag.value in range(1, 9) else 1


def _tiff_header(data: bytes) -> ImageHeader:
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page = _first_page(tiff, len(data))
        mode = f"{getattr(page.photometric, 'name', page.photometric)} x {page.samplesperpixel}"
        alpha = any(extra in (1, 2) for extra in page.extrasamples)
        frames, orientation = len(tiff.pages), _tiff_orientation(page)
        return ImageHeader(
            "tiff", page.imagewidth, page.imagelength, mode, page.bitspersample, frames, alpha, orientation
        )


# -------------------------------------------------------------------------------------------------------- common


def _gray_to_rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=2)


def _on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composite on white, rounding to nearest; an alpha of 0 everywhere is a writer's slip and is ignored."""
    if not alpha.any():
        return rgb
    weight = alpha[..., None].astype(np.uint32)
    return ((rgb * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)


def _orientation(read_exif: Callable[[], Image.Exif]) -> int:
    """Return the EXIF orientation, 1 (upright) where the EXIF block is absent or damaged: the pixels are still good."""
    try:
        value = read_exif().get(_ORIENTATION_TAG, 1)
    except Exception as error:  # Pillow raises anything on damaged EXIF
        logger.debug("damaged EXIF block ignored: %r", error)
        return 1
    return value if value in range(1, 9) else 1


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation on an array (height, width, channels)."""
    if orientation >= 5:  # the stored rows are columns
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image


_RGB_DECODERS = {**dict.fromkeys(_PILLOW_FORMATS, _pillow_to_rgb), "jpeg": _jpeg_to_rgb, "tiff": _tiff_to_rgb}
_CHANNEL_DECODERS = {
    **dict.fromkeys(_PILLOW_FORMATS, _pillow_to_channels),
    "jpeg": lambda data: _jpeg_to_rgb(data) if _jpeg_is_colour(data) else _jpeg_to_rgb(data)[..., :1],
    "tiff": _tiff_to_channels,
}


def _jpeg_is_colour(data: bytes) -> bool:
    return simplejpeg.decode_jpeg_header(data)[2].upper() not in ("GRAY", "GREY")
