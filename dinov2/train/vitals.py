"""Signs of how a step learns, beyond its losses: prototypes in use, agreement, distance to neighbours.

Everything stays on the device and takes no part in the losses; all ranks call with the same terms and get the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2.distributed import gather_rows, get_global_rank, mean_over_ranks, sum_over_ranks
from dinov2.loss.koleo_loss import nearest_other_row


@torch.no_grad()
def prototype_entropy(probabilities: Tensor) -> Tensor:
    """Entropy of the mean target over the samples of all ranks, divided by its largest value, log(prototypes).

    1: every prototype gets an equal share of the batch; near 0: one gets everything, the mark of a collapse. A batch
    of n samples cannot exceed log(n) / log(prototypes) when each target names one prototype.

    Args:
        probabilities: (samples, prototypes), each row sums to 1. The number of rows may differ between ranks.
    """
    total = sum_over_ranks(probabilities.float().sum(dim=0))
    count = sum_over_ranks(total.new_full((), len(probabilities)))
    return torch.special.entr(total / count.clamp(min=1)).sum() / math.log(max(probabilities.shape[1], 2))


@torch.no_grad()
def teacher_agreement(student_logits: Tensor, teacher_probabilities: Tensor) -> Tensor:
    """Share of global class tokens for which the student's likeliest prototype is the teacher's of the other view.

    That pair is what the loss on global views compares.

    Args:
        student_logits: (views, batch, prototypes).
        teacher_probabilities: (views, batch, prototypes).
    """
    agrees = student_logits.argmax(dim=-1) == teacher_probabilities.flip(0).argmax(dim=-1)
    return mean_over_ranks(agrees.float().mean())


@torch.no_grad()
def neighbour_distances(features: Tensor, *, distributed: bool) -> tuple[Tensor, Tensor]:
    """Mean and smallest distance from a row to its nearest other row on the unit sphere, over all ranks.

    What KoLeo widens: between 0 (duplicates) and 2.

    Args:
        features: (views, batch, dim); neighbours are looked for within a view. The batch is at least 2.
        distributed: look for neighbours in the batch of all ranks (equal batch sizes) instead of this rank's.
    """
    nearest = []
    for view in F.normalize(features.float(), dim=-1):
        others = gather_rows(view) if distributed else view
        first_row = get_global_rank() * len(view) if distributed else 0
        nearest.append((view - others[nearest_other_row(view, others, first_row)]).norm(dim=-1))
    distances = torch.stack(nearest)
    return mean_over_ranks(distances.mean()), gather_rows(distances.min()[None]).min()
