"""The patch loss: each image counts once, however many of its patches are masked."""

import pytest
import torch
import torch.nn.functional as F

from dinov2.loss import iBOTPatchLoss


@pytest.fixture
def patches():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(3, 9, generator=generator) < 0.5
    masks[1] = False  # an image without masked patches
    student = torch.randn(3, 9, 16, generator=generator)
    teacher = torch.randn(3, 9, 16, generator=generator).softmax(-1)
    return student, teacher, masks


def expected_loss(student, teacher, masks):
    per_image = [
        F.cross_entropy(s[m] / 0.1, t[m]) if m.any() else torch.zeros(()) for s, t, m in zip(student, teacher, masks)
    ]
    return torch.stack(per_image).mean()


def test_forward_is_the_mean_over_images_of_the_mean_over_masked_patches(patches):
    torch.testing.assert_close(iBOTPatchLoss(16)(*patches), expected_loss(*patches))


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("weights_given", [False, True])
def test_masked_patches_alone_give_the_same_value_and_gradient(patches, padding, weights_given):
    student, teacher, masks = patches
    flat_student = F.pad(student[masks], (0, 0, 0, padding), value=9.0).requires_grad_()
    flat_teacher = F.pad(teacher[masks], (0, 0, 0, padding), value=0.5)
    weight = (1 / masks.sum(1).clamp(min=1)).unsqueeze(1).expand_as(masks)[masks] if weights_given else None
    loss = iBOTPatchLoss(16).forward_masked(flat_student, flat_teacher, masks, int(masks.sum()), weight)
    loss.backward()

    full = student.clone().requires_grad_()
    expected = expected_loss(full, teacher, masks)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(flat_student.grad[: masks.sum()], full.grad[masks])
    assert not flat_student.grad[masks.sum() :].any()


def test_nothing_masked_gives_zero_with_a_gradient_of_zero():
    masks = torch.zeros(2, 4, dtype=torch.bool)
    student = torch.empty(0, 16, requires_grad=True)
    loss = iBOTPatchLoss(16).forward_masked(student, torch.empty(0, 16), masks)
    loss.backward()
    assert loss == 0


def test_every_patch_counts_once_in_the_centre():
    loss = iBOTPatchLoss(16, center_momentum=0.7)
    logits = torch.randn(1, 11, 16, generator=torch.Generator().manual_seed(3))
    loss.update_center(logits)
    loss.apply_center_update()
    torch.testing.assert_close(loss.center, 0.3 * logits.mean(dim=(0, 1), keepdim=True))
