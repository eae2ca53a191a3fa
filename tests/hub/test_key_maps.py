import pytest
import torch

from dinov2.models.key_maps import (
    HUGGINGFACE,
    HUGGINGFACE_MODULES,
    TIMM,
    TIMM_SWIGLU,
    plain_name,
    to_huggingface,
    to_plain_names,
    to_timm,
)
from dinov2.models.vision_transformer import DinoVisionTransformer


def tensors(**options) -> dict[str, torch.Tensor]:
    options = {"img_size": 28, "patch_size": 14, "embed_dim": 16, "depth": 11, "num_heads": 2, **options}
    state_dict = DinoVisionTransformer(block_chunks=0, init_values=1.0, **options).state_dict()
    return {name: torch.randn_like(tensor) for name, tensor in state_dict.items()}


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglufused"])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("key_map", [HUGGINGFACE, HUGGINGFACE_MODULES])
def test_hugging_face_names_are_recognised_and_renamed_back(ffn_layer, registers, key_map):
    ours = tensors(ffn_layer=ffn_layer, num_register_tokens=registers)
    theirs = key_map.from_ours(ours)
    back, library = to_plain_names({f"dinov2.{name}": tensor for name, tensor in theirs.items()})
    assert library == key_map.library
    assert set(back) == set(ours)
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_queries_keys_and_values_are_thirds_in_this_order():
    ours = tensors()
    theirs = to_huggingface(ours)
    thirds = ours["blocks.10.attn.qkv.weight"].split(16)
    for name, third in zip(("query", "key", "value"), thirds):
        assert torch.equal(theirs[f"encoder.layer.10.attention.attention.{name}.weight"], third)


@pytest.mark.parametrize(("ffn_layer", "library"), [("mlp", TIMM.library), ("swiglufused", TIMM_SWIGLU.library)])
def test_timm_names_are_recognised_and_renamed_back_with_the_class_position_added(ffn_layer, library):
    ours = tensors(ffn_layer=ffn_layer, num_register_tokens=4)
    theirs = to_timm(ours)
    assert theirs["pos_embed"].shape[1] == ours["pos_embed"].shape[1] - 1
    back, found = to_plain_names(theirs)
    assert found == library
    assert set(back) == set(ours) - {"mask_token"}
    for name in set(back) - {"cls_token", "pos_embed"}:
        assert torch.equal(back[name], ours[name])
    for tokens in (back, ours):
        tokens["first"] = tokens["cls_token"] + tokens["pos_embed"][:, :1]
    torch.testing.assert_close(back["first"], ours["first"])


def test_our_own_names_pass_through():
    ours = tensors(num_register_tokens=4)
    same, library = to_plain_names(ours)
    assert library is None
    assert set(same) == set(ours)


def test_a_tensor_without_a_place_is_refused():
    with pytest.raises(ValueError, match=r"timm has no place for head\.weight"):
        TIMM.from_ours({"head.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module.backbone.blocks.2.11.norm1.bias", "backbone.blocks.11.norm1.bias"),
        ("blocks.11.norm1.bias", "blocks.11.norm1.bias"),
        ("_orig_mod.blocks.0._orig_mod.mlp.fc1.weight", "blocks.0.mlp.fc1.weight"),
        ("dino_head.last_layer.parametrizations.weight.original0", "dino_head.last_layer.weight_g"),
        ("dino_head.last_layer.parametrizations.weight.original1", "dino_head.last_layer.weight_v"),
    ],
)
def test_wrappers_and_chunks_leave_names(name, plain):
    assert plain_name(name) == plain
