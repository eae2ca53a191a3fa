import pytest
import torch

from dinov2.layers import attention
from dinov2.layers.attention import Attention, _flex, _sdpa
from dinov2.layers.packing import pack, unpack


def straight_attention(module: Attention, x: torch.Tensor) -> torch.Tensor:
    """Softmax attention written head by head, from the formula."""
    width = x.shape[-1] // module.num_heads
    query, key, value = module.qkv(x).split(x.shape[-1], dim=-1)
    heads = []
    for head in range(module.num_heads):
        columns = slice(head * width, (head + 1) * width)
        q, k, v = query[..., columns], key[..., columns], value[..., columns]
        weights = torch.exp(q @ k.transpose(1, 2) / width**0.5)
        heads.append(weights / weights.sum(-1, keepdim=True) @ v)
    return module.proj(torch.cat(heads, dim=-1))


def test_attention_is_the_softmax_of_scaled_products():
    module = Attention(24, num_heads=3, qkv_bias=True)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(module(x), straight_attention(module, x))


def test_tokens_of_a_packed_image_never_see_another_image():
    module = Attention(16, num_heads=2)
    crops = [torch.randn(2, 7, 16), torch.randn(3, 4, 16), torch.randn(1, 4, 16)]
    packed, layout = pack(crops)
    for alone, together in zip(crops, unpack(module(packed, layout), layout)):
        torch.testing.assert_close(together, straight_attention(module, alone))


@pytest.mark.parametrize("tokens", [9, 1025])  # by matrix products, and above their limit by the fused kernel
def test_auto_in_bfloat16_agrees_with_float32_forward_and_backward(tokens):
    module = Attention(16, num_heads=2, qkv_bias=True)
    results = []
    for enabled in (False, True):
        x = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = module(x)
        output.float().square().sum().backward()
        results.append((output.float(), x.grad))
    for exact, rough in zip(*results):
        assert (exact - rough).norm() / exact.norm() < 0.03


def test_causal_attention_does_not_look_ahead():
    module = Attention(16, num_heads=2)
    x = torch.randn(1, 6, 16)
    changed = x.clone()
    changed[:, 4:] += 1.0
    before, after = module(x, is_causal=True), module(changed, is_causal=True)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_the_attention_map_mixes_values_to_the_output_of_the_forward_pass():
    module = Attention(24, num_heads=3, qkv_bias=True)
    x = torch.randn(2, 5, 24)
    weights = module.attention_map(x)
    assert weights.shape == (2, 3, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))
    value = module.qkv(x)[..., 48:].unflatten(-1, (3, 8)).transpose(1, 2)
    torch.testing.assert_close(module.proj((weights @ value).transpose(1, 2).flatten(2)), module(x))


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_agrees_with_sdpa_on_a_packing(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr("dinov2.layers.attention._compiled_flex_attention", lambda: flex_attention)
    layout = ((2, 9), (3, 5))
    qkv = torch.randn(33, 3, 2, 16)
    torch.testing.assert_close(_flex(qkv, layout), _sdpa(qkv, layout))


def test_auto_stores_no_large_attention_matrix_on_a_cpu(monkeypatch):
    calls = []
    products = attention._attend_by_products
    monkeypatch.setattr(attention, "_attend_by_products", lambda *args: calls.append(1) or products(*args))
    qkv = torch.randn(40, 3, 2, 16, dtype=torch.bfloat16)
    attention._auto(qkv, ((4, 10),))
    assert calls == [1]
    monkeypatch.setattr(attention, "LARGEST_BY_PRODUCTS", 4 * 2 * 10 * 10 * 2 - 1)  # images, heads, tokens, bytes
    attention._auto(qkv, ((2, 10), (2, 10)))  # crops of one size share a matrix
    assert calls == [1]


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("varlen", "bfloat16 on a CUDA device"),
        ("flex", "has no gradients on cpu"),
        ("nope", "choose one of"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend, reason):
    with pytest.raises(ValueError, match=reason):
        Attention(16, num_heads=2, attention_backend=backend)(torch.randn(1, 4, 16))


def test_a_backend_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install xformers"):
        Attention(16, num_heads=2, attention_backend="xformers")


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="dim=10 is not a multiple of num_heads=3"):
        Attention(10, num_heads=3)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_gpu_backends_agree_with_sdpa_forward_and_backward(backend):
    layout = ((3, 261), (5, 54))
    module = Attention(384, num_heads=6, qkv_bias=True).cuda().bfloat16()
    x = torch.randn(3 * 261 + 5 * 54, 384, device="cuda", dtype=torch.bfloat16)
    results = []
    for name in ("sdpa", backend):
        module.attention_backend = name
        leaf = x.clone().requires_grad_()
        output = module(leaf, layout)
        output.float().square().sum().backward()
        results.append((output, leaf.grad))
    for one, other in zip(*results):
        assert (one - other).norm() / one.norm() < 0.02
