"""The method against a straight-line implementation: one crop at a time, formulas from the papers, plain AdamW."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_training import make_batch, make_model, objective, tiny_config

from dinov2.train.train import accumulate_gradients, apply_optim_scheduler, build_optimizer, clip_and_step


class StraightLine:
    """The recipe as the papers state it, crop by crop, with nothing shared with the package but the two networks."""

    def __init__(self, model, cfg):
        self.cfg = cfg
        self.student, self.teacher = copy.deepcopy(model.student), copy.deepcopy(model.teacher)
        self.centers = {"cls": torch.zeros(40), "patch": torch.zeros(24 if cfg.ibot.separate_head else 40)}
        self.seen = {}
        self.optimizer = torch.optim.AdamW(self.student.parameters(), betas=(0.9, 0.999), foreach=False, fused=False)

    def patch_head(self, network):
        return network["ibot_head" if self.cfg.ibot.separate_head else "dino_head"]

    def targets(self, kind, logits, temperature):
        if self.cfg.train.centering == "centering":
            if kind in self.seen:
                self.centers[kind] = 0.9 * self.centers[kind] + 0.1 * self.seen[kind]
            self.seen[kind] = logits.mean(0)
            return F.softmax((logits - self.centers[kind]) / temperature, dim=1)
        q = (logits.double() / temperature).exp()
        for _ in range(3):
            q = q / q.sum(0) / q.shape[1]
            q = q / q.sum(1, keepdim=True)
        return q.float()

    def step(self, batch, temperature, lr, wd, momentum, clip=3.0):
        cfg, images = self.cfg, len(batch["collated_global_crops"]) // 2
        views = batch["collated_global_crops"].split(images)
        locals_ = batch["collated_local_crops"].split(images)
        masks = batch["collated_masks"].split(images)

        with torch.no_grad():
            seen = [self.teacher["backbone"](view, is_training=True) for view in views]
            cls = torch.cat([self.teacher["dino_head"](t["x_norm_clstoken"]) for t in seen])
            masked = torch.cat([t["x_norm_patchtokens"][m] for t, m in zip(seen, masks)])
            target_cls = self.targets("cls", cls, temperature).split(images)
            target_patch = self.targets("patch", self.patch_head(self.teacher)(masked), temperature)

        told = [self.student["backbone"](v, masks=m, is_training=True) for v, m in zip(views, masks)]
        said = [self.student["dino_head"](t["x_norm_clstoken"]) for t in told]
        said_locals = [
            self.student["dino_head"](self.student["backbone"](crop, is_training=True)["x_norm_clstoken"])
            for crop in locals_
        ]
        masked = torch.cat([t["x_norm_patchtokens"][m] for t, m in zip(told, masks)])
        patch_logits = self.patch_head(self.student)(masked)

        pairs = 2 + 2 * len(locals_)
        swapped = zip(said, reversed(target_cls))
        global_loss = sum(F.cross_entropy(s / 0.1, t) for s, t in swapped) / pairs
        local_loss = sum(F.cross_entropy(s / 0.1, t) for s in said_locals for t in target_cls) / pairs
        koleo = 0.0
        for tokens in told:
            unit = F.normalize(tokens["x_norm_clstoken"], dim=1)
            distances = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist") + 9 * torch.eye(images)
            koleo = koleo - distances.min(1).values.log().mean()
        counts = batch["collated_masks"].sum(1)
        owner = batch["collated_masks"].nonzero()[:, 0]
        per_patch = F.cross_entropy(patch_logits / 0.1, target_patch, reduction="none")
        patch_loss = (per_patch / counts[owner]).sum() / len(counts)

        objective = cfg.dino.loss_weight * (global_loss + local_loss)
        objective = objective + cfg.dino.koleo_loss_weight * koleo + cfg.ibot.loss_weight * patch_loss
        self.optimizer.zero_grad()
        objective.backward()
        for module in self.student.values():
            norm = math.sqrt(sum(p.grad.square().sum().item() for p in module.parameters() if p.grad is not None))
            for parameter in module.parameters():
                if parameter.grad is not None and norm > clip:
                    parameter.grad.mul_(clip / (norm + 1e-6))
        depth = len(self.student["backbone"].blocks)
        for name, parameter in self.student.named_parameters():
            self.update(name, parameter, depth, lr, wd)
        with torch.no_grad():
            for teacher, student in zip(self.teacher.parameters(), self.student.parameters()):
                teacher.copy_(momentum * teacher + (1 - momentum) * student)
        return objective.item()

    @torch.no_grad()
    def update(self, name, parameter, depth, lr, wd):
        """AdamW by hand, with the layer-wise decay of the learning rate (embeddings are layer 0)."""
        layer = depth + 1
        if name.startswith("backbone."):
            inner = name.removeprefix("backbone.")
            if inner.startswith("blocks."):
                layer = int(inner.split(".")[1]) + 1
            elif inner.startswith(("patch_embed", "pos_embed", "cls_token", "mask_token", "register_tokens")):
                layer = 0
            lr *= 0.9 ** (depth + 1 - layer) * (0.2 if "patch_embed" in inner else 1.0)
        if name.endswith("bias") or "norm" in name or "gamma" in name:
            wd = 0.0
        state = self.optimizer.state[parameter]
        count = state["count"] = state.get("count", 0) + 1
        first = state["first"] = 0.9 * state.get("first", 0) + 0.1 * parameter.grad
        second = state["second"] = 0.999 * state.get("second", 0) + 0.001 * parameter.grad.square()
        parameter.mul_(1 - lr * wd)
        parameter.sub_(lr * (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8))


def run_both(cfg, steps):
    model = make_model(cfg)
    straight = StraightLine(model, cfg)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    ours, expected = [], []
    for step in range(steps):
        batch, temperature, lr = make_batch(step % 7), 0.04 + 0.0001 * step, 1e-3
        apply_optim_scheduler(optimizer, lr=lr, wd=0.05, last_layer_lr=lr)
        optimizer.zero_grad()
        losses = accumulate_gradients(model, [batch], temperature)
        clip_and_step(optimizer, model, clip_grad=3.0)
        model.update_teacher(0.99)
        ours.append(objective(model, losses))
        expected.append(straight.step(batch, temperature, lr, 0.05, 0.99))
    return ours, expected, model, straight


@pytest.mark.parametrize("separate_head", [True, False])
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_five_steps_equal_the_straight_line_recipe(centering, separate_head):
    cfg = tiny_config(**{"train.centering": centering, "ibot.separate_head": separate_head})
    ours, expected, model, straight = run_both(cfg, steps=5)
    assert ours == pytest.approx(expected, rel=2e-4)
    for (name, a), b in zip(model.teacher.named_parameters(), straight.teacher.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_two_hundred_steps_equal_the_straight_line_recipe(centering):
    cfg = tiny_config(**{"train.centering": centering, "ibot.separate_head": True})
    ours, expected, _, _ = run_both(cfg, steps=200)
    assert ours == pytest.approx(expected, rel=5e-3)
    assert ours[-1] < ours[0]


def test_weights_of_the_terms_count_as_configured():
    cfg = tiny_config(**{"dino.loss_weight": 0.5, "ibot.loss_weight": 2.0, "dino.koleo_loss_weight": 0.3})
    ours, expected, _, _ = run_both(cfg, steps=1)
    assert ours == pytest.approx(expected, rel=1e-4)


def test_a_term_of_weight_zero_is_left_out_and_its_losses_are_not_computed():
    for change, missing in (
        ({"ibot.loss_weight": 0}, "ibot_loss"),
        ({"dino.koleo_loss_weight": 0}, "koleo_loss"),
        ({"dino.loss_weight": 0, "ibot.separate_head": True}, "dino_global_crops_loss"),
    ):
        losses = make_model(tiny_config(**change)).forward_backward(make_batch(0), 0.05)
        assert missing not in losses
        assert losses


def test_without_local_crops_the_two_global_views_remain():
    cfg = tiny_config(**{"crops.local_crops_number": 0})
    losses = make_model(cfg).forward_backward(make_batch(0, locals_=0), 0.05)
    assert set(losses) == {"dino_global_crops_loss", "koleo_loss", "ibot_loss"}


def test_a_local_batch_of_one_leaves_koleo_out_and_warns_once(caplog):
    model = make_model(tiny_config())
    with caplog.at_level("WARNING", logger="dinov2"):
        for _ in range(2):
            assert "koleo_loss" not in model.forward_backward(make_batch(0, images=1), 0.05)
    assert [r.message for r in caplog.records if "KoLeo" in r.message] == [
        "KoLeo is left out: a local batch of one image has no nearest neighbour"
    ]


def test_accumulated_batches_give_the_mean_of_their_gradients():
    cfg = tiny_config(**{"train.centering": "sinkhorn_knopp"})
    model = make_model(cfg)
    batches = [make_batch(0), make_batch(1)]
    accumulate_gradients(model, batches, 0.05)
    together = {n: p.grad.clone() for n, p in model.student.named_parameters()}
    model.zero_grad()
    for batch in batches:
        model.forward_backward(batch, 0.05)
    for name, parameter in model.student.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad / 2, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_moves_nothing():
    model = make_model(tiny_config())
    optimizer = build_optimizer(model.cfg, model.get_params_groups())
    apply_optim_scheduler(optimizer, 1e-3, 0.05, 1e-3)
    model.forward_backward(make_batch(0), 0.05)
    next(model.student["dino_head"].parameters()).grad[0, 0] = float("nan")
    before = [p.clone() for p in model.student.parameters()]
    clip_and_step(optimizer, model, 3.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.student.parameters()))


def test_the_teacher_is_the_moving_average_and_never_trains():
    model = make_model(tiny_config())
    before = [p.clone() for p in model.teacher.parameters()]
    model.update_teacher(0.75)
    for old, new, student in zip(before, model.teacher.parameters(), model.student.parameters()):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * student)
        assert not new.requires_grad
    model.train()
    assert model.student.training
    assert not model.teacher.training


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_gives_losses_near_those_of_float32(dtype):
    batch = make_batch(0)
    exact = make_model(tiny_config()).forward_backward(batch, 0.05)
    model = make_model(tiny_config(**{"compute_precision.dtype": dtype}))
    rough = model.forward_backward(batch, 0.05)
    assert model.fp16_scaler.enabled == (dtype == "fp16")
    for name, value in exact.items():
        assert rough[name].item() == pytest.approx(value.item(), rel=0.03, abs=0.02)


def test_no_clipping_under_loss_scaling_still_moves_the_weights():
    model = make_model(tiny_config(**{"compute_precision.dtype": "fp16"}))
    optimizer = build_optimizer(model.cfg, model.get_params_groups())
    apply_optim_scheduler(optimizer, 1e-3, 0.05, 1e-3)
    model.fp16_scaler.scale_factor.fill_(8.0)
    model.forward_backward(make_batch(0), 0.05)
    before = [p.clone() for p in model.student.parameters()]
    norms = clip_and_step(optimizer, model, 0.0)
    assert all(torch.isfinite(norm) and norm > 0 for norm in norms.values())
    assert not all(torch.equal(a, b) for a, b in zip(before, model.student.parameters()))
