"""Exports as a folder of Hugging Face transformers: `Dinov2Model`, or `Dinov2WithRegistersModel`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from dinov2.models.architecture import describe_backbone
from dinov2.models.key_maps import plain_name, to_huggingface
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import file_metadata

from . import Features, Reader, import_or_explain, with_all_parts

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def write(model: DinoVisionTransformer, folder: Path, *, target: str, run: Mapping[str, Any]) -> None:
    """Write `config.json`, `model.safetensors` and `preprocessor_config.json`."""
    complete = with_all_parts(model)
    tensors = to_huggingface({plain_name(name): tensor for name, tensor in complete.state_dict().items()})
    metadata = file_metadata(describe_backbone(complete), run)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata=metadata)
    (folder / "config.json").write_text(json.dumps(_config(complete), indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessing(complete, run), indent=2) + "\n")


def read(folder: Path) -> Reader:
    """Features as transformers gives them."""
    transformers = import_or_explain("transformers")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    first_patch = 1 + getattr(model.config, "num_register_tokens", 0)

    def features(images: Tensor) -> Features:
        tokens = model(pixel_values=images).last_hidden_state
        return tokens[:, 0], tokens[:, first_patch:]

    return features


def _config(model: DinoVisionTransformer) -> dict[str, Any]:
    options = describe_backbone(model)
    registers = options["num_register_tokens"]
    ratio = options["mlp_ratio"]
    return {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": options["embed_dim"],
        "num_hidden_layers": options["depth"],
        "num_attention_heads": options["num_heads"],
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": options["img_size"],
        "patch_size": options["patch_size"],
        "num_channels": options["in_chans"],
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "use_swiglu_ffn": options["ffn_layer"] == "swiglufused",
        "drop_path_rate": 0.0,
        "torch_dtype": "float32",
        **({"num_register_tokens": registers} if registers else {}),
    }


def _preprocessing(model: DinoVisionTransformer, run: Mapping[str, Any]) -> dict[str, Any]:
    side = model.patch_embed.img_size[0]
    trained_with = run.get("augmentations", IMAGENET)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(trained_with["mean"]),
        "image_std": list(trained_with["std"]),
        "do_convert_rgb": model.in_chans == 3,
    }
