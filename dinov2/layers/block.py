"""Transformer blocks with stochastic depth that skips the work of the images it drops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .attention import Attention
from .drop_path import DropPath
from .layer_scale import LayerScale
from .mlp import Mlp
from .packing import Layout, pack, unpack

SUBSET_ABOVE_RATE = 0.1  # below it too few images are dropped to pay for gathering the others


def subset_layout(layout: Layout, sample_drop_ratio: float) -> Layout:
    """The layout that remains when a share of the images of each group is left out, at least one image each."""
    return tuple((max(int(images * (1 - sample_drop_ratio)), 1), length) for images, length in layout)


def subset_rows(layout: Layout, kept: Layout, device: torch.device) -> Tensor:
    """Row numbers `(kept tokens,)` of a random choice of images, group by group; drawn on the device."""
    parts, start = [], 0
    for (images, length), (kept_images, _) in zip(layout, kept):
        chosen = torch.rand(images, device=device).argsort()[:kept_images]
        parts.append((chosen.unsqueeze(1) * length + torch.arange(start, start + length, device=device)).flatten())
        start += images * length
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def add_residual_of_subset(
    x: Tensor, layout: Layout, residual: Callable[[Tensor, Layout], Tensor], sample_drop_ratio: float
) -> Tensor:
    """Add a residual branch to a random subset of the images only, scaled by images / kept images of each group.

    Args:
        x: packed tokens `(total tokens, dim)`.
        layout: groups of the packed rows.
        residual: the branch, called with the kept tokens and their layout.
        sample_drop_ratio: share of the images of each group that skip the branch.

    Source: Oquab et al., "DINOv2", 2023, section 5 (efficient stochastic depth).
    """
    kept = subset_layout(layout, sample_drop_ratio)
    rows = subset_rows(layout, kept, x.device)
    update = residual(x.index_select(0, rows), kept)
    scales = [images / kept_images for (images, _), (kept_images, _) in zip(layout, kept)]
    if len(set(scales)) > 1:
        update = pack([part * scale for part, scale in zip(unpack(update, kept), scales)])[0]
        scales = [1.0]
    return x.index_add(0, rows, update.to(x.dtype), alpha=scales[0])


def drop_add_residual_stochastic_depth(
    x: Tensor, residual_func: Callable[[Tensor], Tensor], sample_drop_ratio: float = 0.0
) -> Tensor:
    """`add_residual_of_subset` for one group of images `(images, tokens, dim)` and a branch that takes such a group."""
    packed, layout = pack([x])

    def branch(rows: Tensor, kept: Layout) -> Tensor:
        return residual_func(*unpack(rows, kept)).flatten(0, 1)

    return add_residual_of_subset(packed, layout, branch, sample_drop_ratio).view_as(x)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then feed-forward, each a residual branch.

    In training, a `drop_path` rate above 0.1 leaves out that share of the images (they cost nothing); a lower rate
    zeroes each image's branch at random; 0 changes nothing.

    Args:
        dim: width of a token.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forward network over `dim`.
        qkv_bias: bias of the query, key and value projection.
        proj_bias: bias of the attention's output projection.
        ffn_bias: biases of the feed-forward network.
        drop: dropout of the outputs of both branches.
        attn_drop: dropout of attention weights.
        init_values: start of LayerScale; None or 0 for no LayerScale.
        drop_path: rate of stochastic depth.
        act_layer: activation of the feed-forward network.
        norm_layer: built with `dim`.
        attn_class: an `Attention`, or a partial of it.
        ffn_layer: the feed-forward network, such as `Mlp` or `SwiGLUFFNFused`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        attn_class: Callable[..., nn.Module] = Attention,
        ffn_layer: Callable[..., nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn_class(
            dim, num_heads=num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias, attn_drop=attn_drop, proj_drop=drop
        )
        self.ls1 = LayerScale(dim, init_values=init_values) if init_values else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(
            in_features=dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer, drop=drop, bias=ffn_bias
        )
        self.ls2 = LayerScale(dim, init_values=init_values) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path)
        self.sample_drop_ratio = drop_path

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """Transform `(images, tokens, dim)`, or packed `(total tokens, dim)` with a layout; same shape out."""
        if layout is None:
            images, length, _ = x.shape
            return self(x.flatten(0, 1), ((images, length),)).unflatten(0, (images, length))
        x = self._add(x, layout, self._attention_branch)
        return self._add(x, layout, self._ffn_branch)

    def _attention_branch(self, x: Tensor, layout: Layout) -> Tensor:
        return self.ls1(self.attn(self.norm1(x), layout))

    def _ffn_branch(self, x: Tensor, layout: Layout) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))

    def _add(self, x: Tensor, layout: Layout, residual: Callable[[Tensor, Layout], Tensor]) -> Tensor:
        if not self.training or self.sample_drop_ratio == 0.0:
            return x + residual(x, layout)
        if self.sample_drop_ratio > SUBSET_ABOVE_RATE:
            return add_residual_of_subset(x, layout, residual, self.sample_drop_ratio)
        return x + pack([self.drop_path(group) for group in unpack(residual(x, layout), layout)])[0]


class NestedTensorBlock(Block):
    """A `Block` that also takes a list of groups `(images, tokens, dim)` of different sizes and returns such a list."""

    def forward(self, x: Tensor | Sequence[Tensor], layout: Layout | None = None) -> Tensor | list[Tensor]:
        """Transform a tensor as `Block` does, or each tensor of a list as if it came alone."""
        if isinstance(x, Tensor):
            return super().forward(x, layout)
        if isinstance(x, (list, tuple)):
            packed, layout = pack(x)
            return unpack(super().forward(packed, layout), layout)
        raise TypeError(f"expected a tensor or a list of tensors, got {type(x).__name__}")


class CausalAttentionBlock(nn.Module):
    """Pre-norm block whose tokens see only those before them, as in text encoders.

    Args:
        dim: width of a token.
        num_heads: attention heads.
        ffn_ratio: hidden width of the feed-forward network over `dim`.
        ls_init_value: start of LayerScale; None or 0 for no LayerScale.
        is_causal: False lets every token see all others.
        act_layer: activation of the feed-forward network.
        norm_layer: built with `dim`.
        dropout_prob: dropout everywhere.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_ratio: float = 4.0,
        ls_init_value: float | None = None,
        is_causal: bool = True,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        dropout_prob: float = 0.0,
    ) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.ls1 = LayerScale(dim, init_values=ls_init_value) if ls_init_value else nn.Identity()
        self.attention_norm = norm_layer(dim)
        self.attention = Attention(dim, num_heads, attn_drop=dropout_prob, proj_drop=dropout_prob)
        self.ffn_norm = norm_layer(dim)
        self.feed_forward = Mlp(dim, int(dim * ffn_ratio), act_layer=act_layer, drop=dropout_prob)
        self.ls2 = LayerScale(dim, init_values=ls_init_value) if ls_init_value else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform `(sequences, tokens, dim)`; same shape out."""
        x = x + self.ls1(self.attention(self.attention_norm(x), is_causal=self.is_causal))
        return x + self.ls2(self.feed_forward(self.ffn_norm(x)))
