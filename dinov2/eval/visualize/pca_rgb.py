"""The three widest directions of the patch tokens as red, green and blue: parts of cells that the model finds alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dinov2.eval.visualize.figures import GridRow, Panel, draw_grid, enlarge

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PatchColours:
    """Patches as colours.

    Attributes:
        rgb: float32 (N, h, w, 3) in 0..1.
        foreground: bool (N, h, w).
        score: float32 (N, h, w), the first component that the foreground is cut from; larger is more foreground.
    """

    rgb: np.ndarray
    foreground: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class PatchPCA:
    """A basis shared by all images it was fitted on, so that equal colours mean equal features.

    The first component of all patches separates foreground and background; it points to the middle of the images,
    where the cell is. The colours are the first three components of the foreground alone. The largest weight of each is
    positive, which fixes its sign.
    """

    mean: np.ndarray  # (D,) of all patches
    first: np.ndarray  # (D,)
    threshold: float
    colour_mean: np.ndarray  # (D,) of the foreground
    colours: np.ndarray  # (3, D)
    low: np.ndarray  # (3,) shown as 0
    high: np.ndarray  # (3,) shown as 1

    def transform(self, tokens: np.ndarray) -> PatchColours:
        """Colours of patch tokens (N, h, w, D), of these or of other images and resolutions."""
        tokens = np.asarray(tokens, np.float32)
        score = (tokens - self.mean) @ self.first
        values = (tokens - self.colour_mean) @ self.colours.T
        rgb = np.clip((values - self.low) / np.maximum(self.high - self.low, 1e-6), 0, 1)
        return PatchColours(rgb.astype(np.float32), score > self.threshold, score.astype(np.float32))


def fit_patch_pca(tokens: np.ndarray, threshold: float | None = None) -> PatchPCA:
    """Fit the shared basis to the patch tokens of a batch.

    Args:
        tokens: (N, h, w, D), normalised patch tokens.
        threshold: on the first component, in its standard deviations; by default Otsu's, which splits the patches
            into the two most compact groups.

    Raises:
        ValueError: not four axes, fewer than four patches, values that are not finite, or a threshold that leaves
            fewer than four foreground patches.

    Source: Oquab et al., "DINOv2", 2023, section 7.5 (PCA of patch features).
    """
    tokens = np.asarray(tokens, np.float32)
    if tokens.ndim != 4 or tokens.shape[0] * tokens.shape[1] * tokens.shape[2] < 4:
        raise ValueError(
            f"expected patch tokens (images, rows, columns, width) of 4 patches or more, got {tokens.shape}"
        )
    if not np.isfinite(tokens).all():
        raise ValueError("some patch tokens are not finite")
    patches = tokens.reshape(-1, tokens.shape[-1])
    mean = patches.mean(axis=0)
    first = _components(patches - mean, 1)[0]
    first = first * _towards_centre((tokens - mean) @ first)
    score = (patches - mean) @ first
    cut = _otsu(score) if threshold is None else threshold * float(score.std())
    foreground = patches[score > cut]
    if len(foreground) < 4:
        raise ValueError(
            f"{len(foreground)} patches are foreground and 4 are needed; give more images, a larger image size "
            f"or a lower threshold than {'that by Otsu' if threshold is None else threshold}"
        )
    colour_mean = foreground.mean(axis=0)
    colours = _components(foreground - colour_mean, 3)
    largest = np.take_along_axis(colours, np.abs(colours).argmax(axis=1)[:, None], axis=1)
    colours = colours * np.where(largest < 0, -1, 1)
    values = (foreground - colour_mean) @ colours.T
    low, high = np.percentile(values, [1, 99], axis=0)  # a few outlier patches must not take the contrast of all
    return PatchPCA(mean, first, cut, colour_mean, colours, low.astype(np.float32), high.astype(np.float32))


def _components(centred: np.ndarray, count: int) -> np.ndarray:
    """The widest directions (count, D), widest first; zeros where there are fewer dimensions."""
    covariance = centred.T.astype(np.float64) @ centred / len(centred)
    _, vectors = np.linalg.eigh(covariance)
    found = vectors[:, ::-1][:, :count].T
    return np.pad(found, ((0, count - len(found)), (0, 0))).astype(np.float32)


def _towards_centre(score: np.ndarray) -> float:
    """1 if the middle half of the images (N, h, w) scores higher than their rim, else -1."""
    height, width = score.shape[1:]
    inner = np.zeros((height, width), bool)
    inner[height // 4 : -(height // 4) or None, width // 4 : -(width // 4) or None] = True
    if inner.all():
        return 1.0
    return 1.0 if score[:, inner].mean() >= score[:, ~inner].mean() else -1.0


def _otsu(values: np.ndarray) -> float:
    """The cut that minimises the variance within the two groups. Source: Otsu, 1979."""
    ordered = np.sort(values.astype(np.float64))
    count = np.arange(1, len(ordered))
    below = np.cumsum(ordered)[:-1]
    between = (below / count - (ordered.sum() - below) / (len(ordered) - count)) ** 2 * count * (len(ordered) - count)
    best = int(between.argmax())
    return float((ordered[best] + ordered[best + 1]) / 2)


def plot_pca(
    images: Sequence[np.ndarray],
    colours: PatchColours,
    *,
    names: Sequence[str] = (),
    title: str = "",
    smooth: bool = False,
) -> Figure:
    """A row of cells, below it their foreground masks, the colours of the foreground, and these laid over the cells.

    Args:
        images: N images, uint8 (S, S, 3), as the model saw them.
        colours: of the same N images.
        names: one above each cell.
        title: above all.
        smooth: blend between patches instead of showing them as squares.
    """
    if len(images) != len(colours.rgb):
        raise ValueError(f"{len(images)} images but colours of {len(colours.rgb)}")
    cells, masks, masked, over = [], [], [], []
    for image, rgb, foreground in zip(images, colours.rgb, colours.foreground):
        shape = image.shape[:2]
        mask = enlarge(foreground, shape, smooth)
        mask = np.clip(mask, 0, 1)[..., None]
        colour = np.clip(enlarge(rgb, shape, smooth), 0, 1)
        cells.append(Panel(image))
        masks.append(Panel(np.repeat(mask, 3, axis=2)))
        masked.append(Panel(mask * colour))
        over.append(Panel((1 - 0.6 * mask) * (image / 255.0) + 0.6 * mask * colour))
    rows = [
        GridRow(cells, "cell"),
        GridRow(masks, "foreground"),
        GridRow(masked, "PCA as RGB"),
        GridRow(over, "overlay"),
    ]
    return draw_grid(rows, column_titles=[name.replace("_", " ") for name in names], title=title)
