"""From a command line to a frozen backbone: with DINOv2's config file, or from the weights file alone."""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from dinov2.eval.utils import default_device
from dinov2.models import build_model_from_cfg
from dinov2.models.architecture import build_backbone, describe_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import build_from_weights, load_pretrained_weights
from dinov2.utils.config import setup
from dinov2.utils.dtype import as_torch_dtype

logger = logging.getLogger("dinov2")


def get_args_parser(
    description: str | None = None,
    parents: list[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """What every evaluation takes: the model and where results go."""
    parser = argparse.ArgumentParser(description=description, parents=parents or [], add_help=add_help)
    parser.add_argument("--config-file", help="model configuration; without it the weights file says what it holds")
    parser.add_argument("--pretrained-weights", help="weights of the backbone, in any known layout")
    parser.add_argument("--output-dir", default="", help="where results and logs are written")
    parser.add_argument("--opts", nargs="+", default=[], help="further settings, as section.key=value")
    return parser


def get_protocol_args_parser(
    validation: str,
    description: str | None = None,
    parents: list[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """What DINOv2's own protocols take: a model, images to learn from and others, used as `validation` says."""
    parser = get_args_parser(description, parents, add_help)
    add = parser.add_argument
    train = "folder, CSV or data set string"
    add("--train-dataset", dest="train_dataset_str", default="ImageNet:split=TRAIN", help=train)
    add("--val-dataset", dest="val_dataset_str", default="ImageNet:split=VAL", help=validation)
    return parser


def add_extraction_arguments(parser: argparse.ArgumentParser, image_size: int | None = 224) -> None:
    """How images are turned into features; without a default `image_size`, at the size that the model learned at."""
    add, usual = parser.add_argument, image_size or "that of the training, 224 where the weights do not tell"
    size = f"side of the square shown to the model, pixels (default: {usual})"
    add("--image-size", type=int, default=image_size, help=size)
    add("--batch-size", type=int, default=64, help="images per forward pass (default: %(default)s)")
    add("--num-workers", type=int, help="decoding threads (default: the CPUs there are)")
    precisions = ["fp32", "bf16", "fp16"]
    add("--dtype", default="fp32", choices=precisions, help="precision of the model (default: %(default)s)")


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Where features are kept for the next time."""
    parser.add_argument("--cache-dir", help="where features are kept (default: $DINOV2_CACHE or ~/.cache/dinov2)")
    parser.add_argument("--no-cache", action="store_true", help="extract features again and do not keep them")


def get_autocast_dtype(config: Any) -> torch.dtype:
    """The precision that a configuration gives the teacher's backbone."""
    return as_torch_dtype(config.compute_precision.teacher.backbone.mixed_precision.param_dtype)


def resolve_autocast_dtype(config: Any, device: torch.device) -> torch.dtype:
    """The precision to evaluate in, as `compute_precision.dtype` says.

    "auto": float32 on the CPU, bf16 in place of fp16 on a GPU that has it; "config": what the backbone is given.
    """
    choice = config.compute_precision.dtype
    if choice not in ("auto", "config"):
        return as_torch_dtype(choice)
    dtype = get_autocast_dtype(config)
    if choice == "config":
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if dtype == torch.float16 and torch.cuda.is_bf16_supported() else dtype


def build_model_for_eval(config: Any, pretrained_weights: str) -> nn.Module:
    """The teacher of a configuration with weights from a file, frozen, on the GPU if there is one."""
    model, _ = build_model_from_cfg(config, only_teacher=True)
    load_pretrained_weights(model, pretrained_weights, "teacher")
    return frozen(model)


def setup_and_build_model(args: argparse.Namespace) -> tuple[nn.Module, torch.dtype]:
    """Processes, logs and output folder of a run, its backbone and the precision to run it in.

    Raises:
        ValueError: no weights are given.
    """
    config = setup(args, for_training=False)
    weights = args.pretrained_weights or config.MODEL.WEIGHTS
    if not weights:
        raise ValueError("which model? give its weights with --pretrained-weights FILE or MODEL.WEIGHTS=FILE")
    model = build_model_for_eval(config, weights) if args.config_file else load_model(weights).backbone
    return model, resolve_autocast_dtype(config, default_device())


class LoadedModel(NamedTuple):
    """A frozen backbone and what its weights file says of it."""

    backbone: DinoVisionTransformer
    options: Mapping[str, Any]  # that build the same architecture
    mean: tuple[float, ...]  # of the training images, per channel, scaled to 0..1
    std: tuple[float, ...]
    image_size: int = 224  # side of the global crops that it learned from, pixels

    def untrained(self, seed: int = 0) -> LoadedModel:
        """The same architecture as it was before the first step."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            device = next(self.backbone.parameters()).device
            return self._replace(backbone=frozen(build_backbone(self.options)).to(device))


def load_model(weights: str | Path) -> LoadedModel:
    """A backbone from its weights alone: a file in any known layout, a Hugging Face folder, or a model's name."""
    backbone, run = build_from_weights(weights)
    options = describe_backbone(backbone)
    if options["init_values"] and (layerscale := run.get("student", {}).get("layerscale")):
        options = {**options, "init_values": layerscale}  # what training began with, which shapes do not tell
    return LoadedModel(frozen(backbone), options, *training_view(run))


def training_view(run: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """How a run saw its images: mean and deviation per channel, scaled to 0..1, and the side of global crops, pixels.

    ImageNet's values and 224 where the config of the run, as weights files keep it, does not tell.
    """
    told = run.get("augmentations", {})
    mean, std = told.get("mean", IMAGENET_DEFAULT_MEAN), told.get("std", IMAGENET_DEFAULT_STD)
    return tuple(mean), tuple(std), run.get("crops", {}).get("global_crops_size", 224)


def frozen(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, without gradients, on the GPU if there is one."""
    return model.eval().requires_grad_(False).to(default_device())


def fingerprint(model: nn.Module) -> str:
    """A hash of everything that a model has learned, whatever file it came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
