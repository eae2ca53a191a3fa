"""DINOv2 for cells: train, score and look into a vision foundation model on folders of cell images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from .eval.embedder import Embedder

__version__ = "0.1.0"


def load(source: str | Path, **options: Any) -> Embedder:
    """Load a backbone from a weights file, a folder or a name, ready for inference; nothing else is needed.

    `dinov2.load(source).embed(images)` gives the features of images as they come; the model is otherwise that of
    `dinov2.hub.backbones.load_backbone`, which also tells what `source` and the options may be.
    """
    from .eval.embedder import load_embedder

    return load_embedder(source, **options)
