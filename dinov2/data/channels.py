"""Crops of images that are not 8-bit RGB: one or many channels, 16-bit or float, as microscopes store them.

The same parameters as for RGB, without what has no meaning there: saturation, hue, grayscale and stain. Values are
scaled so that the largest of their type is 255 (floats: so that 1 is) and are not rounded on the way.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels import SOLARIZE_THRESHOLD
from .photometric import blur

_BRIGHTNESS, _CONTRAST = 0, 1  # of the colour steps in `kernels.CROP.order`


class ChannelRenderer:
    """Draws the crops of images into one batch; as `augmentations.CropRenderer`, for any channels and types.

    Args:
        levels: factor and summand per channel that normalise levels of 0..255.
        global_crops: `(2 * images, C, H, H)`.
        local_crops: `(local_crops_number * images, C, h, h)`.
    """

    def __init__(self, levels: tuple[np.ndarray, np.ndarray], global_crops: Tensor, local_crops: Tensor):
        self._scale, self._offset = (torch.from_numpy(values).view(-1, 1, 1) for values in levels)
        self._groups = (global_crops, local_crops)
        self._images = len(global_crops) // 2

    def render(self, pixels: np.ndarray, crops: np.ndarray, image: int) -> None:
        """Fill the rows of one image from its pixels `(H, W, C)` and its crops."""
        source = _levels(pixels)
        low, high = min(0.0, float(source.min())), max(255.0, float(source.max()))
        for view, crop in enumerate(crops):
            group, row = (self._groups[0], view) if view < 2 else (self._groups[1], view - 2)
            x = _window(source, crop, group.shape[-1]).clamp_(low, high)
            x = _colour(_turn(x, crop), crop, low, high)
            group[row * self._images + image] = torch.addcmul(self._offset, x, self._scale).to(group.dtype)


def _levels(pixels: np.ndarray) -> Tensor:
    largest = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "ui" else 1.0
    return torch.from_numpy(pixels.astype(np.float32) * np.float32(255 / largest)).permute(2, 0, 1).contiguous()


def _window(source: Tensor, crop: np.void, size: int) -> Tensor:
    top, left, height, width = (int(crop[name]) for name in ("top", "left", "height", "width"))
    window = source[None, :, top : top + height, left : left + width]
    return F.interpolate(window, (size, size), mode="bicubic", antialias=True)[0]


def _turn(x: Tensor, crop: np.void) -> Tensor:
    if crop["horizontal_flip"]:
        x = x.flip(2)
    if crop["vertical_flip"]:
        x = x.flip(1)
    return x.rot90(int(crop["turns"]), (1, 2))


def _colour(x: Tensor, crop: np.void, low: float, high: float) -> Tensor:
    """Brightness and contrast (towards the mean of each channel) in the order drawn, blur, solarisation."""
    for step in crop["order"] if crop["jitter"] else ():
        if step == _BRIGHTNESS:
            x = (x * float(crop["brightness"])).clamp_(low, high)
        elif step == _CONTRAST:
            mean = x.mean((1, 2), keepdim=True)
            x = (mean + (x - mean) * float(crop["contrast"])).clamp_(low, high)
    if crop["sigma"] > 0:
        x = blur(x[None], crop["sigma"][None])[0]
    return torch.where(x >= SOLARIZE_THRESHOLD, 255 - x, x) if crop["solarize"] else x
