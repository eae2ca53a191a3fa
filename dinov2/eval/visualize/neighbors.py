"""Cells next to cells: nearest neighbours, the typical and the odd ones of a class, labels that look wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dinov2.eval.features import FeatureTable, l2_normalise
from dinov2.eval.probes import nearest_neighbours
from dinov2.eval.visualize.figures import GridRow, Panel, draw_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAME, OTHER = "#0072B2", "#D55E00"  # frames: of the same class as the query, of another one
Read = Callable[[int], np.ndarray]  # row -> image, uint8 (S, S, 3)


def find_neighbours(features: np.ndarray, k: int, rows: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar other rows, best first.

    Args:
        features: (N, D), compared by cosine.
        k: at most N - 1.
        rows: which to find neighbours for; by default all.

    Returns:
        numbers of the neighbours int64 (M, k), and cosines float32 (M, k).
    """
    bank = torch.from_numpy(l2_normalise(np.asarray(features, np.float32)))
    if rows is None:
        cosines, found = nearest_neighbours(bank, bank, k, exclude_self=True)
        return found.numpy(), cosines.numpy()
    rows = np.asarray(rows, np.int64)
    cosines, found = (a.numpy() for a in nearest_neighbours(bank, bank[rows], k + 1))
    own = found == rows[:, None]
    own[~own.any(axis=1), -1] = True  # duplicates may have pushed the query itself out
    return found[~own].reshape(-1, k), cosines[~own].reshape(-1, k)


def typicality(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cosine of each row to the mean direction of the others of its class, float32 (N,); NaN where it is alone.

    High values are typical cells, low ones odd cells. Rows with a negative label count as a class of their own.
    """
    unit = l2_normalise(np.asarray(features, np.float32))
    scores = np.full(len(unit), np.nan, np.float32)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) > 1:
            others = unit[rows].sum(axis=0) - unit[rows]
            scores[rows] = (unit[rows] * l2_normalise(others)).sum(axis=1)
    return scores


@dataclass(frozen=True)
class LabelIssues:
    """Rows whose label looks wrong, the most suspicious first.

    Attributes:
        rows: int64 (M,).
        suggested: int64 (M,), the class that they look like.
        margin: float64 (M,), probability of the suggested class minus that of the given one.
    """

    rows: np.ndarray
    suggested: np.ndarray
    margin: np.ndarray


def find_label_issues(probabilities: np.ndarray, labels: np.ndarray) -> LabelIssues:
    """Likely label errors by confident learning.

    A row counts as class j when its probability of j reaches the mean probability of j among the rows labelled j; of
    several such classes the most probable counts. Rows that count as another class than their label are issues.

    Args:
        probabilities: (N, C), each row predicted by a model that was not trained on it (`cross_validate`).
        labels: (N,), 0 to C - 1.

    Raises:
        ValueError: shapes that do not fit, or a label outside of 0 to C - 1.

    Source: Northcutt et al., "Confident learning: estimating uncertainty in dataset labels", JAIR 2021.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    count, classes = probabilities.shape
    if labels.shape != (count,):
        raise ValueError(f"{count} rows of probabilities but labels of shape {labels.shape}")
    if count and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()} for {classes} classes; leave out unlabelled rows"
        )
    given = probabilities[np.arange(count), labels]
    members = np.bincount(labels, minlength=classes)
    thresholds = np.bincount(labels, weights=given, minlength=classes) / np.maximum(members, 1)
    confident = (probabilities >= thresholds) & (members > 0)
    counted = np.where(confident, probabilities, -1.0).argmax(axis=1)
    rows = np.flatnonzero(confident.any(axis=1) & (counted != labels))
    margin = probabilities[rows, counted[rows]] - given[rows]
    order = np.argsort(-margin, kind="stable")
    return LabelIssues(rows[order], counted[rows][order], margin[order])


def label_issues_of(table: FeatureTable, folds: int = 5, seed: int = 0) -> LabelIssues:
    """Likely label errors of a feature table, by a linear probe that is cross-validated over stratified folds.

    Classes with fewer images than folds are left out of the search.

    Raises:
        ValueError: fewer than two classes with enough images.
    """
    from dinov2.eval.cross_validation import cross_validate, make_folds

    counts = np.bincount(table.labels[table.labels >= 0], minlength=len(table.classes))
    rows = np.flatnonzero((table.labels >= 0) & (counts[table.labels] >= folds))
    kept = table.take(rows)
    outcome = cross_validate(kept, make_folds(kept, folds, seed), "linear")
    issues = find_label_issues(outcome.probabilities, kept.labels)
    return LabelIssues(rows[issues.rows], issues.suggested, issues.margin)


# --------------------------------------------------------------------------- pictures


def plot_neighbours(
    read: Read, queries: Sequence[int], found: np.ndarray, cosines: np.ndarray, names: Sequence[str], *, title: str = ""
) -> Figure:
    """A row for each query cell: itself, then its neighbours, framed blue when of the same class and orange when not.

    Args:
        read: gives the image of a row.
        queries: (M,) rows.
        found: (M, k) rows of their neighbours.
        cosines: (M, k).
        names: name of the class of every row; all empty when there are none, then without frames.
        title: above all.
    """
    rows = []
    for query, neighbours, similar in zip(queries, found, cosines):
        panels = [
            Panel(read(row), f"{cosine:.2f} {names[row]}", _frame(names[row], names[query]))
            for row, cosine in zip(neighbours.tolist(), similar)
        ]
        rows.append(GridRow([Panel(read(query)), *panels], names[query]))
    columns = ["query", *(f"neighbour {i + 1}" for i in range(found.shape[1]))]
    title = title or "Nearest neighbours by cosine (blue: same class, orange: another)"
    return draw_grid(rows, column_titles=columns, title=title)


def _frame(name: str, wanted: str) -> str | None:
    return None if not wanted else SAME if name == wanted else OTHER


def plot_typical(
    read: Read, features: np.ndarray, labels: np.ndarray, classes: Sequence[str], *, count: int = 4, title: str = ""
) -> Figure:
    """For each class its `count` most typical cells and its `count` oddest ones, with their `typicality`."""
    scores = typicality(features, labels)
    rows = []
    for label, name in enumerate(classes):
        members = np.flatnonzero((labels == label) & ~np.isnan(scores))
        ranked = members[np.argsort(-scores[members], kind="stable")]
        if len(ranked) == 0:
            continue
        typical, odd = ranked[:count], ranked[count:][-count:][::-1]
        shown = [(row, SAME) for row in typical] + [(row, OTHER) for row in odd]
        rows.append(GridRow([Panel(read(int(row)), f"{scores[row]:.2f}", frame) for row, frame in shown], name))
    if not rows:
        raise ValueError("no class has two images or more: nothing can be typical")
    columns = ["most typical", *[""] * (count - 1), "oddest", *[""] * (count - 1)]
    title = title or "Most typical (blue) and oddest (orange) cells: cosine to the mean of the class"
    return draw_grid(rows, column_titles=columns, title=title)


def plot_label_issues(
    read: Read, issues: LabelIssues, labels: np.ndarray, classes: Sequence[str], *, count: int = 24, title: str = ""
) -> Figure:
    """The `count` most suspicious labels, six in a row, with the given and the suggested class.

    Raises:
        ValueError: there is none.
    """
    if len(issues.rows) == 0:
        raise ValueError("no label looks wrong, so there is nothing to show")
    shown = [
        Panel(read(int(row)), f"{classes[labels[row]]} → {classes[new]}")
        for row, new in zip(issues.rows[:count], issues.suggested[:count])
    ]
    rows = [GridRow(shown[start : start + 6]) for start in range(0, len(shown), 6)]
    title = title or f"Labels that look wrong, given → suggested ({len(issues.rows)} of {len(labels)})"
    return draw_grid(rows, title=title, panel=1.9)


def write_label_issues(path: str | Path, issues: LabelIssues, table: FeatureTable) -> None:
    """Write all issues as CSV: path, given, suggested, margin."""
    from dinov2.eval.report import write_csv

    write_csv(
        Path(path),
        (
            {
                "path": table.paths[row],
                "given": table.classes[table.labels[row]],
                "suggested": table.classes[new],
                "margin": round(float(margin), 4),
            }
            for row, new, margin in zip(issues.rows, issues.suggested, issues.margin)
        ),
    )
