"""Crops of several sizes as one token matrix, so that every linear layer runs once and nothing is padded.

A `Layout` says how the rows of a packed `(tokens, dim)` matrix are grouped: one `(images, tokens per image)` pair per
list of crops. It holds plain integers, so `torch.compile` sees it as a constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Layout = tuple[tuple[int, int], ...]


def pack(crops: Sequence[Tensor]) -> tuple[Tensor, Layout]:
    """Join crops `(images, tokens, dim)` of different sizes into one `(total tokens, dim)` matrix and its layout."""
    layout = tuple((crop.shape[0], crop.shape[1]) for crop in crops)
    rows = [crop.flatten(0, 1) for crop in crops]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)), layout


def unpack(tokens: Tensor, layout: Layout) -> list[Tensor]:
    """Split packed rows `(total tokens, ...)` into views `(images, tokens, ...)`, one per entry of the layout."""
    if len(layout) == 1:
        return [tokens.unflatten(0, layout[0])]
    parts = tokens.split([images * length for images, length in layout])
    return [part.unflatten(0, group) for part, group in zip(parts, layout)]


def merge_equal_lengths(layout: Layout) -> Layout:
    """Join neighbouring groups whose images have the same number of tokens."""
    merged: list[tuple[int, int]] = []
    for images, length in layout:
        if merged and merged[-1][1] == length:
            images += merged.pop()[0]
        merged.append((images, length))
    return tuple(merged)


def sequence_offsets(layout: Layout, device: torch.device) -> Tensor:
    """First row of every image, and the number of rows: int32 `(images + 1,)`, computed on the device (no copy)."""
    parts, start = [], 0
    for images, length in layout:
        parts.append(torch.arange(images, device=device, dtype=torch.int32) * length + start)
        start += images * length
    parts.append(torch.full((1,), start, device=device, dtype=torch.int32))
    return torch.cat(parts)
