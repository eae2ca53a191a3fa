"""The rest of the augmentation on the training device: flips, colour, blur, normalisation of a whole batch at once.

With `train.augment_on: device` the workers only decode, crop and resize to uint8; the parameters of each crop travel
with the batch. The steps and their rounding are those of `kernels.py`, so that both ways give the same pictures. Which
crops a step applies to is known on the host, so nothing here waits for the device.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import kernels


def finish_crops(
    pixels: Tensor,
    crops: np.ndarray,
    levels: tuple[np.ndarray, np.ndarray],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Flip, colour, blur, normalise and cast resized crops.

    Args:
        pixels: `(n, size, size, 3)` uint8, on the training device.
        crops: `(n,)` of `kernels.CROP`, on the host.
        levels: factor and summand per channel that normalise levels of 0..255.
        dtype: of the result.

    Returns:
        `(n, 3, size, size)`, contiguous.
    """
    if not len(crops):
        return pixels.new_empty((0, 3, *pixels.shape[1:3]), dtype=dtype)
    x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    for name, axes in (("horizontal_flip", (3,)), ("vertical_flip", (2,))):
        _replace(x, crops[name], lambda part, _, axes=axes: part.flip(axes))
    for turns in (1, 2, 3):
        _replace(x, crops["turns"] == turns, lambda part, _, turns=turns: part.rot90(turns, (2, 3)))
    stained = (crops["stain"] != 1).any(1)
    _replace(x, stained, lambda part, which: _stain(part, crops["stain"][which]))
    for step in range(4):
        for operation, (name, apply) in enumerate(_COLOUR_STEPS):
            chosen = crops["jitter"] & (crops["order"][:, step] == operation)
            _replace(
                x, chosen, lambda part, which, name=name, apply=apply: apply(part, _column(part, crops[name][which]))
            )
    _replace(x, crops["grayscale"], lambda part, _: _luma(part).expand_as(part))
    _replace(x, crops["sigma"] > 0, lambda part, which: (blur(part, crops["sigma"][which]) + 0.5).floor_())
    _replace(x, crops["solarize"], lambda part, _: torch.where(part >= kernels.SOLARIZE_THRESHOLD, 255 - part, part))
    scale, offset = (torch.from_numpy(values).to(x.device).view(1, 3, 1, 1) for values in levels)
    return torch.addcmul(offset, x, scale).to(dtype)


def _replace(x: Tensor, chosen: np.ndarray, change) -> None:
    """Replace the chosen crops by what `change` makes of them and their numbers."""
    which = np.flatnonzero(chosen)
    if len(which):
        indices = torch.from_numpy(which).to(x.device, non_blocking=True)
        x.index_copy_(0, indices, change(x.index_select(0, indices), which))


def _column(x: Tensor, values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(x.device, non_blocking=True).view(-1, 1, 1, 1)


def _level(x: Tensor) -> Tensor:
    return x.clamp_(0, 255).floor_()


def _luma(x: Tensor) -> Tensor:
    red, green, blue = x.split(1, dim=1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) / 65536).floor_()


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _level(x * factor)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = (_luma(x).double().mean((1, 2, 3), keepdim=True) + 0.5).floor().float()
    return _level(torch.addcmul(mean, factor, x - mean))


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    luma = _luma(x)
    return _level(torch.addcmul(luma, factor, x - luma))


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    red, green, blue = x.split(1, dim=1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    some_chroma = chroma.clamp(min=1)
    sector = torch.where(
        red == value,
        green - blue,
        torch.where(green == value, 2 * some_chroma + blue - red, 4 * some_chroma + red - green),
    )
    sector = torch.where(sector < 0, sector + 6 * some_chroma, sector)
    hue = (sector / some_chroma * (255 / 6) + 1e-3).floor_() + (turn * 255).trunc()
    hue = hue.remainder_(256) * (6 / 255)
    reach = value * (255 * chroma / value.clamp(min=1) + 1e-3).floor_() / 255
    shares = torch.cat([2 - (hue - 3).abs(), (hue - 2).abs() - 1, (hue - 4).abs() - 1], dim=1).clamp_(0, 1)
    return (value + 0.5 - reach * shares).floor_()


_COLOUR_STEPS = (
    ("brightness", _brightness),
    ("contrast", _contrast),
    ("saturation", _saturation),
    ("hue", _hue),
)


def _stain(x: Tensor, factors: np.ndarray) -> Tensor:
    unmix, basis = kernels.STAINS_OF_RGB_DENSITY, kernels.RGB_DENSITY_OF_STAINS
    matrices = np.einsum("is,ns,sj->nji", unmix, factors, basis).astype(np.float32)
    densities = ((x + 1) / 256).log2_().flatten(2)
    mixed = torch.bmm(torch.from_numpy(matrices).to(x.device), densities).clamp_(min=-20)
    return _level((mixed + 8).exp2_() - 0.5).view_as(x)


def blur(x: Tensor, sigmas: np.ndarray) -> Tensor:
    """Blur each crop of `(n, C, H, W)` with its own 9-tap Gaussian, mirrored at the border; does not round."""
    radius = kernels.BLUR_RADIUS
    distances = np.arange(-radius, radius + 1)
    taps = np.exp(-0.5 * (distances / sigmas[:, None].astype(np.float64)) ** 2)
    taps = (taps / taps.sum(1, keepdims=True)).astype(np.float32)
    for axis, padding in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        size = x.shape[axis]
        padded = F.pad(x, padding, mode="reflect")
        x = torch.zeros_like(x)
        for k in range(2 * radius + 1):
            x.addcmul_(padded.narrow(axis, k, size), _column(x, taps[:, k]))
    return x
