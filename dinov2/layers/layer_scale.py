"""A learned factor per channel on each residual branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """Multiply channel `c` of the last dimension by `gamma[c]`, which starts at `init_values`.

    Source: Touvron et al., "Going deeper with image transformers", ICCV 2021.
    """

    def __init__(self, dim: int, init_values: float = 1e-5, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor back to `init_values`."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        """Scale `(..., dim)`."""
        return x.mul_(self.gamma) if self.inplace else x * self.gamma
