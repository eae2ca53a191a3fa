"""Sinkhorn-Knopp: teacher logits to a balanced soft assignment, one routine for class tokens and patches."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2.distributed import sum_over_ranks


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor, temperature: float, n_iterations: int = 3, n_samples: Tensor | int | None = None
) -> Tensor:
    """Assign samples to prototypes so that, over the batch of all ranks, every prototype gets an equal share.

    Alternately normalises the columns (prototypes) of exp(logits / temperature) and its rows (samples); the last
    step is over the rows, so each row of the result sums to 1.

    Args:
        logits: (samples, prototypes), any float dtype. The number of samples may differ between ranks.
        temperature: softmax temperature of the teacher.
        n_iterations: normalisations of each kind.
        n_samples: the number that rows are scaled by, over all ranks; counted from `logits` when not given.

    Returns:
        (samples, prototypes) probabilities in float32.

    Source: Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments" (SwAV),
    NeurIPS 2020, appendix A; DINOv2, section 4, "Untying head weights" and "Sinkhorn-Knopp centering".
    """
    assignment = torch.exp(logits.float() / temperature)  # cosine logits are at most 1, so exp(1 / 0.04) is the worst
    n_prototypes = assignment.shape[1]
    if n_samples is None:
        n_samples = sum_over_ranks(logits.new_full((), len(logits), dtype=torch.float32))

    assignment /= sum_over_ranks(assignment.sum())
    for _ in range(n_iterations):
        assignment /= sum_over_ranks(assignment.sum(dim=0, keepdim=True)) * n_prototypes
        assignment /= assignment.sum(dim=1, keepdim=True) * n_samples
    return assignment.mul_(n_samples)
