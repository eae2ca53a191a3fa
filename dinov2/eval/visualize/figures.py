"""What all pictures share: colours, grids of images, colour maps laid over images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from dinov2.eval.report import PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # a second way to tell groups apart, when the colours are used up
HEAT = "inferno"  # from dark to light in every kind of colour vision
CHARACTER = 0.075  # width of a letter of 9 points, inches


class MissingExtra(ImportError, ValueError):
    """A library that the base install does without; the message names the extra to install."""

    def __init__(self, library: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs {library}: pip install 'dinov2[{extra}]'")


def group_styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour (Okabe and Ito's) and a marker for each name, every pair different for up to 56 names."""
    return {name: (PALETTE[i % 8], MARKERS[i // 8 % len(MARKERS)]) for i, name in enumerate(names)}


def square(image: np.ndarray, size: int) -> np.ndarray:
    """The middle of an image, uint8 (H, W, 3), as (size, size, 3)."""
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    image = image[top : top + side, left : left + side]
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_CUBIC)


def enlarge(values: np.ndarray, shape: tuple[int, int], smooth: bool = False) -> np.ndarray:
    """Values of patches (h, w) or (h, w, C) at the resolution of the image."""
    how = cv2.INTER_CUBIC if smooth else cv2.INTER_NEAREST
    return cv2.resize(np.asarray(values, np.float32), (shape[1], shape[0]), interpolation=how)


def overlay_heat(image: np.ndarray, heat: np.ndarray, strength: float = 0.75) -> np.ndarray:
    """An image, grey and darkened, with a colour map over it that is the more opaque the larger the value.

    Args:
        image: uint8 (H, W, 3).
        heat: (h, w), shown from 0 to 1.
        strength: opacity at 1.

    Returns:
        float32 RGB (H, W, 3) in 0..1.
    """
    from matplotlib import colormaps

    heat = np.clip(enlarge(heat, image.shape[:2], smooth=True), 0, 1)
    opacity = strength * heat[..., None]
    base = 0.6 * (image.mean(axis=2, keepdims=True) / 255.0)
    return ((1 - opacity) * base + opacity * colormaps[HEAT](heat)[..., :3]).astype(np.float32)


@dataclass(frozen=True)
class Panel:
    """One picture of a grid: uint8 or 0..1 floats (H, W, 3) or (H, W), a line of text below, a coloured frame."""

    image: np.ndarray
    caption: str = ""
    frame: str | None = None


@dataclass(frozen=True)
class GridRow:
    """One row of a grid, with the text to its left."""

    panels: Sequence[Panel]
    label: str = ""


@dataclass
class _Layout:
    """Sizes of a grid in inches, so that nothing can overlap."""

    rows: Sequence[GridRow]
    column_titles: Sequence[str]
    title: str
    panel: float
    scale: str
    gap: float = 0.06
    columns: int = field(init=False)

    def __post_init__(self) -> None:
        self.columns = max(len(row.panels) for row in self.rows)
        self.labels = ["\n".join(textwrap.wrap(row.label.replace("_", " "), 16)) for row in self.rows]
        longest = max((len(line) for label in self.labels for line in label.split("\n")), default=0)
        self.left = 0.1 + (longest * CHARACTER + 0.08 if longest else 0)
        self.caption = 0.2 if any(p.caption for row in self.rows for p in row.panels) else 0.0
        self.head = 0.24 if any(self.column_titles) else 0.0
        width = self.columns * (self.panel + self.gap)
        self.title_lines = textwrap.wrap(self.title, max(20, int((self.left + width) / CHARACTER)))
        self.top = 0.1 + 0.2 * len(self.title_lines) + (0.06 if self.title_lines else 0)
        self.width = self.left + width + 0.1
        self.bar = min(1.6, 0.4 * self.width)
        beside = max(14, int((self.width - self.left - self.bar - 0.2) / 0.065))
        self.scale_lines = textwrap.wrap(self.scale, beside)
        self.foot = max(0.5, 0.2 + 0.13 * len(self.scale_lines)) if self.scale else 0.1
        self.height = self.top + self.head + len(self.rows) * (self.panel + self.caption + self.gap) + self.foot

    def place(self, row: int, column: int) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of a panel as shares of the figure."""
        x = self.left + column * (self.panel + self.gap)
        y = self.height - self.top - self.head - row * (self.panel + self.caption + self.gap) - self.panel
        return x / self.width, y / self.height, self.panel / self.width, self.panel / self.height


def draw_grid(
    rows: Sequence[GridRow],
    *,
    column_titles: Sequence[str] = (),
    title: str = "",
    panel: float = 1.35,
    scale: str = "",
) -> Figure:
    """Rows of pictures of equal size, labelled on the left, above and below without overlaps.

    Args:
        rows: a row may be shorter than the others.
        column_titles: above the columns.
        title: above all.
        panel: side of a picture, inches.
        scale: what the colours of `overlay_heat` mean; adds a bar below.
    """
    from matplotlib.figure import Figure

    layout = _Layout(rows, column_titles, title, panel, scale)
    figure = Figure(figsize=(layout.width, layout.height), facecolor="white")
    if layout.title_lines:
        text = "\n".join(layout.title_lines)
        figure.text(0.1 / layout.width, 1 - 0.08 / layout.height, text, fontsize=10.5, va="top", weight="bold")
    letters = int(panel / 0.06)
    for i, row in enumerate(rows):
        for j, item in enumerate(row.panels):
            box = layout.place(i, j)
            _draw_panel(figure.add_axes(box), item, letters)
            if i == 0 and j < len(column_titles):
                name = textwrap.shorten(column_titles[j], letters, placeholder="…")
                figure.text(
                    box[0] + box[2] / 2, box[1] + box[3] + 0.05 / layout.height, name, fontsize=8.5, ha="center"
                )
        if row.label:
            y = layout.place(i, 0)[1] + panel / layout.height / 2
            figure.text((layout.left - 0.08) / layout.width, y, layout.labels[i], fontsize=9, ha="right", va="center")
    if scale:
        _draw_scale(figure, layout)
    return figure


def _draw_panel(axes: Any, item: Panel, letters: int) -> None:
    axes.imshow(item.image, cmap="gray", vmin=0, vmax=1 if item.image.dtype != np.uint8 else 255)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=item.frame is not None, color=item.frame, linewidth=2.5)
    if item.caption:
        text = item.caption.replace("_", " ")
        text = text if len(text) <= letters else text[: letters - 1] + "…"
        axes.set_xlabel(text, fontsize=7.5, labelpad=3 if item.frame is None else 4)


def _draw_scale(figure: Figure, layout: _Layout) -> None:
    """The colour bar at the foot of the figure, and what it means to its right."""
    middle = layout.foot / 2 + 0.05
    box = (
        layout.left / layout.width,
        (middle - 0.05) / layout.height,
        layout.bar / layout.width,
        0.1 / layout.height,
    )
    axes = figure.add_axes(box)
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=HEAT, aspect="auto", extent=(0, 1, 0, 1))
    axes.set(yticks=[])
    axes.set_xticks([0, 1], ["0", "1"], fontsize=7)
    axes.tick_params(length=2, pad=1)
    x = (layout.left + layout.bar + 0.12) / layout.width
    figure.text(x, middle / layout.height, "\n".join(layout.scale_lines), fontsize=7.5, va="center")


def save(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure; the suffix chooses the format (.png, .pdf, .svg …).

    Raises:
        ValueError: a suffix that matplotlib does not know.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return path
