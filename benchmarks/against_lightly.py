"""Our training against lightly-train's DINOv2: images per second, and 20-NN accuracy after the same time on one core.

    python benchmarks/against_lightly.py --minutes 2 --write docs/benchmarks.md

lightly-train is installed from PyPI into an environment of its own (`--env`) and never imported here. Both sides get
the drawn cells of `dinov2 demo`, its ViT-Ti/14, crops, heads, batch and learning rate, one CPU core and one data
worker. Time is CPU time of the whole command, workers and imports included: on one idle core that is wall time, and on
a busy one it still is fair. A short run of each side tells how many steps fill it; schedules are laid over these.
Weights of both are scored by the same code: 20 nearest neighbours among labelled cells that no side trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from sections import table, write_section

from dinov2.configs import load_and_merge_config
from dinov2.data.datasets.custom_image_datasets import LabelledDataset
from dinov2.eval.features import extract
from dinov2.eval.probes import score_features
from dinov2.models.vision_transformer import vit_tiny
from dinov2.models.weights import load_weights
from dinov2.train.demo import draw_cells

NAME = "benchmarks/against_lightly.py"
WORKER = Path(__file__).with_name("lightly_worker.py")
CONFIG = "train/demo"
SKIPPED_STEPS = 5  # of the measured speed: workers start, caches fill


class Run(NamedTuple):
    """What one training did."""

    images_per_second: float
    wall: float  # seconds from the command to its end, with imports
    cpu: float
    steps: int
    batch: int
    weights: Path

    @property
    def step_cpu(self) -> float:
        """CPU seconds of a step: its wall time at the share of the core that the command had."""
        return self.batch / self.images_per_second * self.cpu / self.wall

    @property
    def images_per_cpu_second(self) -> float:
        """Of the whole command."""
        return self.steps * self.batch / self.cpu

    def steps_within(self, seconds: float) -> float:
        """Steps that a run of so many CPU seconds has, after a start like this one's."""
        return (seconds - self.cpu) / self.step_cpu + self.steps


def prepare_environment(folder: Path) -> Path:
    """Install lightly-train into a virtual environment that sees this one's packages; return its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        found = [str(Path(path).resolve()) for path in sys.path if path.endswith("site-packages")]
        ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        inside = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
        Path(inside, "outer.pth").write_text("\n".join(found) + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "lightly-train"], check=True)
    return python


def timed_run(command: Sequence[str | Path], log: Path) -> tuple[float, float]:
    """Run a command on this process's cores; return its seconds of wall and CPU time, those of its workers included."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with log.open("w") as out:
        subprocess.run([str(word) for word in command], check=True, stdout=out, stderr=subprocess.STDOUT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - started, cpu


def train_ours(cells: Path, out: Path, steps: int, dtype: str, seed: int) -> Run:
    """Our side: `dinov2 train` with the demo's configuration, schedules laid over `steps`, no scoring in between."""
    command = [
        *(sys.executable, "-m", "dinov2", "train", "--no-resume", "--config-file", CONFIG, "--output-dir", out),
        f"train.dataset_path={cells / 'train'}",
        f"train.seed={seed}",
        "train.OFFICIAL_EPOCH_LENGTH=1",
        "train.log_period=1",
        f"optim.epochs={steps}",
        f"optim.warmup_epochs={steps // 6}",
        f"teacher.warmup_teacher_temp_epochs={steps // 2}",
        f"compute_precision.dtype={dtype}",
        "evaluation.eval_period_iterations=0",
        f"checkpoint.period_iterations={steps}",
    ]
    (out / "training_metrics.json").unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    wall, cpu = timed_run(command, out / "log.txt")
    rows = [json.loads(line) for line in (out / "training_metrics.json").read_text().splitlines()]
    batch = load_and_merge_config(CONFIG).train.batch_size_per_gpu
    speed = batch / statistics.mean(row["iter_time"] for row in rows[SKIPPED_STEPS:])
    return Run(speed, wall, cpu, steps, batch, out / "eval" / f"training_{steps}" / "teacher_backbone.pth")


def train_theirs(python: Path, cells: Path, out: Path, epochs: int, dtype: str, seed: int) -> Run:
    """Their side: `lightly_train.pretrain(method="dinov2")` for a number of passes over the data."""
    cfg = load_and_merge_config(CONFIG)
    batch = cfg.train.batch_size_per_gpu
    settings: dict[str, Any] = {
        "out": str(out / "run"),
        "data": str(cells / "train"),
        "epochs": epochs,
        "steps_per_epoch": len(list((cells / "train").rglob("*.jpg"))) // batch,
        "batch": batch,
        "seed": seed,
        "precision": {"fp32": "32-true", "bf16": "bf16-mixed"}[dtype],
        "base_lr": cfg.optim.base_lr,
        "heads": {key: cfg.dino[key] for key in ("head_n_prototypes", "head_bottleneck_dim", "head_hidden_dim")},
        "crops": {key: list(value) if "scale" in key else value for key, value in cfg.crops.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    wall, cpu = timed_run([python, WORKER, json.dumps(settings)], out / "log.txt")
    ends = json.loads((out / "run" / "step_ends.json").read_text())
    speed = batch * (len(ends) - SKIPPED_STEPS) / (ends[-1] - ends[SKIPPED_STEPS - 1])
    return Run(speed, wall, cpu, len(ends), batch, out / "run" / "exported_models" / "exported_last.pt")


def score(weights: Path | None, cells: Path) -> float:
    """20-NN accuracy of a ViT-Ti/14 with these weights; None: as it is before training."""
    size = load_and_merge_config(CONFIG).crops.global_crops_size
    torch.manual_seed(0)
    model = vit_tiny(patch_size=14, img_size=size, init_values=1e-5, block_chunks=0)
    if weights:
        load_weights(model, weights, min_match=1.0)
    tables = [extract(model.eval(), LabelledDataset(cells / part), image_size=size) for part in ("fit", "eval")]
    return score_features(*tables, ks=(20,), linear=False)["knn_20"]["accuracy"]


def compare(dtype: str, args: argparse.Namespace, python: Path, cells: Path) -> list[list[str]]:
    """Rows of the table: one side after the other, each for the wanted CPU time."""
    seconds = 60 * args.minutes
    trial_ours = train_ours(cells, args.out / f"trial_ours_{dtype}", 20, dtype, args.seed)
    trial_theirs = train_theirs(python, cells, args.out / f"trial_lightly_{dtype}", 1, dtype, args.seed)
    steps = max(20, round(trial_ours.steps_within(seconds)))
    epochs = max(1, round(trial_theirs.steps_within(seconds) / trial_theirs.steps))
    ours = train_ours(cells, args.out / f"ours_{dtype}", steps, dtype, args.seed)
    theirs = train_theirs(python, cells, args.out / f"lightly_{dtype}", epochs, dtype, args.seed)
    rows = []
    for name, run in (("ours", ours), ("lightly-train", theirs)):
        rows.append(
            [
                f"{name}, {dtype}",
                str(run.steps),
                f"{run.cpu:.0f}",
                f"{run.wall:.0f}",
                f"{run.images_per_cpu_second:.1f}",
                f"{run.images_per_cpu_second / theirs.images_per_cpu_second:.2f}",
                f"{score(run.weights, cells):.1%}",
            ]
        )
        print("| " + " | ".join(rows[-1]) + " |", flush=True)
    return rows


def report(rows: list[list[str]], untrained: float, version: str, args: argparse.Namespace) -> str:
    cfg = load_and_merge_config(CONFIG)
    head = ["side", "steps", "CPU s", "wall s", "images per CPU s", "of theirs", "20-NN"]
    command = f"python {NAME} --minutes {args.minutes:g} --dtypes {' '.join(args.dtypes)}"
    crops = f"2 x {cfg.crops.global_crops_size} + {cfg.crops.local_crops_number} x {cfg.crops.local_crops_size}"
    return f"""## Against lightly-train

`{command}`, {time.strftime("%Y-%m-%d")}, Python {platform.python_version()}, PyTorch {torch.__version__},
lightly-train {version}, core {sorted(os.sched_getaffinity(0))}, load {os.getloadavg()[0]:.1f} at the end.

ViT-Ti/14 from random weights, crops of {crops} pixels, two heads of {cfg.dino.head_n_prototypes} prototypes, batch
{cfg.train.batch_size_per_gpu}, Sinkhorn-Knopp, one data worker, on 2,000 drawn cells of 8 classes; one side after the
other on the same core. All times are of the whole command, imports and workers included. 20-NN: 320 labelled cells
vote on 320 others, seed {args.seed}; before training it is {untrained:.1%}.

{table(head, rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3, help="CPU time of each training")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--env", type=Path, default=Path("/tmp/dinov2-lightly"), help="its environment; made if absent")
    parser.add_argument("--out", type=Path, default=Path("/tmp/dinov2-against-lightly"), help="cells and runs")
    parser.add_argument("--core", type=int, default=0, help="of the CPU, for everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="Markdown file that keeps the table")
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)
    python = prepare_environment(args.env)
    ask = "from importlib.metadata import version; print(version('lightly-train'))"
    version = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    cells = args.out / "cells"
    draw_cells(cells, per_class=250, seed=args.seed)
    rows = [row for dtype in args.dtypes for row in compare(dtype, args, python, cells)]
    section = report(rows, score(None, cells), version, args)
    print(section)
    if args.write:
        write_section(args.write, NAME, section)


if __name__ == "__main__":
    main()
