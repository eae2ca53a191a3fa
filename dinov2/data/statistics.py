"""Mean and standard deviation per channel: what `augmentations.mean` and `.std` of a config should say."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np

from .decode import UnreadableImage

_CHUNK = 256  # images in flight


class ChannelStatistics(NamedTuple):
    """Per channel, of images scaled to 0..1; `str()` gives the lines for a config."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    unreadable: int

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (self.mean, self.std))
        return f"augmentations:\n  mean: [{mean}]\n  std: [{std}]"


def image_moments(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (mean, mean of squares) per channel of an image (height, width, channels).

    Unsigned integers are scaled by their type's largest value to 0..1; floats count as they are.
    """
    if image.shape[2] <= 4 and image.dtype in (np.uint8, np.uint16, np.float32):  # what OpenCV does, ten times faster
        mean, deviation = (values.ravel() for values in cv2.meanStdDev(image))
    else:
        mean, deviation = image.mean((0, 1), dtype=np.float64), image.std((0, 1), dtype=np.float64)
    largest = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1.0
    return mean / largest, (mean**2 + deviation**2) / largest**2


def combine_moments(means: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation per channel over images, each of equal weight whatever its size.

    Args:
        means: (images, channels), from `image_moments`.
        squares: (images, channels).
    """
    mean = np.mean(means, axis=0, dtype=np.float64)
    return mean, np.sqrt(np.maximum(np.mean(squares, axis=0, dtype=np.float64) - mean**2, 0))


def channel_statistics(
    dataset: Any, *, max_images: int | None = 20_000, num_workers: int = 2, seed: int = 0
) -> ChannelStatistics:
    """Measure mean and standard deviation per channel of the pixels of a data set.

    Args:
        dataset: has `read(index)`, as ImageDataset and LabelledDataset do.
        max_images: images drawn without replacement; None reads all.
        num_workers: threads (decoders work without Python's lock).
        seed: of the draw.

    Raises:
        ValueError: no image could be read.
    """
    positions = np.arange(len(dataset))
    if max_images is not None and max_images < len(positions):
        positions = np.sort(np.random.default_rng(seed).choice(positions, max_images, replace=False))

    def moments(position: int) -> tuple[np.ndarray, np.ndarray] | None:
        try:
            return image_moments(dataset.read(int(position)))
        except UnreadableImage:
            return None

    found: list[tuple[np.ndarray, np.ndarray]] = []
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        for start in range(0, len(positions), _CHUNK):
            found += [pair for pair in pool.map(moments, positions[start : start + _CHUNK]) if pair is not None]
    if not found:
        raise ValueError(f"none of {len(positions)} images could be read; `dinov2 check` says why")
    mean, std = combine_moments(*(np.stack(values) for values in zip(*found)))
    return ChannelStatistics(tuple(mean.tolist()), tuple(std.tolist()), len(found), len(positions) - len(found))
