"""Gram anchoring: which patches of an image look alike should stay as it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GramLoss(nn.Module):
    """Mean squared difference between the patch similarities of a student and of an earlier teacher.

    Source: Siméoni et al., "DINOv3", 2025, section 4, "Gram anchoring": the features may move, as long as the structure
    of their similarities stays.
    """

    def forward(self, student_patches: Tensor, teacher_patches: Tensor) -> Tensor:
        """Mean over images and pairs of patches, in float32, of the squared difference of their cosine similarities.

        Args:
            student_patches: (images, patches, dim) features, not normalised.
            teacher_patches: (images, patches, any dim) of the same crops; gets no gradient.
        """
        with torch.autocast(student_patches.device.type, enabled=False):
            return F.mse_loss(_similarities(student_patches), _similarities(teacher_patches.detach()))


def _similarities(patches: Tensor) -> Tensor:
    unit = F.normalize(patches.float(), dim=-1)
    return unit @ unit.transpose(-1, -2)
