"""Where the class token and the registers look: the attention weights of a block over the patches of a cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.eval.features import check_image_size
from dinov2.eval.visualize.figures import GridRow, Panel, draw_grid, overlay_heat

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALE = "attention over the patches, each picture from 0 to its 99.5th percentile"


@dataclass(frozen=True)
class AttentionMaps:
    """Shares of attention that tokens give to the patches.

    Attributes:
        cls: float32 (B, heads, h, w). With what goes to the class token and the registers, a map sums to 1.
        registers: float32 (B, R, heads, h, w).
        block: number of the block, from 0.
    """

    cls: np.ndarray
    registers: np.ndarray
    block: int

    @property
    def tokens(self) -> dict[str, np.ndarray]:
        """Maps (B, heads, h, w) by the name of the token."""
        registers = {f"register {i + 1}": self.registers[:, i] for i in range(self.registers.shape[1])}
        return {"class token": self.cls, **registers}


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor, block: int = -1) -> AttentionMaps:
    """Attention of the class token and each register over the patches, from the model's own queries and keys.

    Args:
        model: a `DinoVisionTransformer`, with any attention backend.
        images: normalised, (B, C, H, W), on the model's device.
        block: number of the block; negative numbers count from the end.

    Raises:
        ValueError: a block that does not exist, or images that the patches do not tile.
    """
    for side in images.shape[-2:]:
        check_image_size(model, side)
    # one image at a time: an attention matrix has the square of the number of tokens, for each head
    rows = [model.get_self_attention(image[None], block) for image in images]
    special = 1 + model.num_register_tokens
    weights = torch.cat([row[:, :, :special, special:] for row in rows]).float().cpu()
    grid = tuple(side // model.patch_size for side in images.shape[-2:])
    weights = weights.unflatten(3, grid).numpy()
    return AttentionMaps(weights[:, :, 0], weights[:, :, 1:].swapaxes(1, 2), block % model.n_blocks)


def to_heat(attention: np.ndarray) -> np.ndarray:
    """A map (h, w) scaled so that 1 is its 99.5th percentile; a few patches must not hide the rest."""
    return attention / max(float(np.percentile(attention, 99.5)), 1e-12)


def plot_attention_heads(image: np.ndarray, maps: AttentionMaps, index: int = 0, *, title: str = "") -> Figure:
    """One cell: a row for the class token and for each register, with the mean over the heads and every head.

    Args:
        image: uint8 (S, S, 3), the image number `index` of the maps.
        maps: of a batch.
        index: which of the batch.
        title: above all; by default the number of the block.
    """
    heads = maps.cls.shape[1]
    rows = []
    for name, attention in maps.tokens.items():
        pictures = [attention[index].mean(axis=0), *attention[index]]
        panels = [Panel(overlay_heat(image, to_heat(p)), f"{100 * p.sum():.0f} % on patches") for p in pictures]
        rows.append(GridRow([Panel(image), *panels], name))
    columns = ["cell", "mean", *(f"head {i + 1}" for i in range(heads))]
    return draw_grid(rows, column_titles=columns, title=title or f"Attention in block {maps.block}", scale=SCALE)


def plot_attention_tokens(
    images: Sequence[np.ndarray], maps: AttentionMaps, *, names: Sequence[str] = (), title: str = ""
) -> Figure:
    """Many cells: a row each, with the mean over the heads for the class token and each register.

    Args:
        images: B images, uint8 (S, S, 3).
        maps: of the same images.
        names: one for each cell.
        title: above all; by default the number of the block.
    """
    if len(images) != len(maps.cls):
        raise ValueError(f"{len(images)} images but attention of {len(maps.cls)}")
    means = {name: attention.mean(axis=1) for name, attention in maps.tokens.items()}
    rows = [
        GridRow(
            [Panel(image), *(Panel(overlay_heat(image, to_heat(mean[i]))) for mean in means.values())],
            names[i] if len(names) else "",
        )
        for i, image in enumerate(images)
    ]
    title = title or f"Attention in block {maps.block}, mean over {maps.cls.shape[1]} heads"
    return draw_grid(rows, column_titles=["cell", *means], title=title, scale=SCALE)
