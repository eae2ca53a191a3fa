"""Recipes beyond the plain run: frozen layers, a second run at a higher resolution."""

import pytest
import torch
from tiny_runs import arguments, losses_of
from tiny_training import make_batch, make_model, tiny_config

import dinov2
from dinov2.models.weights import read_state_dict
from dinov2.train.flops import step_flops
from dinov2.train.train import accumulate_gradients, apply_optim_scheduler, build_optimizer, clip_and_step, main

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
