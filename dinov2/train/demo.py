"""The main job in minutes on a laptop: draw cells, learn from them without labels, score before and after.

dinov2 demo [--out DIR]
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from dinov2.data import synthetic
from dinov2.train.health import read_history
from dinov2.train.train import main as train

CONFIG = "train/demo"
CLASSES = ("neutrophil", "eosinophil", "basophil", "lymphocyte", "monocyte", "erythroblast", "platelet", "blast")
SCORES = {"knn_1_accuracy": "1-NN", "knn_20_accuracy": "20-NN", "linear_accuracy": "linear probe"}


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Options of `dinov2 demo`."""
    parser = argparse.ArgumentParser("dinov2 demo", description=__doc__.splitlines()[0], add_help=add_help)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the cells and the run")
    parser.add_argument("--per-class", type=int, default=250, help="training images drawn per class, without labels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("opts", nargs="*", metavar="key=value", help=f"settings that override those of {CONFIG}.yaml")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, train, score, and say where everything is; return the exit code of the training."""
    args = get_args_parser().parse_args(argv)
    start = time.monotonic()
    folder = args.out / f"seed{args.seed}"
    cells, run = folder / f"cells_{args.per_class}", folder / "run"
    draw_cells(cells, args.per_class, args.seed)
    drawn = time.monotonic()
    code = train(training_arguments(cells, run, args))
    if code:
        return code
    history = read_history(run)
    curve = run / "scores.png"
    plot_scores(history, curve)
    print(summary(history, run, curve, drawn - start, time.monotonic() - drawn))
    return 0


def draw_cells(folder: Path, per_class: int, seed: int) -> None:
    """Training cells, and two labelled sets that are not trained on: one to fit the probes, one to score them."""
    if folder.exists():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for number, (part, count) in enumerate({"train": per_class, "fit": 40, "eval": 40}.items()):
        synthetic.generate(partial / part, classes=CLASSES, per_class=count, seed=3 * seed + number)
    partial.rename(folder)


def training_arguments(cells: Path, run: Path, args: argparse.Namespace) -> list[str]:
    """The command line of the training, which anybody could type."""
    return [
        "--config-file",
        CONFIG,
        "--output-dir",
        str(run),
        f"train.dataset_path={cells / 'train'}",
        f"evaluation.fit_dataset_path={cells / 'fit'}",
        f"evaluation.eval_dataset_path={cells / 'eval'}",
        f"train.seed={args.seed}",
        *args.opts,
    ]


def plot_scores(history: list[dict[str, float]], path: Path) -> None:
    """Draw the scores against the iterations, from the untrained network on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for (key, label), color in zip(SCORES.items(), ("#0072B2", "#D55E00", "#009E73"), strict=True):
        points = [(row["iteration"], 100 * row[key]) for row in history if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color, label=label)
    axes.set(xlabel="iteration", ylabel="accuracy on held-out cells (%)", ylim=(0, 102))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


def summary(history: list[dict[str, float]], run: Path, curve: Path, drawing: float, training: float) -> str:
    """What came of it, as text."""
    first, last = history[0], history[-1]
    weights = sorted((run / "eval").glob("*/teacher_backbone.safetensors"), key=lambda path: path.stat().st_mtime)[-1]
    table = [f"{'':14}{'untrained':>10}{'trained':>10}"]
    table += [f"{label:14}{first[key]:>10.1%}{last[key]:>10.1%}" for key, label in SCORES.items() if key in last]
    return "\n".join(
        [
            "",
            f"Accuracy on held-out cells before and after {last['iteration']} iterations without labels",
            *table,
            "",
            f"drawing {drawing:.0f} s, training and scoring {training:.0f} s",
            f"scores    {run / 'eval_metrics.json'}",
            f"curve     {curve}",
            f"weights   {weights}",
            f'in Python import dinov2; model = dinov2.load("{weights}")',
            f"losses    tensorboard --logdir {run / 'tensorboard'}",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
