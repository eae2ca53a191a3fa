import math

import pytest
import torch
import torch.nn.functional as F

from dinov2.layers import DropPath, LayerScale, Mlp, PatchEmbed, SwiGLUFFN, SwiGLUFFNAligned, SwiGLUFFNFused
from dinov2.layers.drop_path import drop_path
from dinov2.layers.packing import merge_equal_lengths, pack, sequence_offsets, unpack


def test_layer_scale_multiplies_channels_and_starts_at_its_value():
    scale = LayerScale(3, init_values=0.25)
    torch.testing.assert_close(scale(torch.tensor([[4.0, 8.0, -4.0]])), torch.tensor([[1.0, 2.0, -1.0]]))
    assert LayerScale(4).gamma.tolist() == pytest.approx([1e-5] * 4)


def test_layer_scale_can_work_in_place():
    x = torch.ones(2, 3)
    with torch.no_grad():
        y = LayerScale(3, init_values=0.5, inplace=True)(x)
    assert y.data_ptr() == x.data_ptr()
    assert x.unique().tolist() == [0.5]


def test_drop_path_zeroes_whole_images_and_rescales_the_others():
    y = DropPath(0.25).train()(torch.ones(4000, 3))
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (y.amin(1) == y.amax(1)).all()
    assert abs((y[:, 0] > 0).float().mean() - 0.75) < 0.035


def test_drop_path_does_nothing_in_evaluation_or_at_rate_zero():
    x = torch.randn(4, 3)
    assert DropPath(0.25).eval()(x) is x
    assert drop_path(x, 0.0, training=True) is x


def test_mlp_is_linear_gelu_linear():
    mlp = Mlp(4, 6, 3)
    x = torch.randn(2, 4)
    hidden = mlp.fc1(x)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(mlp(x), mlp.fc2(hidden))


def test_swiglu_gates_with_the_first_half():
    ffn = SwiGLUFFN(4, 6)
    x = torch.randn(2, 4)
    first, second = ffn.w12(x)[:, :6], ffn.w12(x)[:, 6:]
    torch.testing.assert_close(ffn(x), ffn.w3(first * torch.sigmoid(first) * second))


@pytest.mark.parametrize(("asked", "hidden"), [(40, 32), (48, 32), (96, 64), (100, 72), (1536, 1024), (6144, 4096)])
def test_fused_swiglu_is_two_thirds_wide_rounded_up_to_eight(asked, hidden):
    ffn = SwiGLUFFNFused(24, asked)
    assert tuple(ffn.w12.weight.shape) == (2 * hidden, 24)
    assert tuple(ffn.w3.weight.shape) == (24, hidden)


def test_aligned_swiglu_equals_the_fused_one_with_the_same_weights():
    aligned, fused = SwiGLUFFNAligned(24, 40, align_to=8), SwiGLUFFNFused(24, 40)
    fused.load_state_dict(
        {
            f"{name}.{kind}": tensor
            for kind in ("weight", "bias")
            for name, tensor in (
                ("w12", torch.cat([getattr(aligned.w1, kind), getattr(aligned.w2, kind)])),
                ("w3", getattr(aligned.w3, kind)),
            )
        }
    )
    x = torch.randn(3, 24)
    torch.testing.assert_close(aligned(x), fused(x))


def test_patches_are_read_row_by_row():
    embed = PatchEmbed(img_size=28, patch_size=14, embed_dim=5)
    image = torch.randn(1, 3, 42, 28)  # three rows of two patches
    patch = image[:, :, 28:42, 14:28]  # the last one
    expected = F.linear(patch.flatten(1), embed.proj.weight.flatten(1), embed.proj.bias)
    tokens = embed(image)
    assert tokens.shape == (1, 6, 5)
    torch.testing.assert_close(tokens[:, 5], expected)


def test_patch_tokens_can_stay_in_their_grid():
    embed = PatchEmbed(img_size=28, patch_size=7, embed_dim=16, flatten_embedding=False)
    assert embed(torch.zeros(2, 3, 28, 35)).shape == (2, 4, 5, 16)


def test_an_image_that_does_not_fit_the_patches_is_refused_with_the_nearest_sizes():
    embed = PatchEmbed(img_size=28, patch_size=14, embed_dim=8)
    with pytest.raises(ValueError, match=r"width 96 is not a multiple of the patch size 14.*84 and 98"):
        embed(torch.zeros(1, 3, 28, 96))
    with pytest.raises(ValueError, match=r"height 7 .* 14"):
        embed(torch.zeros(1, 3, 7, 28))


def test_images_with_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\), got shape \(1, 1, 28, 28\)"):
        PatchEmbed(img_size=28, patch_size=14, embed_dim=8)(torch.zeros(1, 1, 28, 28))


def test_packing_and_unpacking_are_inverse():
    crops = [torch.randn(2, 3, 4), torch.randn(1, 5, 4)]
    packed, layout = pack(crops)
    assert packed.shape == (11, 4)
    assert layout == ((2, 3), (1, 5))
    assert all(torch.equal(a, b) for a, b in zip(unpack(packed, layout), crops))


def test_sequence_offsets_are_where_each_image_starts():
    offsets = sequence_offsets(((2, 3), (1, 5)), torch.device("cpu"))
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [0, 3, 6, 11]


def test_neighbouring_groups_of_equal_length_become_one():
    assert merge_equal_lengths(((2, 5), (3, 5), (1, 4), (1, 5))) == ((5, 5), (1, 4), (1, 5))
