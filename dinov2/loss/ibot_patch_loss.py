"""iBOT: the student must tell, at masked patches, what the teacher sees there."""

from __future__ import annotations

from torch import Tensor

from dinov2.distributed import sum_over_ranks
from dinov2.loss.centering import CenteredTeacherLoss
from dinov2.loss.cross_entropy import soft_cross_entropy
from dinov2.loss.sinkhorn import sinkhorn_knopp


class iBOTPatchLoss(CenteredTeacherLoss):
    """Cross-entropy between student and teacher patch tokens at the masked positions.

    Source: Zhou et al., "iBOT: image BERT pre-training with online tokenizer", ICLR 2022, equation 2;
    DINOv2, section 4, "Patch-level objective".
    """

    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9):
        super().__init__((1, 1, patch_out_dim), student_temp, center_momentum)

    def softmax_center_teacher(self, teacher_patch_tokens: Tensor, teacher_temp: float) -> Tensor:
        """Teacher logits (1, patches, patch_out_dim) to probabilities by centring and sharpening."""
        return self.centered_softmax(teacher_patch_tokens, teacher_temp)

    def update_center(self, teacher_patch_tokens: Tensor) -> None:
        """Note the mean of (1, patches, patch_out_dim) logits for the next centre; every patch counts once."""
        super().update_center(teacher_patch_tokens)

    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float, n_masked_patches_tensor: Tensor, n_iterations: int = 3
    ) -> Tensor:
        """Teacher logits (patches, patch_out_dim) to probabilities by Sinkhorn-Knopp over the batch of all ranks.

        Args:
            teacher_output: logits at this rank's masked patches.
            teacher_temp: softmax temperature of the teacher.
            n_masked_patches_tensor: (1,) how many patches this rank has masked.
            n_iterations: normalisations of each kind.
        """
        n_samples = sum_over_ranks(n_masked_patches_tensor.to(teacher_output.device))
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations, n_samples=n_samples)

    def forward(self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor) -> Tensor:
        """Mean over the images of the mean cross-entropy over each one's masked patches.

        Args:
            student_patch_tokens: logits (images, patches, patch_out_dim).
            teacher_patch_tokens: probabilities (images, patches, patch_out_dim).
            student_masks_flat: (images, patches) bool, True where masked.
        """
        loss = soft_cross_entropy(student_patch_tokens, teacher_patch_tokens, self.student_temp)
        return (loss * mask_weights(student_masks_flat)).sum(dim=-1).mean()

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """The same value as `forward`, from the masked patches alone.

        Args:
            student_patch_tokens_masked: logits (rows, patch_out_dim), in the order of the masks; rows past
                `n_masked_patches` are padding and do not count.
            teacher_patch_tokens_masked: probabilities (rows, patch_out_dim).
            student_masks_flat: (images, patches) bool, True where masked.
            n_masked_patches: how many rows count; all of them when not given.
            masks_weight: (masked patches,) 1 / (masked patches of the same image); derived from the masks if not given.
        """
        if masks_weight is None:
            masks_weight = mask_weights(student_masks_flat)[student_masks_flat]
        student, teacher = student_patch_tokens_masked, teacher_patch_tokens_masked
        if n_masked_patches is not None:
            student, teacher = student[:n_masked_patches], teacher[:n_masked_patches]
        loss = soft_cross_entropy(student, teacher, self.student_temp)
        return (loss * masks_weight).sum() / student_masks_flat.shape[0]


def mask_weights(masks: Tensor) -> Tensor:
    """(images, patches) bool to the weight of each patch: 1 / (masked patches of its image), 0 where not masked."""
    return masks / masks.sum(dim=-1, keepdim=True).clamp(min=1)
