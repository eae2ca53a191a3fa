"""Folds for cross-validation: stratified by class, grouped by patient or slide, the same whatever the order of rows."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold


def make_folds(
    names: Sequence[str],
    labels: Sequence,
    groups: Sequence[str] | None = None,
    *,
    n_folds: int = 5,
    seed: int = 0,
) -> np.ndarray:
    """Return the test fold (0..n_folds-1) of each row.

    Rows are brought into the order of a hash of their names before they are dealt out, so that the fold of an image
    depends on the set of rows and the seed, not on the order in which they come.

    Args:
        names: one unique name per row, such as a path relative to the data set.
        labels: class per row; each fold gets about the same share of every class.
        groups: patient or slide per row, whose rows all go into one fold; rows with "" stand alone. None: no groups.
        n_folds: at least 2.
        seed: another one gives other folds.

    Returns:
        int64 array, one fold per row.

    Raises:
        ValueError: names that repeat, lengths that differ, or a class with fewer rows or groups than folds.
    """
    names, labels = np.asarray(names, dtype=object), np.asarray(labels)
    if len(set(names)) != len(names):
        raise ValueError("names must be unique: the fold of a row hangs on its name")
    if len(labels) != len(names) or (groups is not None and len(groups) != len(names)):
        raise ValueError(f"{len(names)} names, {len(labels)} labels and {len(groups or names)} groups do not match")
    units = np.array([group or f"alone {name}" for group, name in zip(groups, names)]) if groups is not None else names
    _refuse_small_classes(labels, units, n_folds, "groups" if groups is not None else "images")
    order = np.argsort([_hash(seed, name) for name in names], kind="stable")
    if groups is None:
        splits = StratifiedKFold(n_folds).split(order, labels[order].astype(str))
    else:  # which deals groups out in the order of their names: hashed, too
        hashed = np.array([_hash(seed, unit).hex() for unit in units[order]])
        splits = StratifiedGroupKFold(n_folds).split(order, labels[order].astype(str), hashed)
    folds = np.empty(len(names), dtype=np.int64)
    for fold, (_, test) in enumerate(splits):
        folds[order[test]] = fold
    return folds


def write_folds(
    path: str | os.PathLike,
    names: Sequence[str],
    labels: Sequence,
    folds: np.ndarray,
    groups: Sequence[str] | None = None,
) -> None:
    """Write folds as a CSV with the columns path, label, group and fold: a manifest that can be read again."""
    groups = groups if groups is not None else [""] * len(names)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "group", "fold"])
        writer.writerows(zip(names, labels, groups, np.asarray(folds).tolist()))


def read_folds(path: str | os.PathLike) -> dict[str, int]:
    """Read {name: fold} from a CSV that `write_folds` wrote."""
    with open(path, newline="", encoding="utf-8") as file:
        return {row["path"]: int(row["fold"]) for row in csv.DictReader(file)}


def _refuse_small_classes(labels: np.ndarray, units: np.ndarray, n_folds: int, what: str) -> None:
    for label in np.unique(labels):
        count = len(set(units[labels == label]))
        if count < n_folds:
            raise ValueError(
                f"class {label} has {count} {what}, too few for {n_folds} folds; use fewer folds or drop it"
            )


def _hash(seed: int, name: str) -> bytes:
    return hashlib.blake2b(os.fsencode(f"{seed}/{name}"), digest_size=8).digest()
