import pytest
import torch
from torch import nn

from dinov2.layers import DINOHead
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.param_groups import fuse_params_groups, get_params_groups_with_decay, get_vit_lr_decay_rate


def vit(chunks=0):
    options = {"img_size": 28, "patch_size": 14, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_register_tokens": 2}
    return DinoVisionTransformer(**options, init_values=1e-5, block_chunks=chunks)


def by_name(model, **options):
    return {group["name"]: group for group in get_params_groups_with_decay(model, **options)}


def test_the_learning_rate_falls_by_a_factor_per_layer_below_the_top():
    groups = by_name(vit(), lr_decay_rate=0.5)
    expected = {
        "norm.weight": 1.0,
        "blocks.3.attn.qkv.weight": 0.5,
        "blocks.0.mlp.fc1.bias": 0.5**4,
        "cls_token": 0.5**5,
        "pos_embed": 0.5**5,
        "register_tokens": 0.5**5,
        "mask_token": 0.5**5,
        "patch_embed.proj.weight": 0.5**5,
    }
    assert {name: groups[name]["lr_multiplier"] for name in expected} == expected


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.ModuleDict({"backbone": m})])
def test_chunked_names_and_wrapped_backbones_give_the_same_rates(wrap):
    plain = [group["lr_multiplier"] for group in get_params_groups_with_decay(vit(), 0.9, 0.2)]
    chunked = [group["lr_multiplier"] for group in get_params_groups_with_decay(wrap(vit(chunks=2)), 0.9, 0.2)]
    assert chunked == plain


def test_the_patch_embedding_learns_at_a_fraction_on_top():
    groups = by_name(vit(), lr_decay_rate=0.5, patch_embed_lr_mult=0.2)
    assert groups["patch_embed.proj.bias"]["lr_multiplier"] == pytest.approx(0.2 * 0.5**5)
    assert groups["cls_token"]["lr_multiplier"] == 0.5**5


def test_biases_norms_and_layer_scale_do_not_decay():
    groups = by_name(vit())
    free = {name for name, group in groups.items() if group["wd_multiplier"] == 0}
    kinds = (".bias", "norm1.weight", "norm2.weight", "norm.weight", "ls1.gamma", "ls2.gamma")
    assert free == {name for name in groups if name.endswith(kinds)}


def test_only_the_prototypes_of_a_head_are_its_last_layer():
    groups = by_name(DINOHead(in_dim=4, out_dim=6, hidden_dim=4, bottleneck_dim=3))
    last = {name for name, group in groups.items() if group["is_last_layer"]}
    assert last
    assert last == {name for name in groups if name.startswith("last_layer")}
    assert {group["lr_multiplier"] for group in groups.values()} == {1.0}


def test_frozen_parameters_get_no_group():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    assert sorted(by_name(model)) == ["0.bias", "1.bias", "1.weight"]


def test_names_carry_no_wrapper():
    groups = get_params_groups_with_decay(torch.compile(vit()), 0.5)
    assert not any("_orig_mod" in group["name"] for group in groups)


def test_fusing_keeps_every_parameter_once_and_what_the_groups_agree_in():
    model = vit()
    groups = get_params_groups_with_decay(model, 0.9, 0.2)
    fused = fuse_params_groups(groups)
    assert len(fused) < len(groups) / 3
    held = [id(parameter) for group in fused for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    rates = {id(group["params"]): group["lr_multiplier"] for group in groups}
    assert all(rates[id(p)] == group["lr_multiplier"] for group in fused for p in group["params"])


def test_a_name_outside_the_backbone_learns_at_the_full_rate():
    assert get_vit_lr_decay_rate("mlp.0.weight", 0.5, num_layers=4) == 1.0
    assert get_vit_lr_decay_rate("backbone.blocks.1.norm1.weight", 0.5, num_layers=4) == 0.5**3
