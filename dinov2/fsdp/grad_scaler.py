"""Dynamic loss scaling for fp16, the same on one process and on sharded models."""

from __future__ import annotations

import torch
from torch import Tensor


class ShardedGradScaler:
    """Keep fp16 gradients inside their range by scaling the loss; every operation stays on the device.

    The optimizer divides the scale out and skips a step whose gradients are not finite (`grad_scale`, `found_inf`
    of PyTorch's fused AdamW). Gradient norms are taken over all processes, so all skip the same steps.

    Args:
        device: where the loss is.
        enabled: off, the scale is 1 and stays there.
        growth_interval: finite steps in a row after which the scale doubles; a step that is not halves it.
    """

    def __init__(
        self, device: torch.device, *, enabled: bool, init_scale: float = 2.0**16, growth_interval: int = 2000
    ):
        self.enabled = enabled
        self.growth_interval = growth_interval
        self.scale_factor = torch.full((), init_scale if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward on."""
        return loss * self.scale_factor if self.enabled else loss

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Adapt the scale after a step; `found_inf` is 1 if it was skipped, 0 if not."""
        if not self.enabled:
            return
        self.good_steps = torch.where(found_inf > 0, 0.0, self.good_steps + 1)
        grow = self.good_steps >= self.growth_interval
        self.scale_factor *= torch.where(found_inf > 0, 0.5, torch.where(grow, 2.0, 1.0))
        self.scale_factor.clamp_(min=1.0)
        self.good_steps = torch.where(grow, 0.0, self.good_steps)

    def state_dict(self) -> dict[str, Tensor]:
        """The scale and the count of finite steps."""
        return {"scale_factor": self.scale_factor, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state."""
        self.scale_factor.copy_(state["scale_factor"])
        self.good_steps.copy_(state["good_steps"])
