"""Multi-head self-attention over packed crops, and the choice of its kernel.

This is the only file that knows attention kernels. Each one takes queries, keys and values packed as
`(tokens, 3, heads, head dim)` with their `Layout` and returns `(tokens, heads, head dim)`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packing import Layout, merge_equal_lengths, sequence_offsets, unpack

ATTENTION_BACKENDS = ("auto", "sdpa", "flex", "varlen", "xformers")
LONGEST_BY_PRODUCTS = 1024  # tokens; above, `auto` no longer gains on a CPU
LARGEST_BY_PRODUCTS = 2**26  # bytes of the attention matrix of one crop size; each block keeps it for its backward pass


def _auto(qkv: Tensor, layout: Layout, dropout: float = 0.0, is_causal: bool = False) -> Tensor:
    """The fastest kernel that runs everywhere, one call per crop size.

    PyTorch's fused attention picks the best kernel a GPU has (cuDNN, flash, memory-efficient or plain). On a CPU in
    bfloat16 its backward pass costs two to five times the plain matrix products (docs/benchmarks.md), which are used
    there while their attention matrix is small.
    """
    on_cpu = qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16
    if on_cpu and not dropout and not is_causal and _matrix_is_small(qkv, layout):
        return _per_crop_size(qkv, layout, _attend_by_products)
    return _sdpa(qkv, layout, dropout, is_causal)


def _matrix_is_small(qkv: Tensor, layout: Layout) -> bool:
    longest = max(length for _, length in layout)
    scores = max(images * length**2 for images, length in merge_equal_lengths(layout))
    matrix = scores * qkv.shape[2] * qkv.element_size()
    return longest <= LONGEST_BY_PRODUCTS and matrix <= LARGEST_BY_PRODUCTS


def _sdpa(qkv: Tensor, layout: Layout, dropout: float = 0.0, is_causal: bool = False) -> Tensor:
    """PyTorch's fused attention, one call per crop size."""
    fused = functools.partial(F.scaled_dot_product_attention, dropout_p=dropout, is_causal=is_causal)
    return _per_crop_size(qkv, layout, fused)


def _per_crop_size(qkv: Tensor, layout: Layout, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Call `attend` on `(images, heads, tokens, head dim)` queries, keys and values of each crop size."""
    outputs = []
    for group in unpack(qkv, merge_equal_lengths(layout)):
        query, key, value = group.permute(2, 0, 3, 1, 4).unbind(0)
        outputs.append(attend(query, key, value).transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention as two matrix products around a softmax; stores the attention matrix."""
    return (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1) @ value


def _varlen(qkv: Tensor, layout: Layout) -> Tensor:
    """One variable-length flash or cuDNN kernel over the whole packing."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = qkv.unbind(1)
    offsets = sequence_offsets(layout, qkv.device)
    longest = max(length for _, length in layout)
    return varlen_attn(query, key, value, offsets, offsets, longest, longest)


def _flex(qkv: Tensor, layout: Layout) -> Tensor:
    """FlexAttention over the whole packing, with a block-diagonal mask."""
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled, FlexAttention stores the attention matrix; inside a graph under compilation it is compiled anyway.
    kernel = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    query, key, value = qkv.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
    output = kernel(query, key, value, block_mask=_same_image_mask(layout, qkv.device))
    return output.squeeze(0).transpose(0, 1)


@functools.lru_cache(maxsize=1)
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=64)
def _same_image_mask(layout: Layout, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    offsets = sequence_offsets(layout, device)
    total = sum(images * length for images, length in layout)
    image = torch.bucketize(torch.arange(total, device=device, dtype=torch.int32), offsets, right=True)

    def same_image(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return image[row] == image[column]

    return create_block_mask(same_image, None, None, total, total, device=str(device))


def _xformers(qkv: Tensor, layout: Layout) -> Tensor:
    """xFormers' memory-efficient attention over the whole packing, with a block-diagonal mask."""
    from xformers.ops import memory_efficient_attention

    query, key, value = qkv.unsqueeze(0).unbind(2)
    return memory_efficient_attention(query, key, value, attn_bias=_xformers_mask(layout)).squeeze(0)


@functools.lru_cache(maxsize=64)
def _xformers_mask(layout: Layout):
    from xformers.ops.fmha import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens([length for images, length in layout for _ in range(images)])


_KERNELS: dict[str, Callable[..., Tensor]] = {
    "auto": _auto,
    "sdpa": _sdpa,
    "varlen": _varlen,
    "flex": _flex,
    "xformers": _xformers,
}
_MODULES = {"varlen": "torch.nn.attention.varlen", "flex": "torch.nn.attention.flex_attention", "xformers": "xformers"}


def check_attention_backend(backend: str) -> None:
    """Raise ValueError when this installation has no such attention backend."""
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"attention_backend={backend!r} is unknown; choose one of {', '.join(ATTENTION_BACKENDS)}")
    module = _MODULES.get(backend)
    if module is not None and importlib.util.find_spec(module) is None:
        fix = "pip install xformers" if backend == "xformers" else "update PyTorch"
        raise ValueError(f"attention_backend={backend!r} needs {module}, which is not installed: {fix}, or use 'auto'")


def _kernel_for(backend: str, qkv: Tensor) -> Callable[..., Tensor]:
    """The backend's kernel, or ValueError with the reason why it cannot run on this tensor."""
    if backend == "varlen" and not (qkv.is_cuda and qkv.dtype in (torch.float16, torch.bfloat16)):
        raise ValueError(
            f"attention_backend='varlen' runs in float16 or bfloat16 on a CUDA device, not in "
            f"{str(qkv.dtype).removeprefix('torch.')} on {qkv.device.type}; use 'auto' or 'sdpa'"
        )
    if backend == "flex" and qkv.requires_grad and not qkv.is_cuda:
        raise ValueError(f"attention_backend='flex' has no gradients on {qkv.device.type}; use 'auto' or 'sdpa'")
    if backend == "xformers" and not qkv.is_cuda:
        raise ValueError(f"attention_backend='xformers' runs on CUDA, not on {qkv.device.type}; use 'auto' or 'sdpa'")
    return _KERNELS[backend]


class Attention(nn.Module):
    """Multi-head self-attention within each image.

    Args:
        dim: width of a token, a multiple of num_heads.
        num_heads: attention heads.
        qkv_bias: bias of the query, key and value projection.
        proj_bias: bias of the output projection.
        attn_drop: dropout of attention weights in training (`auto` and `sdpa` only).
        proj_drop: dropout of the output in training.
        attention_backend: one of `ATTENTION_BACKENDS`.

    Raises:
        ValueError: dim that heads do not divide, or a backend that is unknown or cannot run.

    Source: Vaswani et al., "Attention is all you need", 2017.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not a multiple of num_heads={num_heads}")
        if attn_drop and attention_backend not in ("auto", "sdpa"):
            raise ValueError(
                f"attn_drop={attn_drop} needs attention_backend 'auto' or 'sdpa', not {attention_backend!r}"
            )
        check_attention_backend(attention_backend)
        self.num_heads = num_heads
        self.attention_backend = attention_backend
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, layout: Layout | None = None, is_causal: bool = False) -> Tensor:
        """Mix the tokens of each image.

        Args:
            x: `(images, tokens, dim)`, or packed `(total tokens, dim)` with a layout.
            layout: groups of the packed rows.
            is_causal: a token sees only itself and those before it (`auto` and `sdpa` only).
        """
        if layout is None:
            images, length, _ = x.shape
            return self(x.flatten(0, 1), ((images, length),), is_causal).unflatten(0, (images, length))
        qkv = self._project(x)
        kernel = _kernel_for(self.attention_backend, qkv)
        if kernel in (_auto, _sdpa):
            mixed = kernel(qkv, layout, self.attn_drop if self.training else 0.0, is_causal)
        elif is_causal:
            raise ValueError(
                f"causal attention needs attention_backend 'auto' or 'sdpa', not {self.attention_backend!r}"
            )
        else:
            mixed = kernel(qkv, layout)
        return self.proj_drop(self.proj(mixed.flatten(1)))

    def attention_map(self, x: Tensor) -> Tensor:
        """Attention weights `(images, heads, tokens, tokens)` of normed tokens `(images, tokens, dim)`."""
        images, length, _ = x.shape
        (qkv,) = unpack(self._project(x.flatten(0, 1)), ((images, length),))
        query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)

    def _project(self, x: Tensor) -> Tensor:
        """Packed tokens `(total, dim)` to queries, keys and values `(total, 3, heads, head dim)`."""
        return self.qkv(x).unflatten(1, (3, self.num_heads, -1))


class MemEffAttention(Attention):
    """DINOv2's name for attention that never stores the attention matrix; here every `Attention` is like that."""
