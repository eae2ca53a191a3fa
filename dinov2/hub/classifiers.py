"""Backbones with DINOv2's linear ImageNet classifiers."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.models.released import BASE_URL, load_url, model_name
from dinov2.models.vision_transformer import ChoiceError, DinoVisionTransformer

from . import backbones
from .backbones import _parse_choice

__all__ = [
    "Weights",
    "dinov2_vitb14_lc",
    "dinov2_vitb14_reg_lc",
    "dinov2_vitg14_lc",
    "dinov2_vitg14_reg_lc",
    "dinov2_vitl14_lc",
    "dinov2_vitl14_reg_lc",
    "dinov2_vits14_lc",
    "dinov2_vits14_reg_lc",
]


class Weights(Enum):
    """Data that a released classifier was trained on."""

    IMAGENET1K = "IMAGENET1K"


class _LinearClassifierWrapper(nn.Module):
    """A linear classifier on class tokens of the last `layers` blocks and the mean patch of the last one."""

    def __init__(self, *, backbone: DinoVisionTransformer, linear_head: nn.Module, layers: int = 4) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear_head = linear_head
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to scores `(B, classes)`."""
        features = self.backbone.get_intermediate_layers(x, n=self.layers, return_class_token=True)
        class_tokens = [class_token for _, class_token in features]
        return self.linear_head(torch.cat((*class_tokens, features[-1][0].mean(dim=1)), dim=1))


def _make_dinov2_linear_classifier(
    backbone_name: str,
    *,
    layers: int = 4,
    pretrained: bool = True,
    weights: Weights | str = Weights.IMAGENET1K,
    num_classes: int = 1000,
    **kwargs: Any,
) -> _LinearClassifierWrapper:
    _parse_choice(weights, Weights)
    if layers not in (1, 4):
        raise ChoiceError(f"layers={layers}: there are classifiers on 1 and on 4 layers")
    backbone = getattr(backbones, backbone_name)(pretrained=pretrained, **kwargs)
    linear_head = nn.Linear((1 + layers) * backbone.embed_dim, num_classes)
    if pretrained:
        arch, patch_size = f"vit_{backbone_name[len('dinov2_vit') :][0]}", backbone.patch_size
        full_name = model_name(arch, patch_size, backbone.num_register_tokens)
        url = f"{BASE_URL}/{model_name(arch, patch_size)}/{full_name}_linear{4 if layers == 4 else ''}_head.pth"
        linear_head.load_state_dict(load_url(url))
    return _LinearClassifierWrapper(backbone=backbone, linear_head=linear_head, layers=layers)


def dinov2_vits14_lc(
    *, layers: int = 4, pretrained: bool = True, weights: Weights | str = Weights.IMAGENET1K, **kwargs: Any
) -> nn.Module:
    """ViT-S/14 with a linear ImageNet classifier on its last 1 or 4 layers."""
    return _make_dinov2_linear_classifier(
        "dinov2_vits14", layers=layers, pretrained=pretrained, weights=weights, **kwargs
    )


def dinov2_vitb14_lc(
    *, layers: int = 4, pretrained: bool = True, weights: Weights | str = Weights.IMAGENET1K, **kwargs: Any
) -> nn.Module:
    """ViT-B/14 with a linear ImageNet classifier on its last 1 or 4 layers."""
    return _make_dinov2_linear_classifier(
        "dinov2_vitb14", layers=layers, pretrained=pretrained, weights=weights, **kwargs
    )


def dinov2_vitl14_lc(
    *, layers: int = 4, pretrained: bool = True, weights: Weights | str = Weights.IMAGENET1K, **kwargs: Any
) -> nn.Module:
    """ViT-L/14 with a linear ImageNet classifier on its last 1 or 4 layers."""
    return _make_dinov2_linear_classifier(
        "dinov2_vitl14", layers=layers, pretrained=pretrained, weights=weights, **kwargs
    )


def dinov2_vitg14_lc(
    *, layers: int = 4, pretrained: bool = True, weights: Weights | str = Weights.IMAGENET1K, **kwargs: Any
) -> nn.Module:
    """ViT-g/14 with a linear ImageNet classifier on its last 1 or 4 layers."""
    return _make_dinov2_linear_classifier(
        "dinov2_vitg14", layers=layers, pretrained=pretrained, weights=weights, **kwargs
    )


def dinov2_vits14_reg_lc(
    *, layers: int = 4, pretrained: bool = True, weights: Weights | str = Weights.IMAGENET1K, **kwargs: Any
) -> nn.Module:
    """ViT-S/14 with 4 registers and a linear ImageNet classifier on its last 1 or 4 layers."""
    return _make_dinov2_linear_classifier(
        "dinov2_vits14_reg", layers=layers, pretrained=pretrained, weights=weights, **kwargs
    )


def dinov2_vitb14_reg_lc(
    *, layers: int = 4, pretrained: bool = True, weights: Weights | str = Weights.IMAGENET1K, **kwargs: Any
) -> nn.Module:
    """ViT-B/14 with 4 registers and a linear ImageNet classifier on its last 1 or 4 layers."""
    return _make_dinov2_linear_classifier(
        "dinov2_vitb14_reg", layers=layers, pretrained=pretrained, weights=weights, **kwargs
    )


def dinov2_vitl14_reg_lc(
    *, layers: int = 4, pretrained: bool = True, weights: Weights | str = Weights.IMAGENET1K, **kwargs: Any
) -> nn.Module:
    """ViT-L/14 with 4 registers and a linear ImageNet classifier on its last 1 or 4 layers."""
    return _make_dinov2_linear_classifier(
        "dinov2_vitl14_reg", layers=layers, pretrained=pretrained, weights=weights, **kwargs
    )


def dinov2_vitg14_reg_lc(
    *, layers: int = 4, pretrained: bool = True, weights: Weights | str = Weights.IMAGENET1K, **kwargs: Any
) -> nn.Module:
    """ViT-g/14 with 4 registers and a linear ImageNet classifier on its last 1 or 4 layers."""
    return _make_dinov2_linear_classifier(
        "dinov2_vitg14_reg", layers=layers, pretrained=pretrained, weights=weights, **kwargs
    )
