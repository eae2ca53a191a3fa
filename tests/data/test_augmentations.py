"""The renderer against Pillow and torchvision with the same parameters, and the parameters against the recipe."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tv

from dinov2.data import kernels
from dinov2.data.augmentations import CropRenderer, DataAugmentationDINO, UintCrops, make_renderer

SIZES = {"global_crops_size": 64, "local_crops_size": 42}
ORDERS = ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1))


def augmentation(n_local=2, **options):
    return DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), n_local, **SIZES | options)


@pytest.fixture(scope="module")
def picture():
    """Smooth colours with some grain, like a stained cell under a microscope."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((168, 144), Image.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)


def nothing_done(size, height, width):
    """Parameters of one crop of the whole picture to which nothing happens."""
    crop = np.zeros(1, kernels.CROP)
    crop["height"], crop["width"] = height, width
    crop["order"], crop["stain"] = (0, 1, 2, 3), 1
    crop["brightness"] = crop["contrast"] = crop["saturation"] = 1
    return crop


def with_pillow(picture, crop, size):
    """The same crop with Pillow and torchvision, uint8."""
    window = tuple(int(crop[name]) for name in ("top", "left", "height", "width"))
    image = tv.resized_crop(Image.fromarray(picture), *window, [size, size], InterpolationMode.BICUBIC)
    if crop["horizontal_flip"]:
        image = tv.hflip(image)
    if crop["vertical_flip"]:
        image = tv.vflip(image)
    image = Image.fromarray(np.rot90(np.asarray(image), int(crop["turns"])))
    if crop["jitter"]:
        steps = (
            lambda image: tv.adjust_brightness(image, float(crop["brightness"])),
            lambda image: tv.adjust_contrast(image, float(crop["contrast"])),
            lambda image: tv.adjust_saturation(image, float(crop["saturation"])),
            lambda image: tv.adjust_hue(image, float(crop["hue"])),
        )
        for step in crop["order"]:
            image = steps[step](image)
    if crop["grayscale"]:
        image = tv.to_grayscale(image, num_output_channels=3)
    if crop["sigma"] > 0:
        image = tv.gaussian_blur(image, [9, 9], [float(crop["sigma"])] * 2)
    if crop["solarize"]:
        image = tv.solarize(image, 128)
    return np.asarray(image)


def rendered(picture, crop, size):
    """What our renderer makes of it, back in uint8 levels."""
    a = augmentation(n_local=0, global_crops_size=size)
    out = torch.empty(2, 3, size, size)
    CropRenderer(a, out, torch.empty(0, 3, 42, 42)).render(picture, np.repeat(crop, 2), 0)
    mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (a.mean, a.std))
    return ((out[0] * std + mean) * 255).permute(1, 2, 0).numpy()


def assert_same_levels(ours, theirs, mean=1.0, p99=2.0):
    difference = np.abs(ours - theirs.astype(np.float32))
    assert difference.mean() < mean
    assert np.quantile(difference, 0.99) <= p99 + 1e-3


STAGES = [
    ("resize", {}),
    ("flip", {"horizontal_flip": True}),
    ("vertical flip", {"vertical_flip": True}),
    *((f"turn {turns}", {"turns": turns, "horizontal_flip": turns == 3}) for turns in (1, 2, 3)),
    *((f"brightness {f}", {"jitter": True, "brightness": f}) for f in (0.6, 1.37)),
    *((f"contrast {f}", {"jitter": True, "contrast": f}) for f in (0.62, 1.4)),
    *((f"saturation {f}", {"jitter": True, "saturation": f}) for f in (0.8, 1.2)),
    *((f"hue {f}", {"jitter": True, "hue": f}) for f in (-0.1, -0.03, 0.05, 0.1)),
    ("grayscale", {"grayscale": True}),
    *((f"blur {f}", {"sigma": f}) for f in (0.1, 0.5, 1.0, 2.0)),
    ("solarize", {"solarize": True}),
]


@pytest.mark.parametrize("size", [64, 98])
@pytest.mark.parametrize(("name", "what"), STAGES, ids=[name for name, _ in STAGES])
def test_each_stage_is_pillows_to_within_a_level(picture, name, what, size):
    crop = nothing_done(size, *picture.shape[:2])
    crop["top"], crop["left"], crop["height"], crop["width"] = 11, 23, 101, 120
    for field, value in what.items():
        crop[field] = value
    theirs = with_pillow(picture, crop[0], size)
    assert_same_levels(rendered(picture, crop, size), theirs, mean=0.3)


def test_whole_chains_are_pillows_to_within_a_level(picture):
    a = augmentation(n_local=6)
    rng = np.random.default_rng(3)
    p99s = []
    for _ in range(6):
        for crop in a.draw(*picture.shape[:2], rng):
            difference = np.abs(rendered(picture, crop[None], 64) - with_pillow(picture, crop, 64))
            assert difference.mean() < 1
            p99s.append(np.quantile(difference, 0.99))
    # One level of difference after the resize can become several in the colour steps that follow.
    assert np.mean(p99s) < 1
    assert max(p99s) < 5


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_the_colour_steps_is_kept(picture, order):
    crop = nothing_done(64, *picture.shape[:2])
    crop["jitter"], crop["order"] = True, order
    crop["brightness"], crop["contrast"], crop["saturation"], crop["hue"] = 1.4, 1.4, 1.2, 0.1
    assert_same_levels(rendered(picture, crop, 64), with_pillow(picture, crop[0], 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_the_rounded_float_ones(picture, dtype):
    a = augmentation()
    crops = a.draw(*picture.shape[:2], np.random.default_rng(1))

    def render(kind):
        outputs = torch.empty(2, 3, 64, 64, dtype=kind), torch.empty(2, 3, 42, 42, dtype=kind)
        CropRenderer(a, *outputs).render(picture, crops, 0)
        return outputs

    for exact, rounded in zip(render(torch.float32), render(dtype)):
        assert torch.equal(exact.to(dtype), rounded)


def test_the_stain_jitter_scales_densities_and_one_changes_nothing(picture):
    crop = nothing_done(64, *picture.shape[:2])
    plain = rendered(picture, crop, 64)
    crop["stain"] = (1.3, 0.8, 1.1)
    basis = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    density = -np.log((plain.astype(np.float64) + 1) / 256)
    stains = density @ np.linalg.inv(basis) * [1.3, 0.8, 1.1]
    expected = np.clip(256 * np.exp(-stains @ basis) - 1, 0, 255)
    assert np.abs(rendered(picture, crop, 64) - expected).max() < 1.01


def test_the_draws_follow_the_recipe():
    a = augmentation(n_local=8, vertical_flip=0.25, rotate90=True, hed_jitter=0.05)
    rng = np.random.default_rng(0)
    crops = np.stack([a.draw(200, 240, rng) for _ in range(3000)])
    global_1, global_2, local = crops[:, 0], crops[:, 1], crops[:, 2:]

    def near(share, expected, count):
        return abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / count) + 1e-9

    n = crops.size
    for name, probability in (("horizontal_flip", 0.5), ("vertical_flip", 0.25), ("jitter", 0.8), ("grayscale", 0.2)):
        assert near(crops[name].mean(), probability, n), name
    for view, blurred, solarized in ((global_1, 1.0, 0.0), (global_2, 0.1, 0.2), (local, 0.5, 0.0)):
        assert near((view["sigma"] > 0).mean(), blurred, view.size)
        assert near(view["solarize"].mean(), solarized, view.size)
    for turn in range(4):
        assert near((crops["turns"] == turn).mean(), 0.25, n)
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in ranges.items():
        assert_uniform(crops[name], low, high)
    assert_uniform(global_1["sigma"], 0.1, 2.0)
    orders, counts = np.unique(crops["order"].reshape(-1, 4), axis=0, return_counts=True)
    assert len(orders) == 24
    assert all(near(count / n, 1 / 24, n) for count in counts)
    assert abs(crops["stain"].mean() - 1) < 0.001
    assert abs(crops["stain"].std() - 0.05) < 0.001


def assert_uniform(values, low, high):
    values = np.sort(values.ravel())
    assert low <= values[0]
    assert values[-1] <= high + 1e-6
    expected = np.linspace(low, high, len(values))
    assert np.abs(values - expected).max() < 2 * (high - low) / np.sqrt(len(values))  # Kolmogorov-Smirnov


@pytest.mark.parametrize(("height", "width"), [(200, 240), (60, 300), (300, 60)])
@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
def test_windows_are_distributed_as_torchvisions(height, width, scale):
    a = DataAugmentationDINO(scale, (0.05, 0.32), 0, **SIZES)
    rng = np.random.default_rng(0)
    ours = np.concatenate([a.draw(height, width, rng) for _ in range(1500)])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(3000)])
    for column, name in enumerate(("top", "left", "height", "width")):
        mine, others = ours[name].astype(float), theirs[:, column].astype(float)
        error = np.sqrt((mine.var() + others.var()) / 3000)
        assert abs(mine.mean() - others.mean()) < 4 * error + 1e-9, name
        assert abs(mine.std() - others.std()) < 4 * error + 1e-9, name
    assert (ours["top"] >= 0).all()
    assert (ours["top"] + ours["height"] <= height).all()
    assert (ours["left"] + ours["width"] <= width).all()


def test_the_result_depends_on_the_rng_only(picture):
    a = augmentation()
    one, two = (a(picture, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(one["global_crops"][1], two["global_crops"][1])
    torch.manual_seed(3)
    from_torch = a(Image.fromarray(picture))
    torch.manual_seed(3)
    assert torch.equal(a(picture)["local_crops"][0], from_torch["local_crops"][0])


def test_a_sample_has_dinov2s_keys_and_shapes(picture):
    sample = augmentation(n_local=5)(picture)
    assert set(sample) == {"global_crops", "global_crops_teacher", "local_crops", "offsets"}
    assert [tuple(crop.shape) for crop in sample["global_crops"]] == [(3, 64, 64)] * 2
    assert [tuple(crop.shape) for crop in sample["local_crops"]] == [(3, 42, 42)] * 5
    assert all(x is y for x, y in zip(sample["global_crops"], sample["global_crops_teacher"]))
    assert augmentation(n_local=0)(picture)["local_crops"] == []


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (500, 2)])
def test_tiny_and_narrow_images_give_crops_of_the_right_size(shape):
    image = np.full((*shape, 3), 90, np.uint8)
    sample = augmentation()(image, np.random.default_rng(0))
    assert all(torch.isfinite(crop).all() for crop in [*sample["global_crops"], *sample["local_crops"]])


def test_uint8_crops_are_the_resized_windows_before_anything_else(picture):
    a = augmentation(n_local=1)
    crops = a.draw(*picture.shape[:2], np.random.default_rng(2))
    room = UintCrops.empty(a, images=3)
    room.resize(picture, crops, 1)
    for field in ("horizontal_flip", "jitter", "grayscale", "solarize"):
        crops[field] = False
    crops["sigma"] = 0
    assert_same_levels(room.groups[0][4].numpy(), with_pillow(picture, crops[1], 64))
    assert_same_levels(room.groups[1][1].numpy(), with_pillow(picture, crops[2], 42))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("grayscale", 1.5, "probability of grayscale"),
        ("blur_local", -0.1, "probability of blur"),
        ("hue", 0.7, "half a turn"),
        ("brightness", -1, "brightness must not be negative"),
        ("blur_sigma", (2.0, 1.0), "blur_sigma must be a range"),
        ("std", (0.2, 0.0, 0.2), "std positive"),
        ("global_crops_size", 4, "more than 4 pixels"),
    ],
)
def test_an_option_out_of_its_range_is_named(option, value, words):
    with pytest.raises(ValueError, match=words):
        augmentation(**{option: value})


def channel_crop(pixels, **what):
    channels = pixels.shape[2]
    a = augmentation(n_local=0, mean=(0.0,) * channels, std=(1.0,) * channels)
    crop = nothing_done(64, *pixels.shape[:2])
    for field, value in what.items():
        crop[field] = value
    out = torch.empty(2, channels, 64, 64)
    make_renderer(a, out, torch.empty(0, channels, 42, 42)).render(pixels, np.repeat(crop, 2), 0)
    return out[0].permute(1, 2, 0).numpy() * 255


@pytest.mark.parametrize(
    "what",
    [
        {"horizontal_flip": True, "turns": 1},
        {"jitter": True, "brightness": 1.3},
        {"sigma": 1.3},
        {"solarize": True},
    ],
)
def test_one_channel_is_treated_as_each_of_the_colours(picture, what):
    crop = nothing_done(64, *picture.shape[:2])
    for field, value in what.items():
        crop[field] = value
    gray = np.repeat(picture[..., :1], 3, axis=2)
    assert_same_levels(channel_crop(picture[..., :1], **what), rendered(gray, crop, 64)[..., :1])


def test_sixteen_bit_and_float_channels_keep_their_resolution():
    ramp = np.linspace(20000, 20255, 64)[None, :, None].repeat(64, 0).repeat(5, 2)
    expected = ramp / 65535 * 255
    assert np.abs(channel_crop(ramp.astype(np.uint16)) - expected).max() < 4e-3  # whole numbers in the file
    assert np.abs(channel_crop((ramp / 65535).astype(np.float32)) - expected).max() < 1e-3


def test_a_sample_of_many_channels_has_them_all():
    a = augmentation(mean=(0.1,) * 5, std=(0.2,) * 5)
    sample = a(np.random.default_rng(0).integers(0, 60000, (70, 60, 5)).astype(np.uint16), np.random.default_rng(0))
    assert sample["global_crops"][0].shape == (5, 64, 64)
    assert torch.isfinite(sample["local_crops"][0]).all()


def test_pixels_of_another_type_are_refused():
    with pytest.raises(ValueError, match="expected uint8 RGB pixels"):
        augmentation()(np.zeros((20, 20), np.uint8))
    with pytest.raises(ValueError, match="expected uint8 RGB pixels"):
        augmentation()(np.zeros((20, 20, 3), np.uint16))
    with pytest.raises(ValueError, match="expected pixels of 2 channels"):
        augmentation(mean=(0.0, 0.0), std=(1.0, 1.0))(np.zeros((20, 20, 3), np.uint16))
