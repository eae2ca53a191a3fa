"""Backbones by name, and from any weights file."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import torch

from dinov2.models.released import backbone_url, load_url
from dinov2.models.vision_transformer import ARCHITECTURES, ChoiceError, DinoVisionTransformer
from dinov2.models.weights import build_from_weights, load_weights

__all__ = [
    "Weights",
    "dinov2_vitb14",
    "dinov2_vitb14_reg",
    "dinov2_vitg14",
    "dinov2_vitg14_reg",
    "dinov2_vitl14",
    "dinov2_vitl14_reg",
    "dinov2_vits14",
    "dinov2_vits14_reg",
    "load_backbone",
]


class Weights(Enum):
    """Data that a released backbone was trained on."""

    LVD142M = "LVD142M"


def load_backbone(
    source: str | Path, *, device: str | torch.device = "cpu", checkpoint_key: str | None = None, **options: Any
) -> DinoVisionTransformer:
    """Build the model that weights belong to, load them, and return it ready for inference (float32, eval mode).

    Args:
        source: a `.pth` or `.safetensors` file in any layout, a Hugging Face or timm folder, `hf:owner/model`, or a
            released model's name such as `dinov2_vits14_reg` (these two may download).
        device: where the model goes.
        checkpoint_key: entry of the file to use, such as `student`; the teacher is preferred otherwise.
        **options: arguments of `DinoVisionTransformer` that win over those of the file, such as `img_size`.

    Raises:
        FileNotFoundError: no such file or name.
        ValueError: damaged or unsafe file, or no backbone in it.
    """
    model, _ = build_from_weights(source, checkpoint_key, **options)
    return model.to(device).eval().requires_grad_(False)


def _parse_choice(weights: Weights | str, choices: type[Enum]) -> Enum:
    name = weights if isinstance(weights, str) else weights.name
    if name not in choices.__members__:
        raise ChoiceError(f"weights={name!r} are unknown; choose one of {', '.join(choices.__members__)}")
    return choices[name]


def _make_dinov2_model(
    *,
    arch_name: str = "vit_large",
    img_size: int = 518,
    patch_size: int = 14,
    init_values: float = 1.0,
    ffn_layer: str = "mlp",
    block_chunks: int = 0,
    num_register_tokens: int = 0,
    interpolate_antialias: bool = False,
    interpolate_offset: float = 0.1,
    pretrained: bool = True,
    weights: Weights | str = Weights.LVD142M,
    **kwargs: Any,
) -> DinoVisionTransformer:
    _parse_choice(weights, Weights)
    model = ARCHITECTURES[arch_name](
        img_size=img_size,
        patch_size=patch_size,
        init_values=init_values,
        ffn_layer=ffn_layer,
        block_chunks=block_chunks,
        num_register_tokens=num_register_tokens,
        interpolate_antialias=interpolate_antialias,
        interpolate_offset=interpolate_offset,
        **kwargs,
    )
    if pretrained:
        url = backbone_url(arch_name, patch_size, num_register_tokens)
        load_weights(model, load_url(url), label=url)
    return model


_REGISTERS = {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0}


def dinov2_vits14(*, pretrained: bool = True, weights: Weights | str = Weights.LVD142M, **kwargs: Any):
    """DINOv2 ViT-S/14, with the released weights if `pretrained`."""
    return _make_dinov2_model(arch_name="vit_small", pretrained=pretrained, weights=weights, **kwargs)


def dinov2_vitb14(*, pretrained: bool = True, weights: Weights | str = Weights.LVD142M, **kwargs: Any):
    """DINOv2 ViT-B/14, with the released weights if `pretrained`."""
    return _make_dinov2_model(arch_name="vit_base", pretrained=pretrained, weights=weights, **kwargs)


def dinov2_vitl14(*, pretrained: bool = True, weights: Weights | str = Weights.LVD142M, **kwargs: Any):
    """DINOv2 ViT-L/14, with the released weights if `pretrained`."""
    return _make_dinov2_model(arch_name="vit_large", pretrained=pretrained, weights=weights, **kwargs)


def dinov2_vitg14(*, pretrained: bool = True, weights: Weights | str = Weights.LVD142M, **kwargs: Any):
    """DINOv2 ViT-g/14, with the released weights if `pretrained`."""
    kwargs = {"ffn_layer": "swiglufused", **kwargs}
    return _make_dinov2_model(arch_name="vit_giant2", pretrained=pretrained, weights=weights, **kwargs)


def dinov2_vits14_reg(*, pretrained: bool = True, weights: Weights | str = Weights.LVD142M, **kwargs: Any):
    """DINOv2 ViT-S/14 with 4 registers, with the released weights if `pretrained`."""
    return dinov2_vits14(pretrained=pretrained, weights=weights, **_REGISTERS, **kwargs)


def dinov2_vitb14_reg(*, pretrained: bool = True, weights: Weights | str = Weights.LVD142M, **kwargs: Any):
    """DINOv2 ViT-B/14 with 4 registers, with the released weights if `pretrained`."""
    return dinov2_vitb14(pretrained=pretrained, weights=weights, **_REGISTERS, **kwargs)


def dinov2_vitl14_reg(*, pretrained: bool = True, weights: Weights | str = Weights.LVD142M, **kwargs: Any):
    """DINOv2 ViT-L/14 with 4 registers, with the released weights if `pretrained`."""
    return dinov2_vitl14(pretrained=pretrained, weights=weights, **_REGISTERS, **kwargs)


def dinov2_vitg14_reg(*, pretrained: bool = True, weights: Weights | str = Weights.LVD142M, **kwargs: Any):
    """DINOv2 ViT-g/14 with 4 registers, with the released weights if `pretrained`."""
    return dinov2_vitg14(pretrained=pretrained, weights=weights, **_REGISTERS, **kwargs)
