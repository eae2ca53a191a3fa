"""The class-token loss against cross-entropies written out with torch's own."""

import torch
import torch.nn.functional as F

from dinov2.loss import DINOLoss


def views(count: int, seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 16, generator=generator).to(dtype) for _ in range(count)]


def test_the_loss_is_the_sum_over_pairs_of_views_of_the_mean_cross_entropy():
    student, teacher = views(3, 0), [t.softmax(-1) for t in views(2, 1)]
    expected = sum(F.cross_entropy(s / 0.1, t) for s in student for t in teacher)
    torch.testing.assert_close(DINOLoss(16)(student, teacher), expected)


def test_its_gradient_is_the_one_of_the_written_out_sum():
    ours = [s.requires_grad_() for s in views(3, 0)]
    plain = [s.detach().clone().requires_grad_() for s in ours]
    teacher = [t.softmax(-1) for t in views(2, 1)]
    DINOLoss(16, student_temp=0.2)(ours, teacher).backward()
    sum(F.cross_entropy(s / 0.2, t) for s in plain for t in teacher).backward()
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a.grad, b.grad)


def test_bfloat16_logits_give_a_float32_loss_and_bfloat16_gradients():
    (student,) = views(1, 0, torch.bfloat16)
    loss = DINOLoss(16)([student.requires_grad_()], [v.softmax(-1) for v in views(1, 1)])
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16


def test_no_gradient_reaches_the_teacher():
    teacher = views(1, 1)[0].requires_grad_()
    student = views(1, 0)[0].requires_grad_()
    DINOLoss(16)([student], [teacher.softmax(-1)]).backward()
    assert teacher.grad is None


def test_the_centre_moves_one_call_after_its_batch_by_one_minus_momentum():
    loss = DINOLoss(16, center_momentum=0.8)
    (batch,) = views(1, 2)
    loss.update_center(batch)
    assert not loss.center.any()
    probabilities = loss.softmax_center_teacher(batch, teacher_temp=0.07)
    center = 0.2 * batch.mean(0, keepdim=True)
    torch.testing.assert_close(loss.center, center)
    torch.testing.assert_close(probabilities, ((batch - center) / 0.07).softmax(-1))


def test_a_teacher_that_is_not_finite_does_not_spoil_the_centre():
    loss = DINOLoss(16)
    loss.update_center(torch.full((4, 16), float("nan")))
    loss.apply_center_update()
    assert torch.isfinite(loss.center).all()
