"""DINOv2's multi-crop augmentation: parameters first, as plain data, then pixels.

`DataAugmentationDINO.draw` says what happens to each crop of an image; it costs microseconds and needs the image's size
only. A renderer then makes it so: here on the CPU, in `photometric.py` for a whole batch on the training device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import kernels
from .channels import ChannelRenderer
from .transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

_ENCODINGS = {
    torch.float32: kernels.FLOAT32,
    torch.float16: kernels.FLOAT16,
    torch.bfloat16: kernels.BFLOAT16,
}
# The overload that writes into a tensor spares an allocation per crop, a quarter of the time of the resize; the public
# torch.nn.functional.interpolate(mode="bicubic", antialias=True) calls the same operator without it.
_resize_bicubic_antialiased = torch.ops.aten._upsample_bicubic2d_aa.out


class DataAugmentationDINO:
    """Two large and several small random views of an image (DINOv2 paper, section 4 and appendix).

    Args:
        global_crops_scale: smallest and largest area of a global crop, shares of the image.
        local_crops_scale: the same for local crops.
        local_crops_number: local crops per image; 0 for none.
        global_crops_size: side of the global crops, pixels.
        local_crops_size: side of the local crops, pixels.
        horizontal_flip: probability, like every number below that is not explained otherwise.
        vertical_flip: probability.
        rotate90: turn by a random multiple of 90 degrees.
        color_jitter: probability that the next four are applied, in random order.
        brightness: largest relative change.
        contrast: largest relative change.
        saturation: largest relative change.
        hue: largest change, in turns of the colour circle.
        grayscale: probability.
        blur_global_1: probability of the blur in the first global crop.
        blur_global_2: probability of the blur in the second one.
        blur_local: probability of the blur in a local crop.
        blur_sigma: smallest and largest standard deviation of the 9-tap Gaussian, pixels.
        solarize_global_2: probability that the second global crop is inverted where it is 128 or brighter.
        hed_jitter: standard deviation of the factor on the density of each stain; 0 is off.
        mean: per channel, of images scaled to 0..1; images have as many channels as this has numbers. Other than RGB,
            they know no saturation, hue, grayscale and stain (see `channels.py`).
        std: per channel.

    Raises:
        ValueError: an option that is out of its range, by name.
    """

    def __init__(
        self,
        global_crops_scale: Sequence[float],
        local_crops_scale: Sequence[float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        *,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.0,
        rotate90: bool = False,
        color_jitter: float = 0.8,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        grayscale: float = 0.2,
        blur_global_1: float = 1.0,
        blur_global_2: float = 0.1,
        blur_local: float = 0.5,
        blur_sigma: Sequence[float] = (0.1, 2.0),
        solarize_global_2: float = 0.2,
        hed_jitter: float = 0.0,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ):
        self.global_crops_size = global_crops_size
        self.local_crops_size = local_crops_size
        self.local_crops_number = local_crops_number
        self.mean = np.asarray(mean, dtype=np.float64)
        self.std = np.asarray(std, dtype=np.float64)
        common = {
            "horizontal_flip": horizontal_flip,
            "vertical_flip": vertical_flip,
            "rotate90": float(rotate90),
            "color_jitter": color_jitter,
            "brightness": brightness,
            "contrast": contrast,
            "saturation": saturation,
            "hue": hue,
            "grayscale": grayscale,
            "blur_sigma": tuple(blur_sigma),
            "hed_jitter": hed_jitter,
        }
        large, small = tuple(global_crops_scale), tuple(local_crops_scale)
        views = [
            {**common, "scale": large, "blur": blur_global_1, "solarize": 0.0},
            {**common, "scale": large, "blur": blur_global_2, "solarize": solarize_global_2},
            *[{**common, "scale": small, "blur": blur_local, "solarize": 0.0}] * local_crops_number,
        ]
        self._views = np.array([tuple(view[name] for name in kernels.VIEW.names) for view in views], dtype=kernels.VIEW)
        self._check()

    @property
    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        """Per channel the float32 factor and summand that turn a level `v` of 0..255 into `(v / 255 - mean) / std`."""
        return (1 / (255 * self.std)).astype(np.float32), (-self.mean / self.std).astype(np.float32)

    def _check(self) -> None:
        for name in ("global_crops_size", "local_crops_size"):
            if getattr(self, name) <= kernels.BLUR_RADIUS:
                raise ValueError(
                    f"{name}={getattr(self, name)}: crops need more than {kernels.BLUR_RADIUS} pixels for the blur"
                )
        for view in self._views:
            for name in ("horizontal_flip", "vertical_flip", "color_jitter", "grayscale", "blur", "solarize"):
                if not 0 <= view[name] <= 1:
                    raise ValueError(f"the probability of {name} must lie between 0 and 1, got {view[name]}")
            for name in ("brightness", "contrast", "saturation", "hed_jitter"):
                if view[name] < 0:
                    raise ValueError(f"{name} must not be negative, got {view[name]}")
            if not 0 <= view["hue"] <= 0.5:
                raise ValueError(f"hue must lie between 0 and 0.5 (half a turn), got {view['hue']}")
            for name, low in (("scale", 0), ("blur_sigma", 0)):
                smallest, largest = view[name]
                if not low < smallest <= largest:
                    raise ValueError(f"{name} must be a range of positive numbers, got {smallest} to {largest}")
        if len(self.mean) != len(self.std) or not len(self.mean) or (self.std <= 0).any():
            raise ValueError(f"mean and std need one number per channel, std positive; got {self.mean} and {self.std}")

    @property
    def channels(self) -> int:
        """Channels of the images: as many as `mean` has numbers."""
        return len(self.mean)

    @property
    def crops_per_image(self) -> int:
        """Two global crops and the local ones."""
        return len(self._views)

    def draw(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """Draw what happens to each crop of one image.

        Args:
            height: of the image, pixels.
            width: of the image, pixels.
            rng: gives `crops_per_image * kernels.UNIFORMS_PER_CROP` numbers, whatever their values.

        Returns:
            `(crops_per_image,)` records of `kernels.CROP`, global crops first.
        """
        crops = np.zeros(len(self._views), dtype=kernels.CROP)
        uniforms = rng.random((len(self._views), kernels.UNIFORMS_PER_CROP))
        kernels.draw_crops(uniforms, self._views, height, width, crops)
        return crops

    def __call__(self, image: Image.Image | np.ndarray, rng: np.random.Generator | None = None) -> dict[str, Any]:
        """Augment one image.

        Args:
            image: a PIL image, or pixels `(H, W, C)`.
            rng: source of the draws; when None, one seeded from torch's global generator.

        Returns:
            `global_crops` (two float tensors `(C, H, W)`), `global_crops_teacher` (the same), `local_crops` and
            `offsets` (empty).
        """
        pixels = as_pixels(image, self.channels)
        rng = rng or np.random.default_rng(int(torch.randint(2**62, (1,))))
        crops = self.draw(*pixels.shape[:2], rng)
        n_local, large, small = self.local_crops_number, self.global_crops_size, self.local_crops_size
        global_crops = torch.empty(2, self.channels, large, large)
        local_crops = torch.empty(n_local, self.channels, small, small)
        make_renderer(self, global_crops, local_crops).render(pixels, crops, 0)
        views = list(global_crops)
        return {
            "global_crops": views,
            "global_crops_teacher": views,
            "local_crops": list(local_crops),
            "offsets": (),
        }


def as_pixels(image: Image.Image | np.ndarray, channels: int = 3) -> np.ndarray:
    """Contiguous pixels `(H, W, C)` of a PIL image or an array: uint8 for RGB, numbers of any type for other channels.

    Raises:
        ValueError: an array of another type or shape, or without pixels.
    """
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    wanted = "uint8 RGB pixels" if channels == 3 else f"pixels of {channels} channels"
    fits = image.dtype == np.uint8 or (channels != 3 and image.dtype.kind in "uif")
    if not fits or image.ndim != 3 or image.shape[2] != channels or image.size == 0:
        raise ValueError(f"expected {wanted}, shape (H, W, {channels}); got {image.dtype} of shape {image.shape}")
    return np.require(image, requirements=("C", "W"))  # torch warns of arrays that it could not write to


def make_renderer(
    augmentation: DataAugmentationDINO, global_crops: Tensor, local_crops: Tensor
) -> CropRenderer | ChannelRenderer:
    """The renderer for the channels of the images: the compiled one for RGB."""
    if augmentation.channels == 3:
        return CropRenderer(augmentation, global_crops, local_crops)
    return ChannelRenderer(augmentation.levels, global_crops, local_crops)


class CropRenderer:
    """Draws the crops of images into one batch on the CPU: window, resize, colour, blur, normalise, cast.

    Args:
        augmentation: for the sizes and the normalisation.
        global_crops: `(2 * images, 3, H, H)`, contiguous, float32, float16 or bfloat16.
        local_crops: `(local_crops_number * images, 3, h, h)` of the same type.
    """

    def __init__(self, augmentation: DataAugmentationDINO, global_crops: Tensor, local_crops: Tensor):
        if global_crops.dtype not in _ENCODINGS:
            raise ValueError(f"crops can be {', '.join(map(str, _ENCODINGS))}; got {global_crops.dtype}")
        self._images = len(global_crops) // 2
        self._encoding = _ENCODINGS[global_crops.dtype]
        self._levels = augmentation.levels
        self._resized = UintCrops.empty(augmentation, images=1)
        self._targets = [_as_bits(crops) for crops in (global_crops, local_crops)]

    def render(self, pixels: np.ndarray, crops: np.ndarray, image: int) -> None:
        """Fill the rows of one image.

        Args:
            pixels: of the image, as from `as_pixels`.
            crops: as from `DataAugmentationDINO.draw`.
            image: its number in the batch.
        """
        self._resized.resize(pixels, crops, 0)
        groups = (crops[:2], crops[2:])
        for group, resized, (out16, out32) in zip(groups, self._resized.groups, self._targets):
            if len(group):
                rows = np.arange(len(group)) * self._images + image
                flat = resized.numpy().reshape(len(group), -1)
                kernels.render_crops(flat, group, resized.shape[1], *self._levels, self._encoding, out16, out32, rows)


class UintCrops:
    """Crops as uint8 levels, channels last: resized, nothing else done to them yet.

    Args:
        global_crops: `(2 * images, H, H, 3)` uint8, contiguous.
        local_crops: `(local_crops_number * images, h, h, 3)` uint8, contiguous.
    """

    def __init__(self, global_crops: Tensor, local_crops: Tensor):
        self.groups = (global_crops, local_crops)
        self._images = len(global_crops) // 2
        self._rows = [(crop.permute(2, 0, 1)[None], list(crop.shape[:2])) for group in self.groups for crop in group]

    @classmethod
    def empty(cls, augmentation: DataAugmentationDINO, images: int) -> UintCrops:
        """Room for the crops of some images."""
        large, small = augmentation.global_crops_size, augmentation.local_crops_size
        return cls(
            torch.empty(2 * images, large, large, 3, dtype=torch.uint8),
            torch.empty(augmentation.local_crops_number * images, small, small, 3, dtype=torch.uint8),
        )

    def resize(self, pixels: np.ndarray, crops: np.ndarray, image: int) -> None:
        """Fill the rows of one image; arguments as of `CropRenderer.render`."""
        height, width = pixels.shape[:2]
        source = torch.from_numpy(pixels)
        windows = zip(crops["top"].tolist(), crops["left"].tolist(), crops["height"].tolist(), crops["width"].tolist())
        for view, (top, left, rows, columns) in enumerate(windows):
            out, size = self._rows[view * self._images + image]
            window = source.as_strided(
                (1, 3, rows, columns), (3 * height * width, 1, 3 * width, 3), 3 * (top * width + left)
            )
            _resize_bicubic_antialiased(window, size, False, None, None, out=out)


def _as_bits(crops: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The crops as numpy arrays `(N, 3, H * W)`, as 16-bit words or as float32; the other one has no pixels."""
    flat = crops.detach().flatten(2)
    if crops.dtype == torch.float32:
        return np.empty((1, 3, 0), np.uint16), flat.numpy()
    return flat.view(torch.int16).numpy().view(np.uint16), np.empty((1, 3, 0), np.float32)
