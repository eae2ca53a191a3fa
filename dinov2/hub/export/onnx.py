"""Exports as an ONNX graph: `images` in, `cls_token` and `patch_tokens` out, any batch size, one image size or any."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.models.vision_transformer import DinoVisionTransformer

from . import FeatureModel, Features, Reader, import_or_explain

FILE = "model.onnx"
ANY_SIZE = "onnx-any-size"
LARGEST_IN_ONE_FILE = 1_800_000_000  # bytes of weights; an ONNX file holds less than 2 GiB


def write(model: DinoVisionTransformer, folder: Path, *, target: str, run: Mapping[str, Any]) -> None:
    """Write `model.onnx`, with the weights of a giant model beside it in `model.onnx.data`."""
    import_or_explain("onnxscript")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    images = torch.zeros(2, model.in_chans, *model.patch_embed.img_size)
    dimensions: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if target == ANY_SIZE:
        rows, columns = (torch.export.Dim(name, min=2, max=1024) for name in ("rows", "columns"))  # of patches
        dimensions |= {2: model.patch_size * rows, 3: model.patch_size * columns}
        images = torch.zeros(2, model.in_chans, 3 * model.patch_size, 5 * model.patch_size)
        model = copy.deepcopy(model)
        model.interpolate_pos_encoding = partial(positions_of_any_size, model)
    torch.onnx.export(
        FeatureModel(model),
        (images,),
        folder / FILE,
        input_names=["images"],
        output_names=["cls_token", "patch_tokens"],
        dynamic_shapes={"images": dimensions},
        dynamo=True,
        external_data=size > LARGEST_IN_ONE_FILE,
        verbose=False,
    )


def positions_of_any_size(model: DinoVisionTransformer, x: Tensor, height: int, width: int) -> Tensor:
    """`DinoVisionTransformer.interpolate_pos_encoding` as matrix products, which a graph for all sizes can hold."""
    native = model.patch_embed.patches_resolution
    sides = [(side // model.patch_size, old) for side, old in zip((height, width), native, strict=True)]
    is_native = torch.stack([is_equal(new, old) for new, old in sides]).all()
    grid = model.pos_embed[:, 1:].float().unflatten(1, native)
    across = [resizing_matrix(new, old, model.interpolate_antialias, model.interpolate_offset) for new, old in sides]
    rows, columns = (
        torch.where(is_native, same_place(new, old), matrix) for (new, old), matrix in zip(sides, across, strict=True)
    )
    grid = torch.einsum("rR,cC,bRCd->brcd", rows, columns, grid)
    return torch.cat((model.pos_embed[:, :1].float(), grid.flatten(1, 2)), dim=1).to(x.dtype)


def is_equal(new: int, old: int) -> Tensor:
    """Whether both are equal, as a part of the graph rather than of its making."""
    return torch.arange(new)[-1] == old - 1


def same_place(new: int, old: int) -> Tensor:
    """(new, old): 1 where both indices are equal."""
    return (torch.arange(new)[:, None] == torch.arange(old)).float()


def resizing_matrix(new: int, old: int, antialias: bool, offset: float | None) -> Tensor:
    """(new, old) weights of PyTorch's bicubic interpolation along one side; `offset` as in `models.pos_embed`.

    Source: Keys, "Cubic convolution interpolation for digital image processing", IEEE TASSP 1981, with a = -0.5 under
    the low-pass filter and a = -0.75 without it.
    """
    scale = old / (new + (offset or 0.0))
    centre = (torch.arange(new) + 0.5) * scale
    places = torch.arange(old)
    if antialias:
        reach = torch.clamp(torch.ones(()) * scale, min=1.0)
        weights = cubic((places + 0.5 - centre[:, None]) / reach, -0.5)
        weights = weights / weights.sum(dim=1, keepdim=True)
        return torch.where(is_equal(new, old), same_place(new, old), weights)  # an unchanged side is left as it is
    first = torch.floor(centre - 0.5)
    weights = torch.zeros(new, old)
    for tap in (-1, 0, 1, 2):
        at = torch.clamp(first + tap, 0, old - 1)  # the border is repeated
        weights = weights + cubic(centre - 0.5 - (first + tap), -0.75)[:, None] * (at[:, None] == places)
    return weights


def cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' kernel at a distance in samples."""
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def read(folder: Path) -> Reader:
    """Features as onnxruntime computes them on the CPU."""
    onnxruntime = import_or_explain("onnxruntime")
    session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])

    def features(images: Tensor) -> Features:
        cls_token, patch_tokens = session.run(["cls_token", "patch_tokens"], {"images": images.numpy()})
        return torch.from_numpy(cls_token), torch.from_numpy(patch_tokens)

    return features
