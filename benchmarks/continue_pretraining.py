"""Continue pretraining on other cells, with and without the safeguards: the curves of docs/continue.md.

    python benchmarks/continue_pretraining.py --out runs/continue --seeds 0 1

The demo is pretrained from nothing on one drawn data set (eight classes, an automated scanner). Then it goes on from
those weights on another: stages of a neutrophil, four of six new, from another scanner. "Plain" is the demo's recipe
with `student.pretrained_weights` and nothing else; "safe" is the same with the safeguards. Both are scored by 20-NN on
held-out labelled cells of the new and of the old data, and never see a label. Runs that are there are not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from sections import table, write_section

from dinov2.data import LabelledDataset, synthetic
from dinov2.eval.features import FeatureTable, extract
from dinov2.eval.probes import score_features
from dinov2.eval.setup import LoadedModel, load_model
from dinov2.train.health import read_history

NEW_CLASSES = ("blast", "promyelocyte", "myelocyte", "metamyelocyte", "band_neutrophil", "neutrophil")
NEW_SOURCE = 1
PER_CLASS = {"train": 250, "fit": 40, "eval": 40}
STEPS = 240
SAFEGUARDS = {
    "optim.freeze_backbone_epochs": 1,  # of 6: the new heads settle first
    "optim.backbone_lr_mult": 0.1,
    "optim.layerwise_decay": 0.8,
}
ARMS = {"plain": {}, "safe": SAFEGUARDS}
SCORES = {"new": "the new data", "old": "the old data"}


def dinov2(*arguments: object) -> None:
    """Run a command of the package; a failure ends the benchmark."""
    subprocess.run([sys.executable, "-m", "dinov2", *map(str, arguments)], check=True)


def pretrain(folder: Path, seed: int) -> tuple[Path, Path]:
    """The cells and the weights of the demo."""
    cells, run = (folder / f"seed{seed}" / name for name in ("cells_250", "run"))
    weights = run / f"eval/training_{STEPS}/teacher_backbone.safetensors"
    if not weights.exists():
        dinov2("demo", "--out", folder, "--seed", seed)
    return cells, weights


def draw_new_cells(folder: Path, seed: int) -> Path:
    """Cells of other classes, from another scanner: to train on, to fit the probes, and to score them."""
    for number, (part, count) in enumerate(PER_CLASS.items()):
        out = folder / part
        if not out.exists():
            drawn = {"classes": NEW_CLASSES, "per_class": count, "seed": 3 * seed + number + 1000}
            synthetic.generate(out, sources=NEW_SOURCE + 1, progress=False, **drawn)
    return folder


def continue_on(cells: Path, weights: Path, run: Path, seed: int, settings: dict[str, object]) -> None:
    """Train on the new cells from the given weights, as anybody would."""
    if (run / f"eval/training_{STEPS}").exists():
        return
    parts = {part: cells / part / f"source_{NEW_SOURCE}" for part in PER_CLASS}
    options = {
        "train.dataset_path": parts["train"],
        "evaluation.fit_dataset_path": parts["fit"],
        "evaluation.eval_dataset_path": parts["eval"],
        "evaluation.eval_period_iterations": 20,
        "evaluation.linear_probe": "false",
        "student.pretrained_weights": weights,
        "train.seed": seed,
        **settings,
    }
    pairs = [f"{key}={value}" for key, value in options.items()]
    dinov2("train", "--config-file", "train/demo", "--output-dir", run, *pairs)


def score_on(cells: Path, weights: Path) -> float:
    """20-NN accuracy of a backbone on labelled cells."""
    model = load_model(weights)
    fit, test = (table_of(model, cells / part) for part in ("fit", "eval"))
    return score_features(fit, test, linear=False)["knn_20"]["accuracy"]


def table_of(model: LoadedModel, folder: Path) -> FeatureTable:
    """Class tokens of the labelled cells of a folder at the size of the training."""
    return extract(model.backbone, LabelledDataset(folder), image_size=model.image_size, mean=model.mean, std=model.std)


def measure(args: argparse.Namespace, seed: int) -> Iterator[dict[str, object]]:
    """Rows of one seed: arm, iteration, and the accuracy on either data set."""
    old_cells, start = pretrain(args.out / "pretrained", seed)
    new_cells = draw_new_cells(args.out / f"seed{seed}" / "new_cells", seed)
    old_start = score_on(old_cells, start)
    for arm, settings in ARMS.items():
        run = args.out / f"seed{seed}" / arm
        continue_on(new_cells, start, run, seed, settings)
        for row in read_history(run):
            step = row["iteration"]
            weights = run / f"eval/training_{step}/teacher_backbone.safetensors"
            old = score_on(old_cells, weights) if step else old_start
            yield {"seed": seed, "arm": arm, "step": step, "new": row["knn_20_accuracy"], "old": old}


def plot(rows: list[dict], path: Path) -> None:
    """Both data sets side by side, a line per arm and seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    colors = dict(zip(ARMS, ("#D55E00", "#0072B2"), strict=True))
    for axes, (key, name) in zip(figure.subplots(1, 2, sharey=True), SCORES.items(), strict=True):
        for seed, arm in runs_of(rows):
            points = [(row["step"], 100 * row[key]) for row in rows if (row["seed"], row["arm"]) == (seed, arm)]
            style = "-" if seed == rows[0]["seed"] else "--"
            label = f"{arm}, seed {seed}"
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, color=colors[arm], label=label)
        axes.set(xlabel="iteration of the continuation", title=f"20-NN on held-out cells of {name}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set(ylabel="accuracy (%)", ylim=(0, 80))
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def runs_of(rows: list[dict]) -> list[tuple[int, str]]:
    """Seed and arm of each run, in order."""
    return list(dict.fromkeys((row["seed"], row["arm"]) for row in rows))


def report(rows: list[dict]) -> str:
    """The scores before, at their lowest, and after, in Markdown."""
    lines, changes = [], {}
    for seed, arm in runs_of(rows):
        own = [row for row in rows if (row["seed"], row["arm"]) == (seed, arm)]
        for key, name in SCORES.items():
            values = [100 * row[key] for row in own]
            scores = (f"{value:.1f} %" for value in (values[0], min(values), values[-1]))
            lines.append([str(seed), arm, name, *scores])
            changes.setdefault((name, arm), []).append(values[-1] - values[0])
    means = [f"{arm} on {name} {statistics.mean(all_):+.1f}" for (name, arm), all_ in changes.items()]
    head = ["seed", "recipe", "20-NN on", "before", "lowest", "after"]
    return f"{table(head, lines)}\n\nMean change in points: {', '.join(means)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for cells and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--picture", type=Path, help="where the curves go (default: continue.png in --out)")
    parser.add_argument("--page", type=Path, help="Markdown page with this benchmark's marks, to put the table in")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in args.seeds:
        rows += measure(args, seed)
        (args.out / "scores.json").write_text(json.dumps(rows, indent=1))
    plot(rows, args.picture or args.out / "continue.png")
    print(text := report(rows))
    if args.page:
        write_section(args.page, "benchmarks/continue_pretraining.py", text)


if __name__ == "__main__":
    main()
