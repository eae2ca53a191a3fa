"""DINOv2 for cells: train, score and look into a vision foundation model on folders of cell images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from .models.vision_transformer import DinoVisionTransformer

__version__ = "0.1.0"


def load(source: str | Path, **options: Any) -> DinoVisionTransformer:
    """Load a backbone from a weights file, a folder or a name, ready for inference; nothing else is needed.

    See `dinov2.hub.backbones.load_backbone` for what `source` and the options may be.
    """
    from .hub.backbones import load_backbone

    return load_backbone(source, **options)
