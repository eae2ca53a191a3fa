"""The embedded example of the notebooks: drawn cells, and a small model trained on them for a minute or two."""

from pathlib import Path

from dinov2.data import synthetic
from dinov2.data.manifest import cache_folder

# The recipe of `make demo` with 8-pixel patches and registers, for fine maps; small crops and batches make up for them.
CLASSES = ("neutrophil", "eosinophil", "basophil", "lymphocyte", "monocyte", "platelet")
SETTINGS = {
    "student.patch_size": 8,
    "student.num_register_tokens": 4,
    "crops.global_crops_size": 48,
    "crops.local_crops_size": 24,
    "crops.local_crops_number": 2,
    "train.batch_size_per_gpu": 16,
    "train.OFFICIAL_EPOCH_LENGTH": 32,
    "optim.epochs": 3,
    "augmentations.hue": 0.1,  # the two microscopes stain differently
    "augmentations.saturation": 0.4,
    "augmentations.grayscale": 0.2,
    "evaluation.eval_period_iterations": 0,
}


def quick_model() -> tuple[str, list[str]]:
    """Path of the weights, and the folders of cells of two microscopes; both are made once and kept in the cache."""
    folder = cache_folder() / "notebooks"
    cells, run = folder / "cells", folder / "run"
    if not cells.exists():
        unfinished = folder / "cells.part"
        synthetic.generate(unfinished, CLASSES, 60, sources=2, num_workers=2, progress=False, overwrite=True)
        unfinished.rename(cells)
    data = [str(path) for path in sorted(cells.iterdir())]
    iterations = SETTINGS["train.OFFICIAL_EPOCH_LENGTH"] * SETTINGS["optim.epochs"]
    weights = run / "eval" / f"training_{iterations}" / "teacher_backbone.safetensors"
    if not weights.exists():
        train(run, data)
    return str(weights), data


def train(run: Path, data: list[str]) -> None:
    """What `dinov2 train` does on the command line."""
    from dinov2.train.train import main

    settings = {"train.dataset_path": f"[{','.join(data)}]", **SETTINGS}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    if code := main(["--config-file", "train/demo", "--output-dir", str(run), *overrides]):
        raise RuntimeError(f"the training ended with exit code {code}; its log is in {run}")
