"""Going on from weights: what keeps the backbone from being spoilt by new heads."""

import pytest
import torch
from tiny_training import make_batch, make_model, tiny_config

from dinov2.models.vision_transformer import vit_tiny
from dinov2.models.weights import save_backbone
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.train import apply_optim_scheduler, build_optimizer, clip_and_step, freeze_backbone


def rates(model):
    """Learning-rate factor of each parameter of the student, by name."""
    factor = {id(p): group["lr_multiplier"] for group in model.get_params_groups() for p in group["params"]}
    return {name: factor[id(p)] for name, p in model.student.named_parameters()}


def test_the_backbone_learns_at_its_share_of_the_heads_rate():
    plain, slow = (rates(make_model(tiny_config(**{"optim.backbone_lr_mult": m}))) for m in (1.0, 0.1))
    for name, rate in plain.items():
        assert slow[name] == pytest.approx(rate * (0.1 if name.startswith("backbone.") else 1.0))


def test_a_frozen_backbone_stands_still_while_the_heads_learn():
    model = make_model(tiny_config())
    optimizer = build_optimizer(model.cfg, model.get_params_groups())
    apply_optim_scheduler(optimizer, 1e-3, 0.05, 1e-3)
    freeze_backbone(optimizer)
    before = {name: p.clone() for name, p in model.student.named_parameters()}
    model.forward_backward(make_batch(0), 0.05)
    clip_and_step(optimizer, model, 3.0)
    for part in ("backbone", "dino_head"):
        moved = [not torch.equal(before[f"{part}.{n}"], p) for n, p in model.student[part].named_parameters()]
        assert any(moved) == (part != "backbone")


def test_both_networks_start_from_the_weights_and_with_the_same_heads(tmp_path):
    released = vit_tiny(img_size=56, patch_size=14, num_register_tokens=1, init_values=1.0, block_chunks=0)
    save_backbone(released, tmp_path / "released.safetensors")
    model = SSLMetaArch(tiny_config(**{"student.pretrained_weights": tmp_path / "released.safetensors"}))
    model.prepare_for_distributed_training()
    for name, weight in released.state_dict().items():
        assert torch.equal(model.student["backbone"].state_dict()[name], weight), name
    teacher = model.teacher.state_dict()
    assert all(torch.equal(teacher[name], weight) for name, weight in model.student.state_dict().items())
