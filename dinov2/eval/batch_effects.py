"""How much of the features is the microscope rather than the cell."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import silhouette_score
from sklearn.model_selection import StratifiedKFold

from dinov2.eval.features import FeatureTable, l2_normalise
from dinov2.eval.metrics import classification_scores
from dinov2.eval.probes import linear_probe_predict, nearest_neighbours

MAX_ROWS = 5000  # rows that a silhouette is computed on: it costs their square


def batch_effects(table: FeatureTable, *, folds: int = 5, neighbours: int = 20, seed: int = 0) -> dict[str, float]:
    """Numbers that say whether cells lie together by class or by source (scanner, laboratory, data set).

    Returns:
        - source_balanced_accuracy: of a linear probe that guesses the source, cross-validated; 1 means that every image
          tells where it comes from.
        - source_chance: what guessing gives.
        - silhouette_class, silhouette_source: -1 to 1, cosine distance; class should be high, source near 0.
        - neighbours_from_other_source: share among the nearest neighbours, and
          neighbours_from_other_source_if_mixed: the share if sources did not matter.

    Raises:
        ValueError: fewer than two sources.
    """
    names, source = np.unique(np.asarray(table.sources), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"batch effects need images of two sources or more, got {names.tolist()}")
    features = l2_normalise(table.features)
    counts = np.bincount(source)
    _, rows = nearest_neighbours(
        torch.from_numpy(features), torch.from_numpy(features), min(neighbours, len(table) - 1), exclude_self=True
    )
    mixed = 1 - (counts * (counts - 1)).sum() / (len(source) * (len(source) - 1))
    return {
        "source_balanced_accuracy": _source_probe(table.features, source, min(folds, counts.min()), seed),
        "source_chance": 1 / len(names),
        "silhouette_class": _silhouette(features, table.labels, seed),
        "silhouette_source": _silhouette(features, source, seed),
        "neighbours_from_other_source": float((source[rows.numpy()] != source[:, None]).mean()),
        "neighbours_from_other_source_if_mixed": float(mixed),
    }


def _source_probe(features: np.ndarray, source: np.ndarray, folds: int, seed: int) -> float:
    """Cross-validated balanced accuracy; NaN when a source has a single image."""
    if folds < 2:
        return float("nan")
    predictions = np.empty_like(source)
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(features, source):
        probabilities = linear_probe_predict(features[train], source[train], features[test], source.max() + 1)
        predictions[test] = probabilities.argmax(dim=1).numpy()
    return classification_scores(source, predictions, source.max() + 1)["balanced_accuracy"]


def _silhouette(features: np.ndarray, groups: np.ndarray, seed: int) -> float:
    """Silhouette in cosine distance; NaN when it is not defined."""
    if not 1 < len(np.unique(groups)) < len(groups):
        return float("nan")
    sample = min(MAX_ROWS, len(features))
    return float(silhouette_score(features, groups, metric="cosine", sample_size=sample, random_state=seed))
