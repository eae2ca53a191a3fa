"""What a backbone is, read from its weights: the options that build it again."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2.layers.swiglu_ffn import two_thirds

from .key_maps import plain_name
from .vision_transformer import SIZES, DinoVisionTransformer

RELEASED_IMAGE_SIZE = 518  # pixels; DINOv2's released weights were finished at this size


def infer_architecture(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the options of a backbone from its tensors in plain names (`blocks.0.norm1.weight`).

    Shapes tell everything but the number of heads (64 channels each is assumed, as in all named sizes) and how
    positions are interpolated (as DINOv2 does it: filtered and without offset in its released models with registers).

    Returns:
        `arch` (None for a size without name) and the keyword arguments of `DinoVisionTransformer`.

    Raises:
        ValueError: the tensors are not those of a vision transformer of this kind.
    """
    try:
        kernel, positions = state_dict["patch_embed.proj.weight"], state_dict["pos_embed"]
        depth = 1 + max(int(match[1]) for name in state_dict if (match := re.match(r"blocks\.(\d+)\.", name)))
    except (KeyError, ValueError):
        raise ValueError(
            "not a vision transformer: patch_embed.proj.weight, pos_embed or blocks are missing; "
            f"it has {', '.join(list(state_dict)[:4])}"
        ) from None
    width, in_chans, patch_size, _ = kernel.shape
    size = {"embed_dim": width, "depth": depth, "num_heads": width // 64 if width % 64 == 0 else None}
    registers = state_dict["register_tokens"].shape[1] if "register_tokens" in state_dict else 0
    img_size = math.prod(grid_of(positions.shape[1])) ** 0.5 * patch_size
    released = registers > 0 and img_size == RELEASED_IMAGE_SIZE
    return {
        "arch": next((name for name, known in SIZES.items() if known == size), None),
        **size,
        "mlp_ratio": _mlp_ratio(state_dict, width),
        "ffn_layer": _ffn_layer(state_dict),
        "img_size": int(img_size),
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_register_tokens": registers,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state_dict else None,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state_dict,
        "proj_bias": "blocks.0.attn.proj.bias" in state_dict,
        "ffn_bias": any(f"blocks.0.mlp.{name}.bias" in state_dict for name in ("fc1", "w12")),
        "interpolate_antialias": released,
        "interpolate_offset": 0.0 if released else 0.1,
    }


def describe_backbone(model: DinoVisionTransformer) -> dict[str, Any]:
    """The options of a model, as `infer_architecture` gives them, with what shapes do not tell."""
    options = infer_architecture({plain_name(name): tensor for name, tensor in model.state_dict().items()})
    size = {"embed_dim": model.embed_dim, "depth": model.n_blocks, "num_heads": model.num_heads}
    return {
        **options,
        **size,
        "arch": next((name for name, known in SIZES.items() if known == size), None),
        "interpolate_antialias": bool(model.interpolate_antialias),
        "interpolate_offset": float(model.interpolate_offset),
    }


def build_backbone(
    options: Mapping[str, Any], kind: type[DinoVisionTransformer] = DinoVisionTransformer, **overrides: Any
) -> DinoVisionTransformer:
    """Build the model that `infer_architecture` or `describe_backbone` describes, of a class; `overrides` win.

    Raises:
        ValueError: the number of heads is not known.
    """
    options = {**options, **overrides}
    arch = options.pop("arch", None)
    if arch is not None:
        if arch not in SIZES:
            raise ValueError(f"arch={arch!r} is unknown; choose one of {', '.join(SIZES)}")
        options |= SIZES[arch]
    if options.get("num_heads") is None:
        raise ValueError(f"the number of heads of a model {options.get('embed_dim')} wide is not known; give num_heads")
    return kind(**{"block_chunks": 0, **options})


def build_empty_backbone(options: Mapping[str, Any], **overrides: Any) -> DinoVisionTransformer:
    """`build_backbone` without memory for the parameters (device `meta`), to be filled by `load_weights`."""
    with torch.device("meta"):
        return build_backbone(options, **overrides)


def grid_of(tokens: int) -> tuple[int, int]:
    """Rows and columns of a square grid of patches, from the number of positions with or without a class token."""
    for patches in (tokens - 1, tokens):
        side = math.isqrt(max(patches, 0))
        if side > 0 and side * side == patches:
            return side, side
    raise ValueError(f"{tokens} positions are not those of a square image, with or without a class token")


def _ffn_layer(state_dict: Mapping[str, Tensor]) -> str:
    if "blocks.0.mlp.w12.weight" in state_dict:
        return "swiglufused"
    return "mlp" if "blocks.0.mlp.fc1.weight" in state_dict else "identity"


def _mlp_ratio(state_dict: Mapping[str, Tensor], width: int) -> float:
    if "blocks.0.mlp.fc1.weight" in state_dict:
        return state_dict["blocks.0.mlp.fc1.weight"].shape[0] / width
    if "blocks.0.mlp.w3.weight" in state_dict:
        hidden = state_dict["blocks.0.mlp.w3.weight"].shape[1]
        return 4.0 if two_thirds(4 * width) == hidden else hidden * 1.5 / width
    return 4.0
