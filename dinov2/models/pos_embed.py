"""Position embeddings for image sizes that a model was not built for."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize_grid(grid: Tensor, size: tuple[int, int], *, antialias: bool = False, offset: float | None = None) -> Tensor:
    """Resize patch positions from one grid to another, bicubic, in float32.

    Args:
        grid: positions `(1, rows, columns, dim)`.
        size: rows and columns wanted.
        antialias: low-pass filter when the grid shrinks.
        offset: DINOv2's models were trained with scale factors of `(wanted + 0.1) / old` in place of `wanted / old`, a
            rounding guard that shifts the sampling points a little; their weights expect it. None or 0: the exact size.

    Returns:
        `(1, wanted rows, wanted columns, dim)` in the dtype of `grid`.
    """
    old = grid.shape[1:3]
    channels_first = grid.float().permute(0, 3, 1, 2)
    if offset:
        factors = tuple((wanted + offset) / had for wanted, had in zip(size, old))
        resized = F.interpolate(channels_first, scale_factor=factors, mode="bicubic", antialias=antialias)
    else:
        resized = F.interpolate(channels_first, size=size, mode="bicubic", antialias=antialias)
    if tuple(resized.shape[-2:]) != tuple(size):
        raise ValueError(
            f"interpolate_offset={offset} turns a {old[0]}x{old[1]} grid into {tuple(resized.shape[-2:])}, not {size}"
        )
    return resized.permute(0, 2, 3, 1).to(grid.dtype)
