"""The memory-saving cross-entropy has the gradient that finite differences find."""

import torch

from dinov2.loss.cross_entropy import soft_cross_entropy


def test_gradcheck_with_targets_that_do_not_sum_to_one():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, generator=generator)
    targets = torch.rand(5, 7, dtype=torch.float64, generator=generator)
    loss = soft_cross_entropy(logits.float().requires_grad_(), targets.float(), 0.3)
    expected = -(targets * (logits / 0.3).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)

    ours = logits.float().requires_grad_()
    soft_cross_entropy(ours, targets.float(), 0.3).square().sum().backward()
    plain = logits.clone().requires_grad_()
    (-(targets * (plain / 0.3).log_softmax(-1)).sum(-1)).square().sum().backward()
    torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=1e-4, atol=1e-4)
