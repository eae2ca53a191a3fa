"""Outcomes of an evaluation as a Markdown report, CSV and JSON tables, and pictures."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov2.data.manifest import describe_counts
from dinov2.eval.calibration import (
    BINS,
    accuracy_at_coverage,
    expected_calibration_error,
    reliability,
    risk_coverage,
)
from dinov2.eval.features import FeatureTable
from dinov2.eval.metrics import (
    SCORES,
    bootstrap_intervals,
    classification_scores,
    confusion_matrix,
    per_class_scores,
)

if TYPE_CHECKING:
    from dinov2.eval.cross_validation import Outcome, Split

logger = logging.getLogger("dinov2")

COVERAGES = (0.8, 0.9, 1.0)
# Okabe and Ito's colours, which people with colour blindness tell apart
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MAIN_COLUMNS = {
    "weighted_f1": "F1 (weighted)",
    "macro_f1": "F1 (macro)",
    "weighted_recall": "recall",
    "weighted_precision": "precision",
    "balanced_accuracy": "balanced accuracy",
}


@dataclass
class Scored:
    """One row of the result table: scores per fold, over all tested images, and how far they can be trusted."""

    outcome: Outcome
    fold_scores: list[dict[str, float]]
    pooled: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    confusion: np.ndarray

    def mean(self, score: str) -> float:
        """Mean over the folds."""
        return float(np.mean([scores[score] for scores in self.fold_scores]))

    def std(self, score: str) -> float | None:
        """Standard deviation over the folds (n - 1); None when there is one."""
        values = [scores[score] for scores in self.fold_scores]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def calibration(self) -> dict[str, float]:
        """Calibration error with and without temperature scaling, and accuracy when the least sure are left out."""
        o = self.outcome
        _, risk = risk_coverage(o.confidence, o.targets)
        return {
            "ece": expected_calibration_error(o.probabilities, o.targets),
            "ece_after_temperature": expected_calibration_error(o.calibrated, o.targets),
            "temperature": float(np.mean(o.temperatures)),
            "area_under_risk_coverage": float(risk.mean()),
            **{f"accuracy_at_{c:.0%}": accuracy_at_coverage(o.confidence, o.targets, c) for c in COVERAGES},
        }


def score(outcome: Outcome, table: FeatureTable, seed: int = 0) -> Scored:
    """Scores of an outcome; `table` holds the rows that were tested, with their groups."""
    num_classes = len(table.classes)
    predictions = outcome.probabilities.argmax(axis=1)
    groups = np.asarray([table.groups[i] or table.paths[i] for i in outcome.rows]) if len(table.groups) else None
    return Scored(
        outcome=outcome,
        fold_scores=[
            classification_scores(outcome.targets[outcome.folds == f], predictions[outcome.folds == f], num_classes)
            for f in np.unique(outcome.folds)
        ],
        pooled=classification_scores(outcome.targets, predictions, num_classes),
        intervals=bootstrap_intervals(outcome.targets, predictions, num_classes, groups=groups, seed=seed),
        confusion=confusion_matrix(outcome.targets, predictions, num_classes),
    )


@dataclass
class Report:
    """All that an evaluation found."""

    table: FeatureTable  # of all data sets, features of any kind
    splits: Sequence[Split]
    outcomes: Sequence[Outcome]
    method_names: Mapping[str, str]
    batch_effects: Mapping[tuple[str, str], Mapping[str, float]] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)  # images by class, on request
    copies: int = 0  # test images whose very bytes were trained on
    skipped: Mapping[str, int] = field(default_factory=dict)  # files that are no images, by reason
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @cached_property
    def scored(self) -> list[Scored]:
        """Every outcome with its scores."""
        return [score(outcome, self.table, self.seed) for outcome in self.outcomes]

    def main_table(self) -> str:
        """The table for a README: per cent, mean ± standard deviation over the folds."""
        rows = []
        for s in self.scored:
            cells = [_per_cent(s.mean(name), s.std(name)) for name in MAIN_COLUMNS]
            rows.append([s.outcome.model, s.outcome.features, self.method_names[s.outcome.method], *cells])
        return markdown_table(["model", "features", "classifier", *MAIN_COLUMNS.values()], rows)

    def interval_table(self) -> str:
        """Scores over all tested images with their bootstrap interval."""
        names = ("accuracy", "macro_f1", "weighted_f1", "balanced_accuracy")
        rows = [
            [
                s.outcome.model,
                s.outcome.features,
                self.method_names[s.outcome.method],
                *(
                    f"{100 * s.pooled[n]:.1f} [{100 * s.intervals[n][0]:.1f}, {100 * s.intervals[n][1]:.1f}]"
                    for n in names
                ),
            ]
            for s in self.scored
        ]
        return markdown_table(["model", "features", "classifier", *(n.replace("_", " ") for n in names)], rows)

    def calibration_table(self) -> str:
        """Calibration and abstention of every row."""
        rows = []
        for s in self.scored:
            c = s.calibration()
            kept = [f"{100 * c[f'accuracy_at_{share:.0%}']:.1f}" for share in COVERAGES]
            rows.append(
                [
                    s.outcome.model,
                    s.outcome.features,
                    self.method_names[s.outcome.method],
                    f"{c['ece']:.3f}",
                    f"{c['temperature']:.2f}",
                    f"{c['ece_after_temperature']:.3f}",
                    *kept,
                    f"{c['area_under_risk_coverage']:.3f}",
                ]
            )
        header = ["model", "features", "classifier", "ECE", "temperature", "ECE after"]
        header += [f"accuracy at {share:.0%}" for share in COVERAGES] + ["risk-coverage area"]
        return markdown_table(header, rows)

    @cached_property
    def best(self) -> Scored:
        """The row with the highest macro F1 that is not a baseline."""
        return max(self.scored, key=lambda s: (not s.outcome.baseline, s.pooled["macro_f1"]))

    def per_class_table(self, scored: Scored) -> str:
        """Precision, recall and F1 of every class in one row of the result table, per cent."""
        names = ("precision", "recall", "f1")
        rows = [
            [row["class"], *(f"{100 * row[name]:.1f}" for name in names), str(row["images"])]
            for row in self._classes_of(scored)
        ]
        return markdown_table(["class", "precision", "recall", "F1", "images"], rows)

    def batch_effect_table(self) -> str:
        """What `batch_effects` found for every model and kind of features."""
        columns = {
            "source_balanced_accuracy": "source predicted",
            "source_chance": "by chance",
            "silhouette_class": "silhouette by class",
            "silhouette_source": "silhouette by source",
            "neighbours_from_other_source": "neighbours from another source",
            "neighbours_from_other_source_if_mixed": "if mixed",
        }
        rows = [
            [model, features, *(f"{effects[name]:.3f}" for name in columns)]
            for (model, features), effects in self.batch_effects.items()
        ]
        return markdown_table(["model", "features", *columns.values()], rows)

    def per_class_rows(self) -> Iterable[dict[str, Any]]:
        """Precision, recall, F1 and number of images of every class in every row."""
        for s in self.scored:
            o = s.outcome
            for row in self._classes_of(s):
                yield {"model": o.model, "features": o.features, "classifier": o.method, **row}

    def _classes_of(self, scored: Scored) -> Iterable[dict[str, Any]]:
        by_class = per_class_scores(scored.confusion)
        for i, name in enumerate(self.table.classes):
            if by_class["support"][i] or by_class["predicted"][i]:
                scores = {key: float(by_class[key][i]) for key in ("precision", "recall", "f1")}
                yield {"class": name, **scores, "images": int(by_class["support"][i])}


# --------------------------------------------------------------------------- writing


def write_report(report: Report, folder: str | Path) -> None:
    """Write report.md and report.json, the CSV tables and the pictures into a folder."""
    folder = Path(folder)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "scores.csv", _score_rows(report))
    write_csv(folder / "per_class.csv", report.per_class_rows())
    write_csv(folder / "folds.csv", _fold_rows(report))
    write_csv(folder / "predictions.csv", _prediction_rows(report))
    if report.table.unreadable:
        write_csv(folder / "unreadable.csv", ({"path": u.path, "reason": u.reason} for u in report.table.unreadable))
    (folder / "report.json").write_text(json.dumps(as_json(report), indent=2), encoding="utf-8")
    pictures = draw_pictures(report, figures)
    (folder / "report.md").write_text(as_markdown(report, pictures), encoding="utf-8")
    logger.info(f"report: {folder / 'report.md'}")


def as_json(report: Report) -> dict[str, Any]:
    """Everything but the predictions, for programs."""
    return {
        "settings": dict(report.settings),
        "images": len(report.table),
        "unreadable": [u._asdict() for u in report.table.unreadable],
        "left_out": dict(report.left_out),
        "copies": report.copies,
        "skipped": dict(report.skipped),
        "classes": {name: int((report.table.labels == i).sum()) for i, name in enumerate(report.table.classes)},
        "splits": [{"train": len(s.train), "test": len(s.test)} for s in report.splits],
        "results": [
            {
                "model": s.outcome.model,
                "features": s.outcome.features,
                "classifier": s.outcome.method,
                "baseline": s.outcome.baseline,
                "scores": {
                    name: {
                        "mean": s.mean(name),
                        "std": s.std(name),
                        "all_images": s.pooled[name],
                        "interval": s.intervals[name],
                        "folds": [scores[name] for scores in s.fold_scores],
                    }
                    for name in SCORES
                },
                "calibration": s.calibration(),
                "confusion": s.confusion.tolist(),
            }
            for s in report.scored
        ],
        "batch_effects": [
            {"model": model, "features": features, **effects}
            for (model, features), effects in report.batch_effects.items()
        ],
    }


def as_markdown(report: Report, pictures: Mapping[str, Sequence[str]]) -> str:
    """The report for people; `pictures` are file names by section."""
    table, paired = report.table, len(report.splits) == 1
    classes = np.bincount(table.labels, minlength=len(table.classes))
    how = (
        f"trained on {len(report.splits[0].train)} images, tested on {len(report.splits[0].test)} others"
        if paired
        else f"{len(report.splits)}-fold cross-validation of {len(table)} images, every image tested once"
    )
    grouped = ", images of a patient or slide always in one fold" if len(table.groups) and not paired else ""
    lines = [
        "# Evaluation",
        "",
        f"{how[0].upper()}{how[1:]}{grouped}. Per cent; "
        + ("one test set, so no deviation." if paired else "mean ± standard deviation over the folds."),
        "",
        report.main_table(),
        "",
        f"Classes: {', '.join(f'{name} ({n})' for name, n in zip(table.classes, classes))}.",
        "Macro scores give every class the same weight; weighted ones every image. Weighted recall is the accuracy.",
    ]
    if report.copies:
        lines.append(f"**{report.copies} test images are copies of training images**, byte for byte: scores rise.")
    if report.left_out:
        lines.append(f"Left out on request: {', '.join(f'{k} ({n} images)' for k, n in report.left_out.items())}.")
    if report.skipped:
        lines.append(f"Files that are not scored: {describe_counts(report.skipped)}.")
    if table.unreadable:
        count = len(table.unreadable)
        lines.append(f"**Could not be read, and are not scored: {count} image(s)**, see `unreadable.csv`.")
    resampled = "patients or slides" if len(table.groups) else "images"
    lines += [
        "",
        "## Intervals",
        "",
        f"Scores over all tested images, with the 95 % bootstrap interval (1000 resamples of {resampled}).",
        "",
        report.interval_table(),
        "",
        "## Classes",
        "",
        *_per_class_section(report),
        *_images(pictures.get("confusion", ())),
        "## Calibration and abstention",
        "",
        f"ECE: expected calibration error ({BINS} bins), before and after temperature scaling, whose temperature "
        "never sees the images that it is applied to. Accuracy at 80 %: of the 80 % most confident predictions, when "
        "the rest is left to a human.",
        "",
        report.calibration_table(),
        "",
        *_images(pictures.get("calibration", ())),
    ]
    if report.batch_effects:
        lines += ["## Batch effects", "", *_batch_effect_section(report)]
    lines += [
        "## Files",
        "",
        "`scores.csv` and `report.json`: every score of every fold. `per_class.csv`. `folds.csv`: which image was "
        "tested in which fold. `predictions.csv`: what each classifier on the models' features said about each image.",
        "",
        "Command: `dinov2 evaluate "
        + " ".join(f"--{name.replace('_', '-')} {_words(value)}" for name, value in report.settings.items() if value)
        + "`",
        "",
    ]
    return "\n".join(lines)


def _words(value: Any) -> str:
    if value is True:
        return ""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _images(names: Sequence[str]) -> list[str]:
    return [line for name in names for line in (f"![{Path(name).stem.replace('_', ' ')}](figures/{name})", "")]


def _per_class_section(report: Report) -> list[str]:
    """The table of the best row; all rows are in the CSV file."""
    o = report.best.outcome
    title = f"{report.method_names[o.method]} on {o.features} of {o.model} (others: `per_class.csv`)"
    return [f"{title}:", "", report.per_class_table(report.best), ""]


def _batch_effect_section(report: Report) -> list[str]:
    return [
        "How well a linear probe tells the source of an image (balanced accuracy), whether cells lie together by class "
        "or by source, and how many of the 20 nearest neighbours come from another source. Sources may differ in their "
        "classes, which predicts the source as well.",
        "",
        report.batch_effect_table(),
        "",
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell, so that the text reads as well as its rendering."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    line = lambda cells: "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths)) + " |"  # noqa: E731
    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows of the same keys."""
    writer = None
    with path.open("w", newline="", encoding="utf-8") as file:
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, fieldnames=list(row))
                writer.writeheader()
            writer.writerow(row)


def _per_cent(mean: float, std: float | None) -> str:
    return f"{100 * mean:.1f}" if std is None else f"{100 * mean:.1f} ± {100 * std:.1f}"


def _score_rows(report: Report) -> Iterable[dict[str, Any]]:
    for s in report.scored:
        for name in SCORES:
            low, high = s.intervals[name]
            yield {
                "model": s.outcome.model,
                "features": s.outcome.features,
                "classifier": s.outcome.method,
                "score": name,
                "mean": s.mean(name),
                "std": s.std(name),
                "all_images": s.pooled[name],
                "low_95": low,
                "high_95": high,
                **{f"fold_{i}": scores[name] for i, scores in enumerate(s.fold_scores)},
            }


def _fold_rows(report: Report) -> Iterable[dict[str, Any]]:
    table = report.table
    if len(report.splits) == 1:
        parts = {"train": report.splits[0].train, "test": report.splits[0].test}
    else:
        parts = {i: split.test for i, split in enumerate(report.splits)}
    for part, rows in parts.items():
        for row in rows:
            group = table.groups[row] if len(table.groups) else ""
            yield {"path": table.paths[row], "label": table.classes[table.labels[row]], "group": group, "fold": part}


def _prediction_rows(report: Report) -> Iterable[dict[str, Any]]:
    classes = report.table.classes
    for o in report.outcomes:
        if o.baseline:
            continue
        best, sure = o.probabilities.argmax(axis=1), o.calibrated.max(axis=1)
        for row, fold, target, prediction, confidence in zip(o.rows, o.folds, o.targets, best, sure):
            yield {
                "path": report.table.paths[row],
                "fold": int(fold),
                "model": o.model,
                "features": o.features,
                "classifier": o.method,
                "label": classes[target],
                "predicted": classes[prediction],
                "confidence": round(float(confidence), 4),
            }


# --------------------------------------------------------------------------- pictures


def draw_pictures(report: Report, folder: Path) -> dict[str, list[str]]:
    """Confusion matrices, reliability and abstention of every model that is not a baseline; file names by section."""
    pictures: dict[str, list[str]] = {"confusion": [], "calibration": []}
    real = [s for s in report.scored if not s.outcome.baseline]
    rows: dict[tuple[str, str], list[Scored]] = {}
    for s in real:
        rows.setdefault((s.outcome.model, s.outcome.features), []).append(s)
    for (model, features), scored in rows.items():
        stem = re.sub(r"[^A-Za-z0-9]+", "_", f"{model}_{features}").strip("_")
        title = f"{model}, {features}"
        for s in scored:
            name = f"confusion_{stem}_{s.outcome.method}.png"
            figure = confusion_figure(
                s.confusion, report.table.classes, f"{report.method_names[s.outcome.method]} ({title})"
            )
            figure.savefig(folder / name, dpi=150, bbox_inches="tight")
            pictures["confusion"].append(name)
        for kind, draw in (("reliability", reliability_figure), ("abstention", abstention_figure)):
            name = f"{kind}_{stem}.png"
            draw(scored, report.method_names, title).savefig(folder / name, dpi=150, bbox_inches="tight")
            pictures["calibration"].append(name)
    return pictures


def new_figure(width: float, height: float):
    """A figure outside of pyplot, so that nothing global changes."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def confusion_figure(confusion: np.ndarray, classes: Sequence[str], title: str):
    """Confusion matrix: colour is the share of the true class, numbers are images."""
    used = (confusion.sum(axis=0) + confusion.sum(axis=1)) > 0
    confusion, names = confusion[used][:, used], [c.replace("_", " ") for c, u in zip(classes, used) if u]
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    size = max(4.0, 0.55 * len(names) + 2.2)
    figure = new_figure(size + 0.6, size)
    ax = figure.add_subplot()
    picture = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i in range(len(names)):
        for j in range(len(names)):
            if confusion[i, j]:
                colour = "white" if share[i, j] > 0.55 else "#333333"
                ax.text(j, i, f"{confusion[i, j]}", ha="center", va="center", color=colour, fontsize=8)
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    ax.set_title(title, fontsize=10)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    figure.colorbar(picture, ax=ax, shrink=0.8, label="share of the true class")
    return figure


def reliability_figure(scored: Sequence[Scored], names: Mapping[str, str], title: str):
    """Accuracy against confidence, before and after temperature scaling, and how often each confidence occurs."""
    figure = new_figure(max(2.7 * len(scored), 4.5), 4.4)
    axes = figure.subplots(2, len(scored), sharex=True, squeeze=False, height_ratios=[3, 1])
    edges = np.linspace(0, 1, BINS + 1)
    for (upper, lower), s in zip(axes.T, scored):
        o = s.outcome
        upper.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=":")
        errors = []
        for probabilities, colour, marker, label in (
            (o.probabilities, PALETTE[1], "o", "as predicted"),
            (o.calibrated, PALETTE[0], "s", "temperature scaled"),
        ):
            bins = reliability(probabilities, o.targets)
            kept = bins.count > 0
            errors.append(expected_calibration_error(probabilities, o.targets))
            style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.5, "label": label}
            upper.plot(bins.confidence[kept], bins.accuracy[kept], clip_on=False, **style)
            lower.stairs(bins.count / bins.count.sum(), edges, color=colour, linewidth=1.5)
        upper.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=np.linspace(0, 1, 6))
        lower.set_ylim(bottom=0)
        upper.set_title(f"{names[o.method]}\nECE {errors[0]:.3f} → {errors[1]:.3f}", fontsize=9)
        lower.set_xlabel("confidence")
        for ax in (upper, lower):
            ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("share")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def abstention_figure(scored: Sequence[Scored], names: Mapping[str, str], title: str):
    """Accuracy of what is kept when the least confident predictions are left to a human."""
    figure = new_figure(5.2, 3.6)
    ax = figure.add_subplot()
    for s, colour in zip(scored, PALETTE * (len(scored) // len(PALETTE) + 1)):
        coverage, risk = risk_coverage(s.outcome.confidence, s.outcome.targets)
        ax.plot(100 * coverage, 100 * (1 - risk), color=colour, linewidth=1.8, label=names[s.outcome.method])
    ax.set(
        xlabel="images kept, per cent (the most confident first)", ylabel="accuracy of those, per cent", xlim=(0, 100)
    )
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    ax.set_title(title, fontsize=10)
    return figure
