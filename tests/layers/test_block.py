import pytest
import torch
from torch import nn

from dinov2.layers import Block, CausalAttentionBlock, NestedTensorBlock
from dinov2.layers.block import (
    add_residual_of_subset,
    drop_add_residual_stochastic_depth,
    subset_layout,
    subset_rows,
)
from dinov2.layers.packing import pack, unpack


def test_a_block_is_attention_then_feed_forward_each_added():
    block = Block(16, 2, init_values=0.5)
    x = torch.randn(2, 5, 16)
    middle = x + 0.5 * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), middle + 0.5 * block.mlp(block.norm2(middle)))


def test_a_list_of_crops_gives_what_each_crop_gives_alone():
    block = NestedTensorBlock(16, 2, init_values=1.0)
    crops = [torch.randn(2, 7, 16), torch.randn(3, 4, 16)]
    outputs = block(crops)
    assert isinstance(outputs, list)
    for crop, output in zip(crops, outputs):
        torch.testing.assert_close(output, block(crop))


def test_a_block_refuses_what_is_no_tensor():
    with pytest.raises(TypeError, match="got str"):
        NestedTensorBlock(16, 2)("x")


@pytest.mark.parametrize(("images", "rate", "kept"), [(8, 0.3, 5), (8, 0.95, 1), (1, 0.9, 1), (10, 0.0, 10)])
def test_the_subset_keeps_the_floor_of_its_share_and_at_least_one_image(images, rate, kept):
    assert subset_layout(((images, 4),), rate) == ((kept, 4),)
    seen = []

    def branch(tokens):
        seen.append(tokens.shape)
        return torch.ones_like(tokens)

    x = torch.randn(images, 4, 6)
    change = drop_add_residual_stochastic_depth(x, branch, rate) - x
    assert seen == [(kept, 4, 6)]
    touched = change.abs().flatten(1).amax(1) > 0
    assert touched.sum() == kept
    torch.testing.assert_close(change[touched], torch.full((kept, 4, 6), images / kept))


def test_every_image_has_the_same_chance_to_be_kept():
    hits = torch.zeros(8)
    layout = ((8, 1),)
    for _ in range(2000):
        hits[subset_rows(layout, subset_layout(layout, 0.5), torch.device("cpu"))] += 1
    assert ((hits / 2000 - 0.5).abs() < 0.06).all()  # five standard deviations


def test_subsets_of_a_packing_keep_whole_images_and_scale_each_group_by_its_own_share():
    crops = [torch.zeros(8, 3, 2), torch.zeros(5, 2, 2)]
    packed, layout = pack(crops)
    out = unpack(add_residual_of_subset(packed, layout, lambda x, _: torch.ones_like(x), 0.5), layout)
    for group, kept, scale in zip(out, (4, 2), (8 / 4, 5 / 2)):
        per_image = group.flatten(1)
        assert sorted(set(per_image.flatten().tolist())) == [0.0, scale]
        assert (per_image.amin(1) == per_image.amax(1)).all()
        assert (per_image.amax(1) > 0).sum() == kept


def test_gradients_of_a_subset_reach_kept_images_scaled_and_others_untouched():
    x = torch.randn(6, 2, 3, requires_grad=True)
    drop_add_residual_stochastic_depth(x, lambda v: 2 * v, 0.5).sum().backward()
    per_image = x.grad[:, 0, 0].tolist()
    assert sorted(per_image) == [1.0] * 3 + [5.0] * 3  # 1 + 2 * 6 / 3


def test_drop_path_zero_is_the_identity_of_evaluation():
    block = Block(16, 2, init_values=1.0, drop_path=0.0)
    x = torch.randn(4, 3, 16)
    assert torch.equal(block.train()(x), block.eval()(x))


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_in_training_the_share_of_untouched_images_is_the_rate_of_both_branches(rate):
    block = Block(8, 1, init_values=1.0, drop_path=rate).train()
    x = torch.randn(1000, 2, 8)
    untouched = (block(x) == x).flatten(1).all(1).float().mean()
    assert abs(untouched - rate**2) < 0.04
    block.eval()
    assert not (block(x) == x).flatten(1).all(1).any()


def test_the_mean_over_stochastic_depth_is_the_full_residual():
    for rate in (0.1, 0.5):
        block = Block(8, 1, init_values=1.0, drop_path=rate)
        nn.init.zeros_(block.mlp.fc2.weight)
        nn.init.zeros_(block.mlp.fc2.bias)
        x = torch.randn(1, 3, 8).expand(4000, -1, -1)
        mean = block.train()(x).mean(0)
        torch.testing.assert_close(mean, block.eval()(x)[0], atol=0.03, rtol=0)


def test_a_causal_block_does_not_look_ahead():
    block = CausalAttentionBlock(16, 2, ls_init_value=1.0)
    x = torch.randn(1, 5, 16)
    changed = x.clone()
    changed[:, 3:] += 1.0
    torch.testing.assert_close(block(x)[:, :3], block(changed)[:, :3])
