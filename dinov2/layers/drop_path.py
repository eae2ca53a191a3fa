"""Stochastic depth per image."""

from __future__ import annotations

from torch import Tensor, nn


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False) -> Tensor:
    """Zero each image of `x` (first dimension) with probability `drop_prob`; scale the others by 1 / (1 - drop_prob).

    Source: Huang et al., "Deep networks with stochastic depth", ECCV 2016.
    """
    if drop_prob == 0.0 or not training:
        return x
    keep = 1.0 - drop_prob
    kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    return x * (kept / keep if keep > 0.0 else kept)


class DropPath(nn.Module):
    """`drop_path` as a module, active in training only."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob or 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Drop whole images of `x`."""
        return drop_path(x, self.drop_prob, self.training)

    def extra_repr(self) -> str:
        """The rate, for printing."""
        return f"drop_prob={self.drop_prob}"
