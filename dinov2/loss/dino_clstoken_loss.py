"""DINO: the student's class tokens must tell what the teacher's do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov2.loss.centering import CenteredTeacherLoss
from dinov2.loss.cross_entropy import soft_cross_entropy
from dinov2.loss.sinkhorn import sinkhorn_knopp


class DINOLoss(CenteredTeacherLoss):
    """Cross-entropy between student and teacher class tokens over `out_dim` prototypes.

    Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, equation 3;
    DINOv2, section 4, "Image-level objective".
    """

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9):
        super().__init__((1, out_dim), student_temp, center_momentum)

    def softmax_center_teacher(self, teacher_output: Tensor, teacher_temp: float) -> Tensor:
        """Teacher logits (..., out_dim) to probabilities by centring and sharpening."""
        return self.centered_softmax(teacher_output, teacher_temp)

    def sinkhorn_knopp_teacher(self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3) -> Tensor:
        """Teacher logits (samples, out_dim) to probabilities by Sinkhorn-Knopp over the batch of all ranks."""
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    def forward(
        self, student_output_list: Sequence[Tensor], teacher_out_softmaxed_centered_list: Sequence[Tensor]
    ) -> Tensor:
        """Sum, over every pair of a student and a teacher view, of the batch mean of their cross-entropy.

        Args:
            student_output_list: logits (batch, out_dim), one tensor a student view.
            teacher_out_softmaxed_centered_list: probabilities (batch, out_dim), one tensor a teacher view.
        """
        # A student view meets every teacher here, and the cross-entropy is linear in the targets.
        targets = torch.stack(tuple(teacher_out_softmaxed_centered_list)).float().sum(dim=0)
        return sum(soft_cross_entropy(logits, targets, self.student_temp).mean() for logits in student_output_list)
