"""Names and addresses of released models, and padding to whole patches."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.models.released import BASE_URL as _DINOV2_BASE_URL
from dinov2.models.released import model_name as _make_dinov2_model_name

__all__ = ["_DINOV2_BASE_URL", "CenterPadding", "_make_dinov2_model_name"]


class CenterPadding(nn.Module):
    """Pad images with zeros on all sides until both sides are multiples of a number."""

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.multiple = multiple

    def forward(self, x: Tensor) -> Tensor:
        """Pad `(..., H, W)`."""
        padding = []
        for size in reversed(x.shape[-2:]):  # F.pad starts at the last dimension
            missing = -size % self.multiple
            padding += [missing // 2, missing - missing // 2]
        return F.pad(x, padding)
