from types import SimpleNamespace

import pytest
import torch

from dinov2.models import build_model
from dinov2.models.vision_transformer import BlockChunk, DinoVisionTransformer, vit_tiny


def small(**options) -> DinoVisionTransformer:
    options = {"img_size": 56, "patch_size": 14, "embed_dim": 32, "depth": 4, "num_heads": 2, **options}
    return DinoVisionTransformer(**{"init_values": 1.0, "block_chunks": 0, "num_register_tokens": 4, **options}).eval()


def student(**changes) -> SimpleNamespace:
    options = {
        "arch": "vit_tiny",
        "patch_size": 14,
        "layerscale": 1e-5,
        "ffn_layer": "mlp",
        "block_chunks": 0,
        "qkv_bias": True,
        "proj_bias": True,
        "ffn_bias": True,
        "num_register_tokens": 0,
        "interpolate_offset": 0.1,
        "interpolate_antialias": False,
        "drop_path_rate": 0.3,
        "drop_path_uniform": True,
    }
    return SimpleNamespace(**{**options, **changes})


def test_features_have_the_documented_shapes():
    features = small().forward_features(torch.randn(2, 3, 56, 84))
    assert {name: tuple(value.shape) for name, value in features.items() if value is not None} == {
        "x_norm_clstoken": (2, 32),
        "x_norm_regtokens": (2, 4, 32),
        "x_norm_patchtokens": (2, 24, 32),
        "x_prenorm": (2, 29, 32),
    }
    assert features["masks"] is None


def test_crops_of_several_sizes_give_what_each_gives_alone():
    model = small()
    crops = [torch.randn(2, 3, 56, 56), torch.randn(3, 3, 28, 28), torch.randn(1, 3, 28, 42)]
    masks = [torch.rand(2, 16) < 0.4, None, None]
    for crop, mask, together in zip(crops, masks, model(crops, masks, is_training=True)):
        alone = model.forward_features(crop, mask)
        for name in ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm"):
            torch.testing.assert_close(together[name], alone[name])


def test_gradients_through_a_packed_list_equal_those_of_separate_passes():
    model = small()
    crops = [torch.randn(2, 3, 56, 56), torch.randn(3, 3, 28, 28)]
    grads = []
    for outputs in (model(crops, is_training=True), [model(crop, is_training=True) for crop in crops]):
        model.zero_grad()
        sum(output["x_prenorm"].square().mean() for output in outputs).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_a_masked_patch_cannot_be_seen():
    model = small()
    with torch.no_grad():
        model.mask_token.normal_()
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 6] = True  # second row, third column of four by four patches
    image = torch.randn(1, 3, 56, 56)
    changed = image.clone()
    changed[:, :, 14:28, 28:42] += 3.0
    seen = model(image) - model(changed)
    hidden = model(image, mask) - model(changed, mask)
    assert seen.abs().max() > 1e-3
    assert hidden.abs().max() == 0


def test_height_and_width_are_not_swapped():
    """A model that sees a transposed image with transposed weights gives transposed patches."""
    model, mirror = small(depth=2), small(depth=2)
    tensors = model.state_dict()
    tensors["patch_embed.proj.weight"] = tensors["patch_embed.proj.weight"].transpose(2, 3)
    grid = tensors["pos_embed"][:, 1:].unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    tensors["pos_embed"] = torch.cat((tensors["pos_embed"][:, :1], grid), dim=1)
    mirror.load_state_dict(tensors)
    image = torch.randn(1, 3, 28, 84)
    (tall,) = model.get_intermediate_layers(image, reshape=True)
    (wide,) = mirror.get_intermediate_layers(image.transpose(2, 3), reshape=True)
    assert tall.shape == (1, 32, 2, 6)
    torch.testing.assert_close(tall, wide.transpose(2, 3))


def test_registers_have_no_position_and_stand_between_class_and_patches():
    model = small()
    tokens = model.prepare_tokens_with_masks(torch.randn(2, 3, 56, 56))
    torch.testing.assert_close(tokens[:, 1:5], model.register_tokens.expand(2, -1, -1))
    torch.testing.assert_close(tokens[:1, 0], model.cls_token[:, 0] + model.pos_embed[:, 0])


def test_intermediate_layers_end_with_the_features_of_the_forward_pass():
    model = small()
    image = torch.randn(2, 3, 56, 56)
    features = model.forward_features(image)
    layers = model.get_intermediate_layers(image, n=[1, 3], return_class_token=True)
    torch.testing.assert_close(layers[-1][0], features["x_norm_patchtokens"])
    torch.testing.assert_close(layers[-1][1], features["x_norm_clstoken"])
    assert len(model.get_intermediate_layers(image, n=3)) == 3


@pytest.mark.parametrize("error", [ValueError, AssertionError])
def test_a_layer_that_does_not_exist_is_refused(error):
    with pytest.raises(error, match="blocks 0 to 3"):
        small().get_intermediate_layers(torch.randn(1, 3, 56, 56), n=[3, 40])
    with pytest.raises(error, match="blocks 0 to 3"):
        small().get_self_attention(torch.randn(1, 3, 56, 56), block=4)


@pytest.mark.parametrize("chunks", [0, 2])
@pytest.mark.parametrize("block", [-1, 0, 2])
def test_self_attention_is_what_the_forward_pass_used(chunks, block, monkeypatch):
    model = small(block_chunks=chunks)
    image = torch.randn(2, 3, 56, 56)
    attention = model.get_self_attention(image, block)
    module = list(model.iterate_blocks())[block].attn
    seen = {}

    def keep(module, inputs, output):
        seen.update(qkv=module.qkv(inputs[0]), output=output)

    module.register_forward_hook(keep)
    model(image)
    value = seen["qkv"].unflatten(0, (2, 21)).unflatten(-1, (3, 2, 16))[:, :, 2].transpose(1, 2)
    mixed = module.proj((attention @ value).transpose(1, 2).flatten(2)).flatten(0, 1)
    torch.testing.assert_close(mixed, seen["output"])


def test_chunked_and_plain_models_differ_in_names_only():
    plain, chunked = small(), small(block_chunks=2)
    names = list(chunked.state_dict())
    assert "blocks.1.2.norm1.weight" in names
    assert "blocks.1.0.norm1.weight" not in names
    chunked.load_state_dict(dict(zip(names, plain.state_dict().values())))
    image = torch.randn(1, 3, 56, 56)
    assert torch.equal(plain(image), chunked(image))


@pytest.mark.parametrize("chunks", [5, 13])
def test_chunks_that_do_not_divide_the_depth_are_refused(chunks):
    with pytest.raises(ValueError, match=rf"block_chunks={chunks} does not divide .*\[1, 2, 3, 4, 6, 12\]"):
        vit_tiny(block_chunks=chunks)


def test_block_chunk_skips_its_placeholders():
    chunk = BlockChunk([torch.nn.Identity(), torch.nn.Linear(3, 3)])
    x = torch.randn(2, 3)
    torch.testing.assert_close(chunk(x), chunk[1](x))


def test_unknown_choices_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"student.arch='vit_huge' is unknown; choose one of vit_tiny, vit_small"):
        build_model(student(arch="vit_huge"))
    with pytest.raises(ValueError, match="ffn_layer='glu' is unknown; choose one of mlp"):
        build_model(student(ffn_layer="glu"))


def test_the_teacher_has_no_stochastic_depth_and_the_student_has():
    student_model, teacher, width = build_model(student(), img_size=98)
    assert width == 192
    assert {block.sample_drop_ratio for block in student_model.iterate_blocks()} == {0.3}
    assert {block.sample_drop_ratio for block in teacher.iterate_blocks()} == {0.0}
    assert teacher.pos_embed.shape == (1, 50, 192)


def test_stochastic_depth_grows_with_depth_unless_uniform():
    rates = [block.sample_drop_ratio for block in small(drop_path_rate=0.3).iterate_blocks()]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_masks_of_the_wrong_size_are_refused():
    with pytest.raises(ValueError, match=r"masks have shape \(1, 9\), expected .* \(1, 16\)"):
        small()(torch.randn(1, 3, 56, 56), torch.zeros(1, 9, dtype=torch.bool))


def test_models_build_without_memory():
    with torch.device("meta"):
        model = build_model(student(arch="vit_giant2", ffn_layer="swiglufused"), only_teacher=True)[0]
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_training_steps_draw_no_numbers_on_the_host():
    """Sizes are known beforehand: nothing depends on values, so a GPU never has to answer the host."""
    model = small(drop_path_rate=0.4, drop_path_uniform=True).train()
    with torch.device("meta"):
        meta = small(drop_path_rate=0.4, drop_path_uniform=True).train()
        crops = [torch.empty(8, 3, 56, 56), torch.empty(8, 3, 28, 28)]
        masks = [torch.empty(8, 16, dtype=torch.bool), None]
    outputs = meta(crops, masks, is_training=True)  # reading a value of a meta tensor raises
    assert [output["x_prenorm"].shape[:2] for output in outputs] == [(8, 21), (8, 9)]
    assert model.training


@pytest.mark.slow
def test_blocks_compile_without_graph_breaks_for_packed_crops():
    model = small(drop_path_rate=0.4, drop_path_uniform=True)
    crops = [torch.randn(4, 3, 56, 56), torch.randn(6, 3, 28, 28)]
    expected = model(crops)
    for block in model.iterate_blocks():
        block.compile(fullgraph=True)
    for one, other in zip(model(crops), expected):
        torch.testing.assert_close(one, other)
    sum(crop["x_prenorm"].sum() for crop in model.train()(crops, is_training=True)).backward()
    assert torch.isfinite(model.patch_embed.proj.weight.grad).all()
