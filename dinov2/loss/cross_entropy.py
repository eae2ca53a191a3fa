"""Cross-entropy against soft targets over very many prototypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _SoftCrossEntropy(torch.autograd.Function):
    """Saves the logits as they came (often bf16) instead of their float32 log-softmax: half the memory or less."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        scaled = logits.float().div(temperature)
        log_normalizer = torch.logsumexp(scaled, dim=-1)
        mass = targets.sum(dim=-1)
        ctx.save_for_backward(logits, targets, log_normalizer, mass)
        ctx.temperature = temperature
        return mass * log_normalizer - (targets * scaled).sum(dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, log_normalizer, mass = ctx.saved_tensors
        probabilities = logits.float().div(ctx.temperature).sub_(log_normalizer.unsqueeze(-1)).exp_()
        d_logits = probabilities.mul_(mass.unsqueeze(-1)).sub_(targets).mul_((grad / ctx.temperature).unsqueeze(-1))
        return d_logits.to(logits.dtype), None, None


def soft_cross_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Minus the sum over prototypes of targets * log softmax(logits / temperature), in float32.

    Args:
        logits: (..., prototypes) student outputs, any float dtype; gradients flow to them.
        targets: (..., prototypes) non-negative weights of the same shape, taken as constants. They need not sum to 1:
            the cross-entropies against several teachers equal the one against the sum of their probabilities.
        temperature: softmax temperature of the student.

    Returns:
        (...) one value a row, in nats.
    """
    return _SoftCrossEntropy.apply(logits, targets.detach(), temperature)
