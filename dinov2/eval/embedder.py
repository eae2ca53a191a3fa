"""A backbone that takes images as they come: `dinov2.load(weights).embed(images)`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.data.decode import decode_channels, decode_rgb, pillow_to_channels, pillow_to_rgb, read_bytes
from dinov2.eval.features import extract
from dinov2.eval.setup import training_view
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import build_from_weights
from dinov2.utils.dtype import as_torch_dtype

AnImage = str | os.PathLike | Image.Image | np.ndarray | Tensor


class Embedder(DinoVisionTransformer):
    """A backbone with what its weights file says of the images that it learned from.

    Attributes:
        mean: of the training images, per channel, scaled to 0..1.
        std: likewise.
        image_size: side of the square that `embed` shows to the model, pixels: that of the training's global crops; 224
            where the file does not tell.
    """

    mean, std, image_size = training_view({})

    def embed(
        self,
        images: AnImage | Iterable[AnImage],
        *,
        features: str = "cls",
        image_size: int | None = None,
        batch_size: int = 64,
        dtype: str | torch.dtype = torch.float32,
    ) -> np.ndarray:
        """Features float32 (N, D) of one image or of several, in their order: what `dinov2 embed` writes for the files.

        Args:
            images: paths, PIL images, arrays (H, W, C) or (H, W), tensors (C, H, W), a list of any of these, or a batch
                as one array (N, H, W, C) or tensor (N, C, H, W). Integers count from 0 to their type's largest value,
                floats from 0 to 1; normalising is done here.
            features: "cls", "patch_mean", "registers", "patches" or several joined by "+", side by side.
            image_size: another side than the model's own `image_size`, pixels.
            batch_size: images per forward pass.
            dtype: precision of the forward pass: "fp32", "bf16", "fp16" or torch's.

        Raises:
            ValueError: an image that cannot be read or has other channels than the model, floats beyond 0 to 1, unknown
                features, or a size that the patches do not tile.
        """
        table = extract(
            self,
            Images(images, self.in_chans),
            features=features,
            image_size=image_size or self.image_size,
            batch_size=batch_size,
            dtype=as_torch_dtype(dtype),
            mean=self.mean,
            std=self.std,
        )
        return table.features


def load_embedder(
    source: str | Path, *, device: str | torch.device = "cpu", checkpoint_key: str | None = None, **options: Any
) -> Embedder:
    """The model that weights belong to, with `embed`; arguments and errors as `dinov2.hub.backbones.load_backbone`."""
    model, run = build_from_weights(source, checkpoint_key, kind=Embedder, **options)
    model.mean, model.std, model.image_size = training_view(run)
    return model.to(device).eval().requires_grad_(False)


class Images:
    """Images as a data set for `extract`; see `Embedder.embed`."""

    def __init__(self, images: AnImage | Iterable[AnImage], in_chans: int = 3):
        self.items, self.in_chans = as_list(images), in_chans

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"{len(self)} images"

    def read(self, row: int) -> np.ndarray:
        """Image of a row, (H, W, C)."""
        try:
            return as_array(self.items[row], self.in_chans)
        except ValueError as error:  # not as UnreadableImage: `extract` would leave the row out
            raise ValueError(f"image {row}: {error}") from error


def as_list(images: AnImage | Iterable[AnImage]) -> list[AnImage]:
    """One image, a batch in one array or tensor, or many images, as a list of images."""
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images]
    if isinstance(images, (np.ndarray, Tensor)):
        return [images] if images.ndim < 4 else list(images)
    return list(images)


def as_array(image: AnImage, in_chans: int) -> np.ndarray:
    """Any kind of image as (H, W, in_chans); gray images get three channels where the model takes three.

    Raises:
        TypeError: not an image.
        ValueError: unreadable, of another shape, or floats beyond 0 to 1.
    """
    rgb = in_chans == 3
    if isinstance(image, (str, os.PathLike)):
        data = read_bytes(image)
        return decode_rgb(data, path=image) if rgb else decode_channels(data, path=image, channels=in_chans)
    if isinstance(image, Image.Image):
        pixels = pillow_to_rgb(image) if rgb else pillow_to_channels(image)
    elif isinstance(image, Tensor):
        values = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
        pixels = np.moveaxis(values, 0, -1) if values.ndim == 3 else values
    elif isinstance(image, np.ndarray):
        pixels = image
    else:
        raise TypeError(f"a {type(image).__name__} is no image; give paths, PIL images, arrays or tensors")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if rgb and pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    if pixels.ndim != 3 or pixels.shape[2] != in_chans or 0 in pixels.shape:
        raise ValueError(
            f"of shape {tuple(image.size if isinstance(image, Image.Image) else image.shape)}; the model takes "
            f"{in_chans} channels: arrays (height, width, {in_chans}), tensors ({in_chans}, height, width)"
        )
    if pixels.dtype.kind == "f" and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(
            f"floats from {pixels.min():.3g} to {pixels.max():.3g}; `embed` takes 0 to 1 and normalises itself "
            "(normalised images go through model(images))"
        )
    return pixels
