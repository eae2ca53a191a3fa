"""A model card: what the weights are, what they saw, how they scored, and how to load them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2.models.architecture import describe_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer

if TYPE_CHECKING:
    from . import Export

RECIPE = {
    "optim.epochs": "epochs of the schedule",
    "train.OFFICIAL_EPOCH_LENGTH": "iterations per epoch",
    "train.batch_size_per_gpu": "images per process and step",
    "optim.base_lr": "base learning rate",
    "train.centering": "centering",
    "dino.head_n_prototypes": "prototypes",
    "dino.koleo_loss_weight": "KoLeo weight",
    "student.drop_path_rate": "stochastic depth",
    "crops.global_crops_size": "global crops, pixels",
    "crops.local_crops_size": "local crops, pixels",
    "student.pretrained_weights": "started from",
    "train.seed": "seed",
}
USE = {
    "hub": 'import dinov2\n\nmodel = dinov2.load("model.pth")',
    "safetensors": 'import dinov2\n\nmodel = dinov2.load("model.safetensors")',
    "hf": 'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("this/folder")',
    "timm": 'import timm\n\nmodel = timm.create_model("local-dir:this/folder", pretrained=True)',
    **dict.fromkeys(
        ("onnx", "onnx-any-size"),
        'import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")\n'
        'cls_token, patch_tokens = session.run(None, {"images": images})',
    ),
    "torch-export": 'import torch\n\nmodel = torch.export.load("model.pt2").module()\n'
    "cls_token, patch_tokens = model(images)",
}


def write_model_card(
    folder: Path,
    model: DinoVisionTransformer,
    *,
    source: str,
    target: str,
    result: Export,
    run: Mapping[str, Any],
    license_name: str,
    data_files: Sequence[Path] = (),
) -> Path:
    """Write `README.md` next to the exported files.

    Args:
        folder: of the export.
        model: what was exported.
        source: its weights; scores are looked for around them (`eval_metrics.json`).
        target: the format.
        result: of the export.
        run: config of the training run, empty if not known.
        license_name: of the weights.
        data_files: lists or reports of the training images, named with their SHA-256.
    """
    options = describe_backbone(model)
    arch = options["arch"] or f"ViT {options['embed_dim']}x{options['depth']}"
    parameters = sum(tensor.numel() for tensor in model.state_dict().values())
    sections = [
        "---",
        f"license: {license_name}",
        "pipeline_tag: image-feature-extraction",
        "tags: [dinov2, cells, self-supervised]",
        "---",
        f"# {arch}/{options['patch_size']}, DINOv2",
        "",
        f"{parameters / 1e6:.1f} M parameters, {options['num_register_tokens']} registers, {options['ffn_layer']} "
        f"feed-forward networks, {options['in_chans']} channels, positions for {options['img_size']} pixel images.",
        "",
        "## Use",
        "",
        f"```python\n{USE[target]}\n```",
        "",
        "## Check",
        "",
        f"Read back after the export, the features of random images differ from the original's by at most "
        f"{result.max_difference:.2e}.",
        "",
        _table(("file", "SHA-256"), [(path.name, _sha256(path)) for path in result.files if path.is_file()]),
        "",
        "## Data it has seen",
        "",
        *_exposure(run, data_files),
        "",
        "## Recipe",
        "",
        *_recipe(run),
        "",
        "## Scores",
        "",
        *_scores(source),
        "",
    ]
    card = folder / "README.md"
    card.write_text("\n".join(sections))
    return card


def _exposure(run: Mapping[str, Any], data_files: Sequence[Path]) -> list[str]:
    paths = run.get("train", {}).get("dataset_path", [])
    paths = [paths] if isinstance(paths, str) else list(paths)
    lines = [f"- `{path}`" for path in paths] or ["Not recorded in the weights file."]
    if preserved := run.get("train", {}).get("path_preserved"):
        lines.append(f"- of which a share of {run['train'].get('frac')} was held out: {preserved}")
    if start := run.get("student", {}).get("pretrained_weights"):
        lines.append(f"- and all that `{start}` had seen, which the training started from")
    if data_files:
        lines += ["", _table(("list of images", "bytes", "SHA-256"), map(_file_row, data_files))]
    return lines


def _recipe(run: Mapping[str, Any]) -> list[str]:
    rows = []
    for key, what in RECIPE.items():
        section, name = key.split(".")
        if (value := run.get(section, {}).get(name)) not in (None, ""):
            rows.append((what, f"`{key}`", str(value)))
    return [_table(("", "key", "value"), rows)] if rows else ["Not recorded in the weights file."]


def _scores(source: str) -> list[str]:
    """The last line of the run's `eval_metrics.json`, for weights in `RUN/eval/training_N/`."""
    for folder in list(Path(source).absolute().parents)[:3]:
        path = folder / "eval_metrics.json"
        if path.is_file() and (lines := path.read_text().splitlines()):
            last = json.loads(lines[-1])
            return [_table(("measure", "value"), [(name, f"{value:.4g}") for name, value in last.items()])]
    return ["None found next to the weights."]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _file_row(path: Path) -> tuple[str, str, str]:
    return path.name, str(path.stat().st_size), _sha256(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
