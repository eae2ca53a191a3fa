"""KoLeo: minus the mean log distance to the nearest neighbour on the unit sphere."""

import math

import pytest
import torch

from dinov2.loss import KoLeoLoss


def test_it_is_minus_log_two_for_opposite_points_whatever_their_length():
    features = torch.tensor([[3.0, 0.0], [-0.5, 0.0]])
    torch.testing.assert_close(KoLeoLoss()(features), torch.tensor(-math.log(2)))


def test_it_is_the_brute_force_formula_and_gradient():
    ours = torch.randn(10, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = ours.detach().double().requires_grad_()
    unit = plain / plain.norm(dim=1, keepdim=True)
    distances = (unit.unsqueeze(0) - unit.unsqueeze(1)).square().sum(-1) + 10 * torch.eye(10)
    expected = -distances.min(dim=1).values.sqrt().log().mean()
    expected.backward()
    loss = KoLeoLoss()(ours)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_duplicates_give_a_finite_loss_and_do_not_drown_the_other_gradients(dtype):
    features = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    features[1] = features[0]
    features.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = KoLeoLoss()(features)
    loss.backward()
    assert loss.dtype == torch.float32
    assert math.log(1e4) / 2 < loss < -math.log(1e-8)
    assert torch.isfinite(features.grad).all()
    assert features.grad.abs().max() < 10


@pytest.mark.parametrize("rows", [0, 1])
def test_a_batch_without_neighbours_is_refused(rows):
    with pytest.raises(ValueError, match=f"at least two rows .* got {rows}"):
        KoLeoLoss()(torch.ones(rows, 8))


def test_the_nearest_of_near_duplicates_is_found_though_their_cosines_all_round_to_one():
    angles = torch.tensor([0.0, 3e-4, 4e-4, 9e-4])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    expected = -torch.tensor([3e-4, 1e-4, 1e-4, 5e-4]).log().mean()
    torch.testing.assert_close(KoLeoLoss()(features), expected, rtol=1e-3, atol=1e-3)
