"""Gated feed-forward networks: `w3(silu(w1 x) * w2 x)`.

Source: Shazeer, "GLU variants improve transformer", 2020.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


def two_thirds(hidden_features: int, align_to: int = 8) -> int:
    """Two thirds of a width, rounded up to a multiple of `align_to`: three matrices then cost what an MLP's two do."""
    width = int(hidden_features * 2 / 3)
    return width + -width % align_to


class SwiGLUFFN(nn.Module):
    """SwiGLU with both input projections in one matrix `w12`; `act_layer` and `drop` are accepted, and not used."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.w12 = nn.Linear(in_features, 2 * hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class SwiGLUFFNFused(SwiGLUFFN):
    """`SwiGLUFFN` with two thirds of the hidden width, a multiple of 8: the FFN of DINOv2's giant model."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__(in_features, two_thirds(hidden_features or in_features), out_features, bias=bias)


class SwiGLUFFNAligned(nn.Module):
    """`SwiGLUFFNFused` with separate input projections and a chosen alignment of the hidden width."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
        align_to: int = 8,
    ) -> None:
        super().__init__()
        hidden_features = two_thirds(hidden_features or in_features, align_to)
        self.w1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.w2 = nn.Linear(in_features, hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))
