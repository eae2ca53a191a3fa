"""Train from scratch on two real data sets, interrupt once, resume, and score: the curve of docs/results.md.

    python benchmarks/real_cells.py --data ../shared/data --out runs/real --minutes 30

The cells are trained on without labels; a fifth of `pbc` is held out of training, and the curve is the accuracy of
probes that learn from the labels of the training part of `pbc` and are scored on the held-out part.
"""

import argparse
import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from dinov2.data import ImageDataset
from dinov2.train.demo import plot_scores
from dinov2.train.health import read_history

SETTINGS = [
    "--config-file=train/demo",
    "train.frac=0.2",
    "train.OFFICIAL_EPOCH_LENGTH=50",
    "optim.epochs=24",
    "optim.base_lr=8e-3",
    "teacher.momentum_teacher=0.95",
    "student.layerscale=1.0",
    "dino.koleo_loss_weight=0.02",
    "evaluation.eval_period_iterations=100",
    "checkpoint.period_iterations=100",
]


def write_labels(images: ImageDataset, folder: Path) -> dict[str, Path]:
    """CSV files of the labelled images of `pbc`: those trained on to fit the probes, those held out to score them."""
    files = {"fit": images.images_list, "eval": images.preserved_images}
    for name, paths in files.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "label"])
            rows.writerows([path, Path(path).parent.name] for path in paths if "/pbc/" in path)
    return {name: folder / f"{name}.csv" for name in files}


def train(command: list[str], seconds: float) -> int:
    """Run a training for some seconds at most, then ask it to stop as a scheduler would."""
    process = subprocess.Popen(command)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        return process.wait(120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with pbc/ and raabin/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("opts", nargs="*", metavar="key=value")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pbc, raabin = ((args.data / name).resolve() for name in ("pbc", "raabin"))
    labels = write_labels(ImageDataset([pbc, raabin], path_preserved=[pbc], frac=0.2), args.out)
    command = [
        *(sys.executable, "-m", "dinov2", "train", f"--output-dir={args.out / 'run'}", *SETTINGS),
        f"train.dataset_path=[{pbc},{raabin}]",
        f"train.path_preserved=[{pbc}]",
        f"evaluation.fit_dataset_path={labels['fit']}",
        f"evaluation.eval_dataset_path={labels['eval']}",
        *args.opts,
    ]
    codes, start = [], time.monotonic()
    for end in (args.minutes * 30, args.minutes * 60):
        codes.append(train(command, start + end - time.monotonic()))
    history = read_history(args.out / "run")
    plot_scores(history, args.out / "scores.png")
    print(json.dumps({"exit codes": codes, "minutes": (time.monotonic() - start) / 60, "scores": history}, indent=1))


if __name__ == "__main__":
    main()
