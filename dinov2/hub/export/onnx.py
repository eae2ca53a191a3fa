"""Exports as an ONNX graph: `images` in, `cls_token` and `patch_tokens` out, any batch size, one image size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.models.vision_transformer import DinoVisionTransformer

from . import FeatureModel, Features, Reader, import_or_explain

FILE = "model.onnx"
LARGEST_IN_ONE_FILE = 1_800_000_000  # bytes of weights; an ONNX file holds less than 2 GiB


def write(model: DinoVisionTransformer, folder: Path, *, target: str, run: Mapping[str, Any]) -> None:
    """Write `model.onnx`, with the weights of a giant model beside it in `model.onnx.data`."""
    import_or_explain("onnxscript")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    images = torch.zeros(2, model.in_chans, *model.patch_embed.img_size)
    torch.onnx.export(
        FeatureModel(model),
        (images,),
        folder / FILE,
        input_names=["images"],
        output_names=["cls_token", "patch_tokens"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
        dynamo=True,
        external_data=size > LARGEST_IN_ONE_FILE,
        verbose=False,
    )


def read(folder: Path) -> Reader:
    """Features as onnxruntime computes them on the CPU."""
    onnxruntime = import_or_explain("onnxruntime")
    session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])

    def features(images: Tensor) -> Features:
        cls_token, patch_tokens = session.run(["cls_token", "patch_tokens"], {"images": images.numpy()})
        return torch.from_numpy(cls_token), torch.from_numpy(patch_tokens)

    return features
