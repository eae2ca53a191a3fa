"""Exports in DINOv2's own names: one file, `.pth` or `.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov2.hub.backbones import load_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import save_backbone

from . import FeatureModel, Reader


def write(model: DinoVisionTransformer, folder: Path, *, target: str, run: Mapping[str, Any]) -> None:
    """Write `model.pth` or `model.safetensors`."""
    save_backbone(model, folder / ("model.safetensors" if target == "safetensors" else "model.pth"), run)


def read(folder: Path) -> Reader:
    """Features as `dinov2.load` gives them."""
    return FeatureModel(load_backbone(next(folder.glob("model.*"))))
