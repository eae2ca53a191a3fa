"""The vision transformer of DINOv2: class token, optional registers, patch tokens, pre-norm blocks.

Source: Oquab et al., "DINOv2: learning robust visual features without supervision", 2023; registers: Darcet et al.,
"Vision transformers need registers", ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.layers import MemEffAttention, Mlp, NestedTensorBlock, PatchEmbed, SwiGLUFFNFused
from dinov2.layers.packing import pack, unpack

from .pos_embed import resize_grid

FFN_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "swiglu": SwiGLUFFNFused,
    "swiglufused": SwiGLUFFNFused,
    "identity": nn.Identity,
}


class ChoiceError(ValueError, AssertionError):
    """A choice that does not exist. DINOv2 raises AssertionError in these places, so callers may catch either."""


class BlockChunk(nn.ModuleList):
    """Consecutive blocks run as one module. Placeholders in front keep each block's number in its name."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Run the blocks in order, placeholders skipped."""
        for block in self:
            if not isinstance(block, nn.Identity):
                x = block(x, *args)
        return x


class DinoVisionTransformer(nn.Module):
    """A vision transformer that returns features of the image and of every patch.

    Args:
        img_size: side of the images that `pos_embed` is sized for, pixels; other sizes are interpolated.
        patch_size: side of a patch, pixels.
        in_chans: image channels.
        embed_dim: width of a token (D).
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forward networks over `embed_dim`.
        qkv_bias: bias of the query, key and value projections.
        ffn_bias: biases of the feed-forward networks.
        proj_bias: bias of the attention's output projections.
        drop_path_rate: stochastic depth.
        drop_path_uniform: the same rate in all blocks; otherwise it grows from 0 to `drop_path_rate`.
        init_values: start of LayerScale; None or 0 for no LayerScale.
        embed_layer: builds the patch embedding.
        act_layer: activation of the feed-forward networks.
        block_fn: builds a block.
        ffn_layer: `mlp`, `swiglu` (= `swiglufused`) or `identity`.
        block_chunks: 0, or into how many `BlockChunk`s the blocks are grouped; only names in the state dict change.
        num_register_tokens: registers (R).
        interpolate_antialias: filter positions when they shrink (models with registers).
        interpolate_offset: see `pos_embed.resize_grid` (0.1 for models without registers, 0 with).
        attention_backend: one of `dinov2.layers.ATTENTION_BACKENDS`.

    Raises:
        ValueError: an unknown choice, or block_chunks that do not divide depth.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ffn_bias: bool = True,
        proj_bias: bool = True,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,
        init_values: float | None = None,
        embed_layer: Callable[..., nn.Module] = PatchEmbed,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        block_fn: Callable[..., nn.Module] = NestedTensorBlock,
        ffn_layer: str = "mlp",
        block_chunks: int = 1,
        num_register_tokens: int = 0,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        if ffn_layer not in FFN_LAYERS:
            raise ValueError(f"ffn_layer={ffn_layer!r} is unknown; choose one of {', '.join(FFN_LAYERS)}")
        if block_chunks < 0 or (block_chunks > 0 and depth % block_chunks):
            divisors = [n for n in range(1, depth + 1) if depth % n == 0]
            raise ValueError(
                f"block_chunks={block_chunks} does not divide the {depth} blocks; use 0 or one of {divisors}"
            )
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.embed_dim = self.num_features = embed_dim
        self.num_tokens = 1
        self.n_blocks = depth
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.ffn_layer = ffn_layer
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias = interpolate_antialias
        self.interpolate_offset = interpolate_offset
        self.attention_backend = attention_backend

        self.patch_embed = embed_layer(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        step = drop_path_rate / max(depth - 1, 1)
        blocks = [
            block_fn(
                dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
                drop_path=drop_path_rate if drop_path_uniform else step * i,
                norm_layer=norm_layer,
                act_layer=act_layer,
                ffn_layer=FFN_LAYERS[ffn_layer],
                init_values=init_values,
                attn_class=partial(MemEffAttention, attention_backend=attention_backend),
            )
            for i in range(depth)
        ]
        self.chunked_blocks = block_chunks > 0
        self.blocks = nn.ModuleList(_chunks(blocks, block_chunks) if self.chunked_blocks else blocks)
        self.norm = norm_layer(embed_dim)
        self.head = nn.Identity()
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal weights (standard deviation 0.02), zero biases, tokens next to zero, mask token zero."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def iterate_blocks(self) -> Iterator[nn.Module]:
        """The blocks in order, whether they are chunked or not."""
        for entry in self.blocks:
            if isinstance(entry, BlockChunk):
                yield from (block for block in entry if not isinstance(block, nn.Identity))
            else:
                yield entry

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        """Positions `(1, 1 + N, D)` in the dtype of `x`, for images of another size.

        Args:
            x: class and patch tokens `(B, 1 + N, D)`; only the dtype matters.
            w: first spatial dimension of the images (their rows), pixels; DINOv2's name for it.
            h: second spatial dimension (their columns), pixels.
        """
        built_for = self.patch_embed.patches_resolution
        wanted = (w // self.patch_size, h // self.patch_size)
        if wanted == built_for:
            return self.pos_embed.to(x.dtype)
        positions = self.pos_embed.float()
        grid = resize_grid(
            positions[:, 1:].unflatten(1, built_for),
            wanted,
            antialias=self.interpolate_antialias,
            offset=self.interpolate_offset,
        )
        return torch.cat((positions[:, :1], grid.flatten(1, 2)), dim=1).to(x.dtype)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images `(B, C, H, W)` to tokens `(B, 1 + R + N, D)`: class, registers (without position), patches.

        Args:
            x: images.
            masks: boolean `(B, N)`, True where the mask token stands in for a patch.
        """
        rows, columns = x.shape[-2:]
        x = self.patch_embed(x)
        if masks is not None:
            if masks.shape != x.shape[:2]:
                raise ValueError(
                    f"masks have shape {tuple(masks.shape)}, expected (images, patches) = {tuple(x.shape[:2])}"
                )
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype).unsqueeze(0), x)
        x = torch.cat((self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.interpolate_pos_encoding(x, rows, columns)
        if self.register_tokens is None:
            return x
        registers = self.register_tokens.to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.cat((x[:, :1], registers, x[:, 1:]), dim=1)

    def forward_features(
        self, x: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor | None] | None = None
    ) -> dict[str, Tensor | None] | list[dict[str, Tensor | None]]:
        """Features of images `(B, C, H, W)`, or of a list of such crops of different sizes.

        Returns:
            `x_norm_clstoken (B, D)`, `x_norm_regtokens (B, R, D)`, `x_norm_patchtokens (B, N, D)`,
            `x_prenorm (B, 1 + R + N, D)` and the given `masks`; for a list of crops, a list of such dicts.
        """
        if not isinstance(x, Tensor):
            return self.forward_features_list(x, masks if masks is not None else [None] * len(x))
        return self.forward_features_list([x], [masks])[0]

    def forward_features_list(
        self, x_list: Sequence[Tensor], masks_list: Sequence[Tensor | None]
    ) -> list[dict[str, Tensor | None]]:
        """`forward_features` of several crop sizes in one pass, without padding: tokens share every linear layer."""
        x, layout = pack(
            [self.prepare_tokens_with_masks(x, masks) for x, masks in zip(x_list, masks_list, strict=True)]
        )
        for block in self.blocks:
            x = block(x, layout)
        return [
            self._feature_dict(normed, prenorm, masks)
            for normed, prenorm, masks in zip(unpack(self.norm(x), layout), unpack(x, layout), masks_list)
        ]

    def _feature_dict(self, normed: Tensor, prenorm: Tensor, masks: Tensor | None) -> dict[str, Tensor | None]:
        first_patch = self.num_register_tokens + 1
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first_patch],
            "x_norm_patchtokens": normed[:, first_patch:],
            "x_prenorm": prenorm,
            "masks": masks,
        }

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
        is_training: bool = False,
    ) -> Any:
        """Normalised class token `(B, D)`, or with `is_training` all that `forward_features` returns."""
        features = self.forward_features(x, masks)
        if is_training:
            return features
        if isinstance(features, list):
            return [self.head(crop["x_norm_clstoken"]) for crop in features]
        return self.head(features["x_norm_clstoken"])

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Patch features after some of the blocks.

        Args:
            x: images `(B, C, H, W)`.
            n: the last `n` blocks, or the numbers of the blocks.
            reshape: `(B, D, rows, columns)` in place of `(B, N, D)`.
            return_class_token: pairs of patch features and class token `(B, D)`.
            norm: apply the final LayerNorm.

        Raises:
            ValueError: a block that does not exist (also an AssertionError, as in DINOv2).
        """
        wanted = list(range(self.n_blocks - n, self.n_blocks)) if isinstance(n, int) else list(n)
        if not set(wanted) <= set(range(self.n_blocks)):
            raise ChoiceError(f"n={n} asks for blocks that do not exist; the model has blocks 0 to {self.n_blocks - 1}")
        outputs = self._block_outputs(x, wanted)
        if norm:
            outputs = [self.norm(output) for output in outputs]
        class_tokens = [output[:, 0] for output in outputs]
        patches = [output[:, 1 + self.num_register_tokens :] for output in outputs]
        if reshape:
            grid = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
            patches = [patch.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for patch in patches]
        return tuple(zip(patches, class_tokens)) if return_class_token else tuple(patches)

    def _block_outputs(self, x: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """Tokens `(B, 1 + R + N, D)` after each wanted block, in the blocks' order."""
        x, layout = pack([self.prepare_tokens_with_masks(x)])
        outputs = []
        for index, block in enumerate(self.iterate_blocks()):
            x = block(x, layout)
            if index in wanted:
                outputs += unpack(x, layout)
        return outputs

    def get_self_attention(self, x: Tensor, block: int = -1, masks: Tensor | None = None) -> Tensor:
        """Attention weights of one block, from the queries and keys of the forward pass.

        Args:
            x: images `(B, C, H, W)`.
            block: number of the block; negative numbers count from the end.
            masks: as in `forward_features`.

        Returns:
            `(B, heads, tokens, tokens)`, tokens: class, registers, patches; row `i` is what token `i` reads.
        """
        blocks = list(self.iterate_blocks())
        if not -len(blocks) <= block < len(blocks):
            raise ChoiceError(f"block={block} does not exist; the model has blocks 0 to {len(blocks) - 1}")
        tokens = self.prepare_tokens_with_masks(x, masks)
        for earlier in blocks[: block % len(blocks)]:
            tokens = earlier(tokens)
        return blocks[block].attn.attention_map(blocks[block].norm1(tokens))

    def get_last_self_attention(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Attention weights `(B, heads, tokens, tokens)` of the last block."""
        return self.get_self_attention(x, -1, masks)


def _chunks(blocks: list[nn.Module], block_chunks: int) -> list[BlockChunk]:
    size = len(blocks) // block_chunks
    return [
        BlockChunk([nn.Identity() for _ in range(start)] + blocks[start : start + size])
        for start in range(0, len(blocks), size)
    ]


# Width, blocks and heads by name; all heads are 64 wide.
SIZES: dict[str, dict[str, int]] = {
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_giant2": {"embed_dim": 1536, "depth": 40, "num_heads": 24},
}


def vit_tiny(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-Ti (5.5 M parameters); for small machines, not in DINOv2."""
    return _vit("vit_tiny", patch_size, num_register_tokens, **kwargs)


def vit_small(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-S (22 M parameters)."""
    return _vit("vit_small", patch_size, num_register_tokens, **kwargs)


def vit_base(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-B (86 M parameters)."""
    return _vit("vit_base", patch_size, num_register_tokens, **kwargs)


def vit_large(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-L (300 M parameters)."""
    return _vit("vit_large", patch_size, num_register_tokens, **kwargs)


def vit_giant2(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """DINOv2's ViT-g (1.1 G parameters)."""
    return _vit("vit_giant2", patch_size, num_register_tokens, **kwargs)


def _vit(arch: str, patch_size: int, num_register_tokens: int, **kwargs: Any) -> DinoVisionTransformer:
    return DinoVisionTransformer(
        patch_size=patch_size, num_register_tokens=num_register_tokens, **{**SIZES[arch], **kwargs}
    )


ARCHITECTURES: dict[str, Callable[..., DinoVisionTransformer]] = {
    "vit_tiny": vit_tiny,
    "vit_small": vit_small,
    "vit_base": vit_base,
    "vit_large": vit_large,
    "vit_giant2": vit_giant2,
}
