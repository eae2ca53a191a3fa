"""Weights in and out of modules: every layout that DINOv2 backbones come in, with an account of what fitted."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architecture import build_empty_backbone, describe_backbone, grid_of, infer_architecture
from .key_maps import plain_name, to_plain_names
from .pos_embed import resize_grid
from .released import RELEASED, fetch_huggingface, load_released, unreadable_is_value_error
from .vision_transformer import DinoVisionTransformer

logger = logging.getLogger("dinov2")

CONFIG_KEY = "dinov2_config"  # of our metadata, in both file formats
_FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


class StateFile(NamedTuple):
    """What a weights file holds: tensors by dotted name, and what it says about them.

    `config` has `model` (options of the model) and `run` (config of the run) in files written here, `num_heads` for
    folders of other libraries that tell it, and is None otherwise.
    """

    state_dict: dict[str, Tensor]
    config: dict[str, Any] | None


@dataclass
class LoadReport:
    """What `load_weights` did, by tensor name in the module."""

    source: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    initialised: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {len(self.matched)} tensors matched, {len(self.missing)} missing, "
            f"{len(self.unexpected)} not used"
        ]
        for name, change in {**self.resized, **self.initialised}.items():
            lines.append(f"  {name}: {change}")
        for label, names in (("missing", self.missing), ("not used", self.unexpected)):
            if names:
                lines.append(f"  {label}: {_shorten(names)}")
        return "\n".join(lines)


def read_state_dict(source: str | Path) -> StateFile:
    """Read tensors from a `.pth` or `.safetensors` file, a Hugging Face or timm folder, or a model's name.

    Names are a released model (`dinov2_vits14_reg`) or `hf:owner/model`; only these use the network. Nested dicts come
    out flat with dotted names. Tensors only are read: a pickle that holds anything to run is refused, and not run.

    Raises:
        FileNotFoundError: no such file or name.
        ValueError: damaged, unsafe, or without tensors.
    """
    if str(source) in RELEASED:
        return StateFile(_flatten(load_released(str(source))), None)
    if str(source).startswith("hf:"):
        source = fetch_huggingface(str(source)[3:])
    path = Path(source)
    if not path.exists():
        names = ", ".join(RELEASED)
        raise FileNotFoundError(f"no weights at {path}; give a file, a folder, hf:owner/model, or one of {names}")
    with unreadable_is_value_error(path):
        loaded, config = _read_folder(path) if path.is_dir() else _read_file(path)
        state_dict = _flatten(loaded)
    if not state_dict:
        raise ValueError(f"{path}: holds no tensors")
    return StateFile(state_dict, config)


def backbone_state_dict(state_dict: Mapping[str, Tensor], checkpoint_key: str | None = None) -> dict[str, Tensor]:
    """The backbone among the tensors of any known layout, in plain names; the teacher's where there are several.

    Raises:
        ValueError: there is none.
    """
    tensors = _plain(state_dict, checkpoint_key)
    marker = "patch_embed.proj.weight"
    prefixes = [name[: -len(marker)] for name in tensors if name == marker or name.endswith(f".{marker}")]
    if not prefixes:
        raise ValueError(f"no backbone among the {len(tensors)} tensors: {_shorten(list(tensors))}")
    prefix = min(prefixes, key=_preference)
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def load_weights(
    module: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    checkpoint_key: str | None = None,
    *,
    min_match: float = 0.5,
    label: str | None = None,
) -> LoadReport:
    """Fill a module from weights in any known layout, and log what fitted.

    Known are plain names, any prefix or nesting (`{'teacher': {'backbone.…'}}`, `module.`, `student.`, …), chunked
    and unchunked blocks on either side, Hugging Face and timm. Positions are resized to the module's grid, patch
    kernels to its patch size and channels; what is absent but neutral is set to do nothing (biases 0, LayerScale 1).

    Args:
        module: a backbone, a head, or a ModuleDict of both; parameters may be on the meta device.
        source: what `read_state_dict` takes, or a state dict.
        checkpoint_key: entry of the file to use, such as `teacher`; used when the file has it.
        min_match: least share of the module's tensors that the file must fill.
        label: what to call the source in messages, when it is a state dict.

    Raises:
        ValueError: unreadable, of another architecture (the options that differ are named), or too little fits.
    """
    label = label or ("state dict" if isinstance(source, Mapping) else str(source))
    state_dict = source if isinstance(source, Mapping) else read_state_dict(source).state_dict
    found = _plain(_flatten(state_dict), checkpoint_key)
    actual_names = {plain_name(name): name for name in module.state_dict()}
    prefix = _best_prefix(found, actual_names)
    if prefix is None:
        raise ValueError(
            f"{label}: nothing fits. The file has {_shorten(list(found))}; "
            f"the model wants {_shorten(list(actual_names))}"
        )
    found = {name[len(prefix) :]: tensor for name, tensor in found.items() if name.startswith(prefix)}
    targets = {name: module.state_dict()[actual] for name, actual in actual_names.items()}
    if isinstance(module, DinoVisionTransformer):
        _refuse_other_architecture(label, found, targets)

    report = LoadReport(label)
    filled = {}
    for name, target in targets.items():
        tensor = _fit(name, found.get(name), target, module, report)
        if tensor is not None:
            filled[actual_names[name]] = tensor.to(target.dtype)
    report.unexpected = [name for name in found if name not in targets]
    share = len(report.matched) / max(len(targets), 1)
    if share < min_match:
        raise ValueError(
            f"only {share:.0%} of the model's tensors are in the file (at least {min_match:.0%} wanted)\n{report}"
        )
    on_meta = any(target.is_meta for target in targets.values())
    if on_meta and report.missing:
        raise ValueError(f"{label}: a model without memory needs every tensor; missing: {_shorten(report.missing)}")
    module.load_state_dict(filled, strict=False, assign=on_meta)
    logger.info("weights: %s", report)
    if "register_tokens" in report.unexpected:
        logger.warning("weights: %s was trained with registers, the model has none: features will differ", label)
    return report


def build_from_weights(
    source: str | Path, checkpoint_key: str | None = None, **options: Any
) -> tuple[DinoVisionTransformer, dict[str, Any]]:
    """Build the model that weights belong to and load them (float32, on the CPU).

    Args:
        source: what `read_state_dict` takes.
        checkpoint_key: entry of the file to use, such as `student`; the teacher is preferred otherwise.
        **options: arguments of `build_backbone` that win over those of the file, such as `img_size`.

    Returns:
        The model and the config of the run that wrote the file; empty where the file has none.

    Raises:
        FileNotFoundError: no such file or name.
        ValueError: damaged or unsafe file, or no backbone in it.
    """
    file = read_state_dict(source)
    config = file.config or {}
    try:
        tensors = backbone_state_dict(file.state_dict, checkpoint_key)
        model = build_empty_backbone(_options(tensors, config), **options)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:  # a damaged description may raise any of these
        raise ValueError(f"{source}: {error}") from error
    load_weights(model, tensors, label=str(source))
    return model, config.get("run") or {}


def _options(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the model: as its file tells them, else from the shapes."""
    if "model" in config:
        return config["model"]
    options = infer_architecture(tensors)
    return {**options, "arch": None, "num_heads": config["num_heads"]} if "num_heads" in config else options


def load_pretrained_weights(model: nn.Module, pretrained_weights: str | Path, checkpoint_key: str | None) -> LoadReport:
    """DINOv2's name for `load_weights`."""
    return load_weights(model, pretrained_weights, checkpoint_key)


def save_backbone(
    backbone: DinoVisionTransformer | Mapping[str, Tensor],
    path: str | Path,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a backbone in plain hub names with its options inside, so that `load_backbone(path)` needs nothing else.

    Args:
        backbone: the model, or its state dict; any chunking, names come out unchunked.
        path: `.safetensors`, or else a pickle of tensors for `torch.load(..., weights_only=True)`. Written whole or not
            at all.
        config: of the run, plain containers; kept in the file (`run`) next to the options of the model (`model`). Where
            `backbone` is a state dict, its `student` section tells what shapes do not.
    """
    path = Path(path)
    state_dict = backbone if isinstance(backbone, Mapping) else backbone.state_dict()
    tensors = {plain_name(name): tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    if isinstance(backbone, Mapping):
        student = (config or {}).get("student", {})
        told = {name: student[name] for name in ("interpolate_antialias", "interpolate_offset") if name in student}
        options = {**infer_architecture(tensors), **told}
    else:
        options = describe_backbone(backbone)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(tensors, temporary, metadata=file_metadata(options, config))
        else:
            ordered = OrderedDict(tensors)
            ordered._metadata = OrderedDict({"": {"version": 1}, CONFIG_KEY: file_metadata(options, config)})
            torch.save(ordered, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_metadata(options: Mapping[str, Any], config: Mapping[str, Any] | None) -> dict[str, str]:
    """What a weights file says about itself: the model's options and the run's config, as JSON."""
    return {"format": "pt", CONFIG_KEY: json.dumps({"model": options, "run": dict(config or {})})}


def _read_file(path: Path) -> tuple[Mapping[str, Any], dict[str, Any] | None]:
    if _is_safetensors(path):
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(CONFIG_KEY)
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(text) if text else None  # noqa: SIM118
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"holds {type(loaded).__name__}, not a state dict")
    text = getattr(loaded, "_metadata", {}).get(CONFIG_KEY, {}).get(CONFIG_KEY)
    return loaded, json.loads(text) if text else None


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_folder(path: Path) -> tuple[Mapping[str, Any], dict[str, Any] | None]:
    file = next((path / name for name in _FOLDER_FILES if (path / name).is_file()), None)
    if file is None:
        raise ValueError(f"the folder has none of {', '.join(_FOLDER_FILES)}")
    heads = _heads_in(path / "config.json")
    if file.suffix != ".json":
        loaded, config = _read_file(file)
        return loaded, config or heads
    parts = sorted(set(json.loads(file.read_text())["weight_map"].values()))
    if any(Path(part).name != part for part in parts):
        raise ValueError(f"{file.name} points outside of the folder")
    return {name: tensor for part in parts for name, tensor in _read_file(path / part)[0].items()}, heads


def _heads_in(path: Path) -> dict[str, Any] | None:
    """The number of heads, the one thing that tensors do not show, from a Hugging Face or timm `config.json`."""
    if not path.is_file():
        return None
    config = json.loads(path.read_text())
    heads = config.get("num_attention_heads") or config.get("model_args", {}).get("num_heads")
    return {"num_heads": heads} if heads else None


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """Nested dicts of tensors to one dict with dotted names; all else (counters, options) is left out."""
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
    return flat


def _plain(state_dict: Mapping[str, Tensor], checkpoint_key: str | None) -> dict[str, Tensor]:
    """Tensors under the key if there are any, else all of them, in plain names."""
    if checkpoint_key:
        chosen = {name: tensor for name, tensor in state_dict.items() if name.startswith(f"{checkpoint_key}.")}
        if not chosen:
            logger.info("weights: no entry %r in the file, looking at all of it", checkpoint_key)
        state_dict = chosen or state_dict
    return to_plain_names({plain_name(name): tensor for name, tensor in state_dict.items()})[0]


def _preference(prefix: str) -> tuple[bool, bool, int]:
    """Sort key of equally good places in a file: the teacher's, not the student's, the least nested."""
    return "teacher" not in prefix, "student" in prefix, len(prefix)


def _best_prefix(found: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> str | None:
    """The place in the file whose names are the most like the wanted ones, or None."""
    hits: Counter[str] = Counter()
    for name in found:
        parts = name.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in wanted:
                hits["".join(f"{part}." for part in parts[:cut])] += 1
    most = max(hits.values(), default=0)
    return min((prefix for prefix, count in hits.items() if count == most), key=_preference, default=None)


def _refuse_other_architecture(label: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    file, model = infer_architecture(found), infer_architecture(wanted)
    options = {"embed_dim": "arch", "depth": "arch", "ffn_layer": "ffn_layer", "mlp_ratio": "mlp_ratio"}
    differing = {option for name, option in options.items() if file[name] != model[name]}
    # What the file lacks can be made neutral; what the model lacks would be lost.
    differing |= {name for name in ("qkv_bias", "proj_bias", "ffn_bias") if file[name] and not model[name]}
    differing |= {"layerscale"} if file["init_values"] and not model["init_values"] else set()
    if not differing:
        return
    lines = [
        f"  {option}: {_value(file, option)} in the file, {_value(model, option)} in the model"
        for option in sorted(differing)
    ]
    raise ValueError(f"{label}: weights of another architecture; set these to what the file has:\n" + "\n".join(lines))


def _value(options: Mapping[str, Any], name: str) -> str:
    if name == "arch":
        return f"{options['arch'] or 'unnamed'} ({options['depth']} blocks, {options['embed_dim']} wide)"
    if name == "layerscale":
        return "used" if options["init_values"] else "not used"
    return str(options[name])


def _fit(name: str, tensor: Tensor | None, target: Tensor, module: nn.Module, report: LoadReport) -> Tensor | None:
    """The tensor in the shape of the target, or None where the module keeps what it has; notes what was done."""
    leaf = name.rsplit(".", 1)[-1]
    if tensor is None:
        if isinstance(module, DinoVisionTransformer) and (neutral := _neutral(leaf, target)) is not None:
            report.initialised[name] = f"not in the file, set to {neutral}"
            return torch.full(target.shape, neutral, dtype=target.dtype)
        report.missing.append(name)
        return None
    was = _shape(tensor)
    if tensor.shape == target.shape:
        report.matched.append(name)
        return tensor
    if leaf == "pos_embed" and isinstance(module, DinoVisionTransformer):
        tensor = _fit_positions(tensor, module)
    elif name == "patch_embed.proj.weight":
        tensor = _fit_patch_kernel(tensor, target)
    elif leaf == "register_tokens" and tensor.shape[-1] == target.shape[-1]:
        report.missing.append(f"{name} ({was} in the file, {_shape(target)} in the model: starts anew)")
        return None
    if tensor.shape != target.shape:
        raise ValueError(f"{report.source}: {name} is {was} in the file and {_shape(target)} in the model")
    report.matched.append(name)
    report.resized[name] = f"resized from {was} to {_shape(target)}"
    return tensor


def _neutral(leaf: str, target: Tensor) -> float | None:
    """The value at which a parameter changes nothing, where there is one."""
    return {"bias": 0.0, "gamma": 1.0, "mask_token": 0.0}.get(leaf)


def _fit_positions(positions: Tensor, model: DinoVisionTransformer) -> Tensor:
    """Positions for the model's grid, resized as the model itself would at that image size."""
    rows, columns = grid_of(positions.shape[1])
    class_position, grid = positions[:, : -rows * columns], positions[:, -rows * columns :]
    if class_position.shape[1] == 0:
        class_position = torch.zeros_like(grid[:, :1])
    wanted = model.patch_embed.patches_resolution
    if (rows, columns) != wanted:
        grid = resize_grid(
            grid.unflatten(1, (rows, columns)),
            wanted,
            antialias=model.interpolate_antialias,
            offset=model.interpolate_offset,
        ).flatten(1, 2)
    return torch.cat((class_position, grid), dim=1)


def _fit_patch_kernel(kernel: Tensor, target: Tensor) -> Tensor:
    """Patch kernels for another patch size or number of channels.

    The size changes by the pseudo-inverse of image resizing, so that a resized patch gives the same token (Beyer et
    al., "FlexiViT", CVPR 2023); channels beyond those of the file share the mean kernel, keeping the scale.
    """
    kernel = kernel.float()
    (old, _), (new, _) = kernel.shape[-2:], target.shape[-2:]
    if old != new:
        basis = torch.eye(old * old).view(old * old, 1, old, old)
        resize = F.interpolate(basis, size=(new, new), mode="bicubic", antialias=True).flatten(1)
        kernel = (kernel.flatten(2) @ torch.linalg.pinv(resize).T).unflatten(2, (new, new))
    channels, wanted = kernel.shape[1], target.shape[1]
    if channels != wanted:
        kernel = kernel.mean(dim=1, keepdim=True).expand(-1, wanted, -1, -1) * (channels / wanted)
    return kernel


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _shorten(names: list[str], limit: int = 6) -> str:
    more = f", … ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
