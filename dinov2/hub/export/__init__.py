"""Write a backbone for other tools, and prove it: each export is read back and compared before it counts.

dinov2 export --weights run/eval/training_1000/teacher_backbone.pth --to hf --out exported
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2.hub.backbones import load_backbone
from dinov2.models.architecture import build_empty_backbone, describe_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import load_weights, read_state_dict

from .model_card import write_model_card

CHECK_BATCH = 3  # another number of images than the one an exporter traces with


class Target(NamedTuple):
    """A format: the module with its `write(model, folder, run)` and `read(folder)`, and what it is."""

    module: str
    what: str
    tolerance: float


TARGETS: dict[str, Target] = {
    "hub": Target("plain", "a .pth file in DINOv2's own names, for torch.hub and dinov2.load", 1e-5),
    "safetensors": Target("plain", "the same as a .safetensors file", 1e-5),
    "hf": Target("huggingface", "a folder for AutoModel.from_pretrained of Hugging Face transformers", 1e-5),
    "timm": Target("timm", "a folder for timm.create_model('local-dir:FOLDER')", 1e-5),
    "onnx": Target("onnx", "an ONNX graph with any batch size, checked in onnxruntime", 1e-4),
    "onnx-any-size": Target("onnx", "the same for images of any size that the patches tile", 1e-4),
    "torch-export": Target("torch_export", "a .pt2 program for torch.export.load, with any batch size", 1e-5),
}

Features = tuple[Tensor, Tensor]  # class tokens (B, D) and patch tokens (B, N, D), normalised
Reader = Callable[[Tensor], Features]


class Export(NamedTuple):
    """What an export left, and how far its features are from the model's."""

    files: list[Path]
    max_difference: float


class FeatureModel(nn.Module):
    """Images to class and patch tokens as two tensors: what traced programs compute."""

    def __init__(self, model: DinoVisionTransformer) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, images: Tensor) -> Features:
        """`(B, C, H, W)` to `(B, D)` and `(B, N, D)`."""
        features = self.model.forward_features(images)
        return features["x_norm_clstoken"], features["x_norm_patchtokens"]


def export(
    model: DinoVisionTransformer,
    target: str,
    out: str | Path,
    *,
    run: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
) -> Export:
    """Write a model in another format, read it back with the library it is for, and compare the features.

    Args:
        model: in eval mode, float32, on the CPU, with positions for the image size that the export is made for.
        target: one of `TARGETS`.
        out: folder for the files; left as it was when the export is refused.
        run: config of the training run, kept where the format has room.
        tolerance: largest difference accepted, relative to the largest feature if that is above 1.

    Raises:
        ValueError: unknown target, a missing library, a model that the format has no place for, or features that differ
            by more than the tolerance.
    """
    if target not in TARGETS:
        raise ValueError(f"--to {target} is unknown; choose one of {', '.join(TARGETS)}")
    module = importlib.import_module(f"{__name__}.{TARGETS[target].module}")
    tolerance = TARGETS[target].tolerance if tolerance is None else tolerance
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as scratch, torch.inference_mode():
        folder = Path(scratch)
        module.write(model, folder, target=target, run=run or {})
        reference, exported = FeatureModel(model), module.read(folder)
        differences = [compare(reference, exported, images) for images in _check_images(model, target)]
        difference = float(torch.tensor(differences).max())  # not a number where one is not
        if not difference <= tolerance:  # also when it is not a number
            raise ValueError(
                f"export to {target} refused: features differ by {difference:.2e}, more than {tolerance:.0e}"
            )
        files = [Path(shutil.move(path, out / path.name)) for path in sorted(folder.iterdir())]
    return Export(files, difference)


def compare(reference: Reader, exported: Reader, images: Tensor) -> float:
    """Largest difference between features, relative to the largest feature if that is above 1."""
    worst = []
    for expected, found in zip(reference(images), exported(images), strict=True):
        if found.shape != expected.shape:
            raise ValueError(f"the export gives features of shape {tuple(found.shape)}, not {tuple(expected.shape)}")
        worst.append((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))
    return float(torch.stack(worst).max())  # not a number where one feature is not


def with_all_parts(model: DinoVisionTransformer) -> DinoVisionTransformer:
    """The same function with every bias and LayerScale there is, for formats that cannot leave them out."""
    options = {**describe_backbone(model), "init_values": 1.0, "qkv_bias": True, "proj_bias": True, "ffn_bias": True}
    if options["ffn_layer"] == "identity":
        raise ValueError("other libraries have no blocks without a feed-forward network (ffn_layer='identity')")
    complete = build_empty_backbone(options)
    load_weights(complete, model.state_dict(), label="model to export")
    return complete.eval()


def import_or_explain(name: str) -> Any:
    """Import an optional library, or say which extra brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"this export needs {name}: pip install 'dinov2[export]'") from error


def get_args_parser(
    add_help: bool = True, parents: Sequence[argparse.ArgumentParser] | None = None
) -> argparse.ArgumentParser:
    """Options of `dinov2 export`."""
    formats = "\n".join(f"  {name:13} {target.what}" for name, target in TARGETS.items())
    parser = argparse.ArgumentParser(
        "dinov2 export",
        description="Write a model for other tools; the result is read back and must give the same features.",
        epilog=f"formats:\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=list(parents or []),
        add_help=add_help,
    )
    parser.add_argument("--weights", required=True, help="weights file or folder in any layout, or a model's name")
    parser.add_argument("--to", required=True, choices=TARGETS, metavar="FORMAT", help="one of the formats below")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--image-size", type=int, help="side of the images, pixels (default: that of the weights)")
    parser.add_argument("--checkpoint-key", help="entry of the weights file, such as student (default: the teacher)")
    parser.add_argument("--tolerance", type=float, help="largest difference of features accepted (default: by format)")
    parser.add_argument(
        "--license", default="other", help="licence of the weights, for the model card (default: other)"
    )
    parser.add_argument(
        "--data",
        nargs="*",
        default=[],
        type=Path,
        metavar="FILE",
        help="lists or reports of the training images, named in the model card with their SHA-256",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export from the command line."""
    arguments = get_args_parser().parse_args(argv)
    options = {"img_size": arguments.image_size} if arguments.image_size else {}
    model = load_backbone(arguments.weights, checkpoint_key=arguments.checkpoint_key, **options)
    run = (read_state_dict(arguments.weights).config or {}).get("run", {})
    result = export(model, arguments.to, arguments.out, run=run, tolerance=arguments.tolerance)
    card = write_model_card(
        arguments.out,
        model,
        source=arguments.weights,
        target=arguments.to,
        result=result,
        run=run,
        license_name=arguments.license,
        data_files=arguments.data,
    )
    print(f"features of {CHECK_BATCH} images: largest difference {result.max_difference:.2e}")
    for path in (*result.files, card):
        print(f"wrote {path}")
    return 0


def _check_images(model: DinoVisionTransformer, target: str) -> list[Tensor]:
    """Batches of the model's own size, and of a smaller and a larger one where any size will do."""
    rows, columns = model.patch_embed.patches_resolution
    grids = [(rows, columns)]
    if target == "onnx-any-size":
        grids += [(max(rows // 2, 2), max(columns // 2, 2) + 1), (rows + 1, columns + 3)]
    generator = torch.Generator().manual_seed(0)
    patch = model.patch_size
    return [torch.randn(CHECK_BATCH, model.in_chans, r * patch, c * patch, generator=generator) for r, c in grids]
