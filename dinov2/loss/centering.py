"""The moving centre that keeps the teacher from always choosing the same prototypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2.distributed import sum_over_ranks


class CenteredTeacherLoss(nn.Module):
    """What the two losses against a teacher share: its centre and the student's temperature.

    The centre is the exponential moving average of the mean teacher logit over the samples of all ranks. A batch
    seen by `update_center` counts from the next call of `apply_center_update` on, which `centered_softmax` makes.

    Args:
        center_shape: shape of the `center` buffer, the prototypes last.
        student_temp: softmax temperature of the student.
        center_momentum: share of the old centre that an update keeps.
    """

    def __init__(self, center_shape: tuple[int, ...], student_temp: float, center_momentum: float):
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(center_shape))
        self._pending_mean: Tensor | None = None

    @torch.no_grad()
    def centered_softmax(self, logits: Tensor, temperature: float) -> Tensor:
        """Softmax over the prototypes of (logits - centre) / temperature, in float32."""
        self.apply_center_update()
        return torch.softmax((logits.float() - self.center) / temperature, dim=-1)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Note the mean of (..., prototypes) logits over all samples of all ranks for the next centre."""
        samples = teacher_output.float().flatten(0, -2)
        total = sum_over_ranks(samples.sum(dim=0))
        count = sum_over_ranks(samples.new_full((), len(samples)))
        self._pending_mean = (total / count.clamp(min=1)).view_as(self.center)

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """Move the centre towards the noted mean, once; a mean that is not finite is passed over."""
        if self._pending_mean is None:
            return
        moved = torch.lerp(self._pending_mean, self.center, self.center_momentum)
        self.center.copy_(torch.where(torch.isfinite(moved).all(), moved, self.center))
        self._pending_mean = None
