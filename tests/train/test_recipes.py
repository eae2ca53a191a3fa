"""Recipes beyond the plain run: frozen layers, higher resolution, distillation, Gram anchoring."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from tiny_runs import arguments, losses_of
from tiny_training import make_batch, make_model, tiny_config

import dinov2
from dinov2.loss import GramLoss
from dinov2.models.weights import read_state_dict
from dinov2.train import train as module
from dinov2.train.flops import step_flops
from dinov2.train.train import (
    EXIT_INTERRUPTED,
    accumulate_gradients,
    apply_optim_scheduler,
    build_optimizer,
    clip_and_step,
    main,
)

sys.path.insert(0, str(Path(__file__).parent))
from test_two_processes import assert_same_run, train

SHORT = {"optim.epochs": 1, "optim.warmup_epochs": 0, "evaluation.eval_period_iterations": 0}


def steps(cfg, model, count=3):
    """Losses and weights of a few optimizer steps."""
    optimizer, losses = build_optimizer(cfg, model.get_params_groups()), []
    for step in range(count):
        apply_optim_scheduler(optimizer, 1e-3, 0.05, 1e-3)
        optimizer.zero_grad()
        losses.append(accumulate_gradients(model, [make_batch(step)], 0.05))
        clip_and_step(optimizer, model, 0.0)
        model.update_teacher(0.9)
    return losses


def test_frozen_layers_stay_bit_for_bit_and_the_others_learn_as_before():
    free, frozen = (tiny_config(**{"optim.freeze_layers": n}) for n in (0, 1))
    models = make_model(free), make_model(frozen)
    before = {name: p.clone() for name, p in models[1].student.named_parameters()}
    losses = [steps(cfg, model, count=1) for cfg, model in zip((free, frozen), models)]
    assert losses[0] == losses[1]
    below = ("backbone.blocks.0.", "backbone.patch_embed", "backbone.pos_embed", "backbone.cls_token")
    below += ("backbone.register_tokens", "backbone.mask_token")
    for (name, a), b in zip(models[0].student.named_parameters(), models[1].student.parameters()):
        if name.startswith(below):
            assert torch.equal(b, before[name]), name
            assert b.grad is None
        else:
            assert torch.equal(a, b), name
            assert not torch.equal(b, before[name]) or a.grad is None or not a.grad.any(), name


def test_frozen_layers_of_chunked_backbones_are_the_lowest_ones():
    model = make_model(tiny_config(**{"optim.freeze_layers": 7, "student.block_chunks": 4}), depth=4)
    learning = [any(p.requires_grad for p in b.parameters()) for b in model.student["backbone"].iterate_blocks()]
    assert learning == [False] * 7 + [True] * 5


def test_frozen_layers_cost_no_backward_pass():
    costs = [step_flops(make_model(tiny_config(**{"optim.freeze_layers": n})), tiny_config(), 4) for n in (0, 1, 2)]
    assert costs[0] - costs[1] == pytest.approx(costs[1] - costs[2])
    assert costs[0] > costs[1]


def test_a_second_run_at_a_higher_resolution_goes_on_from_the_first_with_its_heads(cell_folder, tmp_path):
    assert main(arguments(cell_folder, tmp_path / "low", **SHORT)) == 0
    weights = tmp_path / "low/eval/training_4/teacher_checkpoint.pth"
    larger = {**SHORT, "crops.global_crops_size": 56, "crops.local_crops_size": 28, "optim.base_lr": 1e-12}
    larger |= {"student.pretrained_weights": weights, "student.pretrained_heads": True, "optim.min_lr": 0}
    larger |= {"teacher.warmup_teacher_temp_epochs": 0}
    assert main(arguments(cell_folder, tmp_path / "high", **larger)) == 0
    before = read_state_dict(weights).state_dict
    after = read_state_dict(tmp_path / "high/eval/training_4/teacher_checkpoint.pth").state_dict
    assert before["teacher.backbone.pos_embed"].shape == (1, 5, 192)
    assert after["teacher.backbone.pos_embed"].shape == (1, 17, 192)
    for name in before:  # at a learning rate of next to nothing, what was loaded is what comes out
        if name != "teacher.backbone.pos_embed":
            torch.testing.assert_close(after[name], before[name], msg=name)
    assert len(losses_of(tmp_path / "high")) == 4
    model = dinov2.load(tmp_path / "high/eval/training_4/teacher_backbone.pth")
    assert model(torch.zeros(1, 3, 56, 56)).shape == (1, 192)


def test_heads_that_are_asked_for_and_not_in_the_file_are_missed(cell_folder, tmp_path):
    assert main(arguments(cell_folder, tmp_path / "low", **SHORT)) == 0
    backbone = tmp_path / "low/eval/training_4/teacher_backbone.pth"
    changes = {**SHORT, "student.pretrained_weights": backbone, "student.pretrained_heads": True}
    with pytest.raises(ValueError, match=r"teacher_backbone\.pth"):
        main(arguments(cell_folder, tmp_path / "high", **changes))


# ----------------------------------------------------------------------------------------------------- distillation


def larger_network(folder, **changes):
    """A network of twelve blocks with heads and the files of its run; a student has two."""
    cfg = tiny_config(**{"ibot.separate_head": True, "dino.head_hidden_dim": 48, **changes})
    network = make_model(cfg, depth=12)
    OmegaConf.save(cfg, folder / "config.yaml")
    torch.save({"teacher": network.teacher.state_dict()}, folder / "teacher_checkpoint.pth")
    return network.teacher


def distilling(folder, **changes):
    settings = {"ibot.separate_head": True, "train.centering": "sinkhorn_knopp", "distillation.enabled": True}
    settings |= {"distillation.config_file": folder / "config.yaml"}
    return tiny_config(**{**settings, "distillation.checkpoint": folder / "teacher_checkpoint.pth", **changes})


def sinkhorn_by_hand(logits, temperature):
    q = (logits.double() / temperature).exp()
    for _ in range(3):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True)
    return q.float()


def test_a_student_learns_from_the_frozen_network_and_sees_every_patch(tmp_path):
    guide = larger_network(tmp_path)
    cfg = distilling(tmp_path, **{"dino.koleo_loss_weight": 0})
    model, batch = make_model(cfg), make_batch(0)
    model.forward_backward(batch, 0.05)

    globals_, locals_, masks = (batch[f"collated_{k}"] for k in ("global_crops", "local_crops", "masks"))
    with torch.no_grad():
        told = guide["backbone"](globals_, is_training=True)
        cls = sinkhorn_by_hand(guide["dino_head"](told["x_norm_clstoken"]), 0.05).split(4)
        patches = sinkhorn_by_hand(guide["ibot_head"](told["x_norm_patchtokens"][masks]), 0.05)
    student = make_model(cfg).student
    seen = student["backbone"](globals_, is_training=True)
    said = student["dino_head"](seen["x_norm_clstoken"]).split(4)
    said_locals = [student["dino_head"](student["backbone"](crop)) for crop in locals_.split(4)]
    pairs = [(said[0], cls[1]), (said[1], cls[0]), *((s, t) for s in said_locals for t in cls)]
    loss = sum(F.cross_entropy(s / 0.1, t) for s, t in pairs) / len(pairs)
    per_patch = F.cross_entropy(
        student["ibot_head"](seen["x_norm_patchtokens"][masks]) / 0.1, patches, reduction="none"
    )
    loss = loss + (per_patch * batch["masks_weight"]).sum() / len(masks)
    loss.backward()
    for (name, ours), expected in zip(model.student.named_parameters(), student.parameters()):
        if expected.grad is not None:
            torch.testing.assert_close(ours.grad, expected.grad, rtol=2e-3, atol=1e-5, msg=name)
        else:  # the mask token, which nobody shows
            assert ours.grad is None or not ours.grad.any(), name


def test_the_network_to_learn_from_stays_and_the_exported_average_follows_the_student(tmp_path):
    guide = larger_network(tmp_path)
    cfg = distilling(tmp_path)
    model = make_model(cfg)
    before = [p.clone() for p in model.teacher.parameters()]
    steps(cfg, model)
    for ours, original in zip(model.guide.parameters(), guide.parameters()):
        assert torch.equal(ours, original)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.teacher.parameters()))
    assert not any(name.startswith("guide") for name in model.state_dict())
    model.load_state_dict(model.state_dict())


def test_a_network_with_other_prototypes_or_patches_is_refused_with_both_values(tmp_path):
    larger_network(tmp_path)
    cfg = distilling(tmp_path, **{"dino.head_n_prototypes": 30, "ibot.head_n_prototypes": 25})
    with pytest.raises(
        ValueError, match=r"dino.head_n_prototypes: 40 there, 30 here\n.*ibot.head_n_prototypes: 24 there"
    ):
        make_model(cfg)


def test_a_network_without_heads_is_refused(tmp_path):
    guide = larger_network(tmp_path)
    torch.save(guide["backbone"].state_dict(), tmp_path / "teacher_checkpoint.pth")
    with pytest.raises(ValueError, match="teacher_checkpoint"):
        make_model(distilling(tmp_path))


def test_two_processes_distil_as_one_does(tmp_path):
    larger_network(tmp_path)
    settings = [f"distillation.config_file={tmp_path / 'config.yaml'}", "distillation.enabled=True"]
    settings.append(f"distillation.checkpoint={tmp_path / 'teacher_checkpoint.pth'}")
    alone = train(tmp_path / "one.json", 1, 2, "NO_SHARD", "sinkhorn_knopp", "", *settings)
    together = train(tmp_path / "two.json", 2, 2, "SHARD_GRAD_OP", "sinkhorn_knopp", "", *settings)
    assert_same_run(alone, together)


# ---------------------------------------------------------------------------------------------------- Gram anchoring

ONLY_GRAM = {"dino.loss_weight": 0, "ibot.loss_weight": 0, "dino.koleo_loss_weight": 0, "gram.loss_weight": 2.0}


def test_the_gram_loss_is_that_of_a_loop_over_pairs_of_patches():
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    cosines = [
        [[F.cosine_similarity(a, b, dim=0) for a in image for b in image] for image in images]
        for images in (student, teacher)
    ]
    squares = [(s - t) ** 2 for one, other in zip(*cosines) for s, t in zip(one, other)]
    assert GramLoss()(student, teacher).item() == pytest.approx(sum(squares).item() / 18, rel=1e-5)
    assert GramLoss()(student, 3 * student).item() == pytest.approx(0, abs=1e-12)


def test_the_gradient_of_gram_anchoring_is_that_of_the_formula_with_the_earlier_teacher():
    cfg = tiny_config(**ONLY_GRAM)
    model, batch = make_model(cfg), make_batch(0)
    model.update_gram_teacher(0)
    losses = model.forward_backward(batch, 0.05)
    assert set(losses) == {"gram_loss"}

    other = make_model(cfg)
    seen = other.student["backbone"](batch["collated_global_crops"], batch["collated_masks"], is_training=True)
    with torch.no_grad():
        earlier = other.teacher["backbone"](batch["collated_global_crops"], is_training=True)
    x, g = (t["x_norm_patchtokens"] / t["x_norm_patchtokens"].norm(dim=-1, keepdim=True) for t in (seen, earlier))
    loss = torch.stack([(a @ a.T - b @ b.T).square().sum() / 16**2 for a, b in zip(x, g)]).mean()
    assert losses["gram_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    (2.0 * loss).backward()
    for (name, a), b in zip(model.student["backbone"].named_parameters(), other.student["backbone"].parameters()):
        if b.grad is not None and b.grad.any():
            torch.testing.assert_close(a.grad, b.grad, rtol=2e-3, atol=1e-6, msg=name)


def test_the_gram_teacher_is_renewed_when_due_and_else_stays():
    model = make_model(tiny_config(**{"gram.loss_weight": 1, "gram.start_iteration": 2, "gram.update_every": 3}))
    renewed = []
    for iteration in range(9):
        with torch.no_grad():
            model.teacher["backbone"].cls_token.fill_(iteration)
        model.update_gram_teacher(iteration)
        assert model.gram_started == (iteration >= 2)
        renewed.append(model.gram_teacher["backbone"].cls_token.mean().item())
    assert renewed[2:] == [2, 2, 2, 5, 5, 5, 8]


def test_without_a_weight_there_is_no_gram_teacher_and_no_loss():
    model = make_model(tiny_config())
    model.update_gram_teacher(0)
    assert not any(name.startswith("gram") for name in model.state_dict())
    assert "gram_loss" not in model.forward_backward(make_batch(0), 0.05)


def test_two_processes_anchor_as_one_does(tmp_path):
    settings = ["gram.loss_weight=2.0", "gram.start_iteration=1", "gram.update_every=1"]  # renewed after a forward too
    alone = train(tmp_path / "one.json", 1, 3, "NO_SHARD", "sinkhorn_knopp", "", *settings)
    together = train(tmp_path / "two.json", 2, 3, "SHARD_GRAD_OP", "sinkhorn_knopp", "", *settings)
    assert ["gram_loss" in step for step in alone["losses"]] == [False, True, True]
    assert_same_run(alone, together)


# ---------------------------------------------------------------------------------------------------------- resuming


def stopped_and_resumed(monkeypatch, words, output_dir, after):
    """Stop a run by a signal after some iterations, and let the same command end it."""
    save = module.save

    def save_then_stop(identity, checkpointer, model, done):
        save(identity, checkpointer, model, done)
        if done == after:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, "save", save_then_stop)
    assert main(words) == EXIT_INTERRUPTED
    monkeypatch.undo()
    assert main(words) == 0
    return losses_of(output_dir)


@pytest.mark.parametrize("recipe", ["distillation", "frozen layers", "gram", "asynchronous"])
def test_a_stopped_run_of_a_recipe_goes_on_bit_for_bit(recipe, cell_folder, tmp_path, monkeypatch):
    settings = {"evaluation.eval_period_iterations": 0}
    if recipe == "distillation":
        assert main(arguments(cell_folder, tmp_path / "first", **SHORT)) == 0
        settings |= {"distillation.enabled": True, "distillation.config_file": tmp_path / "first/config.yaml"}
        settings["distillation.checkpoint"] = tmp_path / "first/eval/training_4/teacher_checkpoint.pth"
    elif recipe == "gram":
        settings |= {"gram.loss_weight": 1.0, "gram.start_iteration": 3, "gram.update_every": 3}
    elif recipe == "asynchronous":
        settings["checkpoint.asynchronous"] = True
    else:
        settings["optim.freeze_layers"] = 3
    assert main(arguments(cell_folder, tmp_path / "straight", **settings)) == 0
    words = arguments(cell_folder, tmp_path / "stopped", **settings)
    assert stopped_and_resumed(monkeypatch, words, tmp_path / "stopped", after=4) == losses_of(tmp_path / "straight")
    ends = [
        read_state_dict(tmp_path / run / "eval/training_8/teacher_checkpoint.pth") for run in ("straight", "stopped")
    ]
    assert all(torch.equal(ends[0].state_dict[name], ends[1].state_dict[name]) for name in ends[0].state_dict)
