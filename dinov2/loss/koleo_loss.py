"""KoLeo: spread the features of a batch over the sphere."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2.distributed import gather_rows_with_grad, get_global_rank


class KoLeoLoss(nn.Module):
    """Push each feature away from its nearest neighbour on the unit sphere.

    Args:
        distributed: look for neighbours in the batch of all ranks (equal batch sizes) instead of this rank's.

    Source: Sablayrolles et al., "Spreading vectors for similarity search", ICLR 2019; DINOv2, section 4.
    """

    def __init__(self, distributed: bool = False):
        super().__init__()
        self.distributed = distributed

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """Minus the mean log of the distance from each L2-normalised row to its nearest other row, in nats.

        Computed in float32 whatever the input and the autocast state, because half precision rounds near neighbours
        to distance zero. Exact duplicates give a large but finite value, and no gradient: their direction is
        arbitrary, and its size (about 1 / eps) would drown every other gradient.

        Args:
            student_output: (rows, dim) class tokens before the head, one row an image.
            eps: added to each coordinate of the difference and to each distance (no unit).

        Raises:
            ValueError: fewer than two rows, so that no row has a neighbour.
        """
        with torch.autocast(student_output.device.type, enabled=False):
            features = F.normalize(student_output.float(), p=2, dim=-1, eps=eps)
            others = gather_rows_with_grad(features) if self.distributed else features
            if len(others) < 2:
                raise ValueError(
                    f"KoLeo needs at least two rows to have a nearest neighbour, got {len(others)}; "
                    "raise train.batch_size_per_gpu or set dino.koleo_loss_weight=0"
                )
            first_row = get_global_rank() * len(features) if self.distributed else 0
            neighbours = others[nearest_other_row(features, others, first_row)]
            duplicate = (features.detach() == neighbours.detach()).all(dim=-1, keepdim=True)
            difference = torch.where(duplicate, (features - neighbours).detach(), features - neighbours)
            distances = torch.linalg.vector_norm(difference + eps, dim=-1)
            return -torch.log(distances + eps).mean()


@torch.no_grad()
def nearest_other_row(features: Tensor, others: Tensor, first_row: int = 0) -> Tensor:
    """Index in `others` (m, dim) of the row nearest to each row of `features` (n, dim), itself left out.

    Row i of `features` stands in `others` at `first_row + i`.
    """
    # Not by inner products: in float32 those of near-duplicates all round to 1, and any of them would do as nearest.
    distances = torch.cdist(features, others, compute_mode="donot_use_mm_for_euclid_dist")
    distances.diagonal(offset=first_row).fill_(torch.inf)
    return distances.argmin(dim=1)
