"""Exports as a program of torch.export: `torch.export.load(FILE).module()(images)`, any batch size, one image size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dinov2.models.vision_transformer import DinoVisionTransformer

from . import FeatureModel, Reader

FILE = "model.pt2"


def write(model: DinoVisionTransformer, folder: Path, *, target: str, run: Mapping[str, Any]) -> None:
    """Write `model.pt2`."""
    images = torch.zeros(2, model.in_chans, *model.patch_embed.img_size)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(FeatureModel(model), (images,), dynamic_shapes={"images": {0: batch}})
    torch.export.save(program, folder / FILE)


def read(folder: Path) -> Reader:
    """Features as the saved program computes them."""
    return torch.export.load(folder / FILE).module()
