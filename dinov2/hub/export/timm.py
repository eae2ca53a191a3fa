"""Exports as a folder of timm: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from dinov2.models.architecture import describe_backbone
from dinov2.models.key_maps import plain_name, to_timm
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import file_metadata

from . import Features, Reader, import_or_explain, with_all_parts
from .huggingface import IMAGENET


def write(model: DinoVisionTransformer, folder: Path, *, target: str, run: Mapping[str, Any]) -> None:
    """Write `config.json` and `model.safetensors`."""
    complete = with_all_parts(model)
    tensors = to_timm({plain_name(name): tensor for name, tensor in complete.state_dict().items()})
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = file_metadata(describe_backbone(complete), run)
    safetensors.torch.save_file(contiguous, folder / "model.safetensors", metadata=metadata)
    (folder / "config.json").write_text(json.dumps(_config(complete, run), indent=2) + "\n")


def read(folder: Path) -> Reader:
    """Features as timm gives them."""
    timm = import_or_explain("timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def features(images: Tensor) -> Features:
        tokens = model.forward_features(images)
        return tokens[:, 0], tokens[:, model.num_prefix_tokens :]

    return features


def _config(model: DinoVisionTransformer, run: Mapping[str, Any]) -> dict[str, Any]:
    options = describe_backbone(model)
    registers, swiglu = options["num_register_tokens"], options["ffn_layer"] == "swiglufused"
    # The feed-forward class cannot be written in JSON: take it from a registered model, and override all sizes.
    size = {True: "giant", False: {"vit_base": "base", "vit_large": "large"}.get(options["arch"], "small")}[swiglu]
    architecture = f"vit_{size}_patch14_reg4_dinov2" if registers else f"vit_{size}_patch14_dinov2"
    hidden = model.state_dict()[_first_ffn_weight(model)].shape[0]
    trained_with = run.get("augmentations", IMAGENET)
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": options["embed_dim"],
        "global_pool": "token",
        "model_args": {
            "img_size": options["img_size"],
            "patch_size": options["patch_size"],
            "in_chans": options["in_chans"],
            "embed_dim": options["embed_dim"],
            "depth": options["depth"],
            "num_heads": options["num_heads"],
            "mlp_ratio": (hidden + 0.5) / options["embed_dim"],  # timm rounds the hidden width down
            "init_values": 1.0,
            "reg_tokens": registers,
            "no_embed_class": registers > 0,
        },
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [options["in_chans"], options["img_size"], options["img_size"]],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(trained_with["mean"]),
            "std": list(trained_with["std"]),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _first_ffn_weight(model: DinoVisionTransformer) -> str:
    return "blocks.0.mlp.w12.weight" if "blocks.0.mlp.w12.weight" in model.state_dict() else "blocks.0.mlp.fc1.weight"
