"""Scores of predictions: DINOv2's accumulating top-k metrics, and every other score from one confusion matrix.

Scores from a confusion matrix agree with scikit-learn's (a test says so) and cost nothing to repeat, which is what
makes bootstrap intervals over millions of rows cheap.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from dinov2 import distributed

# --------------------------------------------------------------------------- scores of a confusion matrix

SCORES = (
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "weighted_f1",
    "macro_recall",
    "weighted_recall",
    "macro_precision",
    "weighted_precision",
)


def confusion_matrix(targets: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts (C, C): row = true class, column = predicted class."""
    cells = np.asarray(targets, np.int64) * num_classes + np.asarray(predictions, np.int64)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall, F1 and support of each class, for confusion matrices (..., C, C); 0 where undefined."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    support, predicted = confusion.sum(-1).astype(np.float64), confusion.sum(-2).astype(np.float64)
    return {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, support),
        "f1": _ratio(2 * hits, support + predicted),
        "support": support,
        "predicted": predicted,
    }


def scores_of_confusion(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Each of `SCORES` for confusion matrices (..., C, C), shape (...).

    Macro averages are over the classes that occur among targets or predictions, balanced accuracy over those that occur
    among targets; both as scikit-learn does. Weighted averages weigh by the number of targets.
    """
    by_class = per_class_scores(confusion)
    support = by_class["support"]
    occurs = (support + by_class["predicted"]) > 0
    weights = _ratio(support, support.sum(-1, keepdims=True))
    macro = lambda values: _ratio((values * occurs).sum(-1), occurs.sum(-1))  # noqa: E731
    weighted = lambda values: (values * weights).sum(-1)  # noqa: E731
    return {
        "accuracy": weighted(by_class["recall"]),
        "balanced_accuracy": _ratio(by_class["recall"].sum(-1), (support > 0).sum(-1)),
        "macro_f1": macro(by_class["f1"]),
        "weighted_f1": weighted(by_class["f1"]),
        "macro_recall": macro(by_class["recall"]),
        "weighted_recall": weighted(by_class["recall"]),
        "macro_precision": macro(by_class["precision"]),
        "weighted_precision": weighted(by_class["precision"]),
    }


def classification_scores(targets: np.ndarray, predictions: np.ndarray, num_classes: int) -> dict[str, float]:
    """Each of `SCORES` for integer targets and predictions (N,)."""
    return {k: float(v) for k, v in scores_of_confusion(confusion_matrix(targets, predictions, num_classes)).items()}


def bootstrap_intervals(
    targets: np.ndarray,
    predictions: np.ndarray,
    num_classes: int,
    *,
    groups: np.ndarray | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Percentile interval of each of `SCORES` when the tested images are drawn again with replacement.

    Drawing N rows again changes a score only through its confusion matrix, whose cells then follow a multinomial, so a
    resample costs C^2 whatever N is. With `groups` (patients, slides) whole groups are drawn, because the images of one
    patient are not independent.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and 13.
    """
    rng = np.random.default_rng(seed)
    if groups is None or len(groups) == 0:
        counts = confusion_matrix(targets, predictions, num_classes).ravel()
        drawn = rng.multinomial(counts.sum(), counts / counts.sum(), size=resamples)
    else:
        _, group_of = np.unique(np.asarray(groups), return_inverse=True)
        n_groups = group_of.max() + 1
        cells = np.zeros((n_groups, num_classes**2), np.int64)
        np.add.at(cells, (group_of, np.asarray(targets) * num_classes + np.asarray(predictions)), 1)
        drawn = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=resamples) @ cells
    scores = scores_of_confusion(drawn.reshape(resamples, num_classes, num_classes))
    tail = (1 - level) / 2
    return {name: tuple(float(q) for q in np.quantile(v, [tail, 1 - tail])) for name, v in scores.items()}


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient that is 0 where the denominator is."""
    return np.divide(
        numerator, denominator, out=np.zeros(np.broadcast(numerator, denominator).shape), where=denominator != 0
    )


# --------------------------------------------------------------------------- DINOv2's accumulating metrics


class MetricType(Enum):
    """What an evaluation reports; the values are the words of the command line."""

    MEAN_ACCURACY = "mean_accuracy"
    MEAN_PER_CLASS_ACCURACY = "mean_per_class_accuracy"
    PER_CLASS_ACCURACY = "per_class_accuracy"
    IMAGENET_REAL_ACCURACY = "imagenet_real_accuracy"

    @property
    def accuracy_averaging(self) -> AccuracyAveraging | None:
        """How classes are averaged; None for ImageNet-ReaL, which has several right answers per image."""
        return AccuracyAveraging.__members__.get(self.name)

    def __str__(self) -> str:
        return self.value


class AccuracyAveraging(Enum):
    """Over all images (micro), over classes (macro), or not at all."""

    MEAN_ACCURACY = "micro"
    MEAN_PER_CLASS_ACCURACY = "macro"
    PER_CLASS_ACCURACY = "none"

    def __str__(self) -> str:
        return self.value


class CountingMetric:
    """A ratio of counts that adds up over batches and over processes.

    `numerator` and `denominator` are summed in `update`, and over all processes in `compute`, so that one process and
    several report the same number.
    """

    def __init__(self, num_counts: int):
        self.numerator = torch.zeros(num_counts, dtype=torch.int64)
        self.denominator = torch.zeros(num_counts, dtype=torch.int64)

    def to(self, device: torch.device | str) -> CountingMetric:
        """Count on `device`."""
        self.numerator, self.denominator = self.numerator.to(device), self.denominator.to(device)
        return self

    def reset(self) -> None:
        """Forget what was counted."""
        self.numerator.zero_()
        self.denominator.zero_()

    def clone(self) -> CountingMetric:
        """An independent copy."""
        return copy.deepcopy(self)

    def totals(self) -> tuple[Tensor, Tensor]:
        """Counts of all processes."""
        both = distributed.sum_over_ranks(torch.stack([self.numerator, self.denominator]))
        return both[0], both[1]


class TopKAccuracy(CountingMetric):
    """Share of images whose target is among the k highest predictions.

    Args:
        num_classes: C.
        top_k: more than C counts as C.
        average: "micro" over images, "macro" over the classes that occur among the targets, "none" for one per class (0
            where a class does not occur).
    """

    def __init__(self, num_classes: int, top_k: int = 1, average: str = "micro"):
        super().__init__(int(num_classes))
        self.num_classes, self.top_k, self.average = int(num_classes), top_k, average

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch: preds (B, C) scores, target (B,) classes."""
        hit = (preds.topk(min(self.top_k, preds.shape[1]), dim=1).indices == target[:, None]).any(dim=1)
        ones = torch.ones_like(target, dtype=self.numerator.dtype)
        self.numerator.index_add_(0, target, hit.to(ones.dtype))
        self.denominator.index_add_(0, target, ones)

    def compute(self) -> Tensor:
        """A 0-d tensor, or (C,) for average "none"."""
        hits, support = self.totals()
        if self.average == "micro":
            return (hits.sum() / support.sum()).float()
        per_class = (hits / support.clamp_min(1)).float()
        return per_class[support > 0].mean() if self.average == "macro" else per_class


class ImageNetReaLAccuracy(CountingMetric):
    """Share of images of which one of the k highest predictions is among the right answers.

    Targets (B, A) list up to A right classes, -1 elsewhere; images without any right class are left out.

    Source: Beyer et al., "Are we done with ImageNet?", 2020.
    """

    def __init__(self, num_classes: int, top_k: int = 1):
        super().__init__(1)
        self.num_classes, self.top_k = int(num_classes), top_k

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch: preds (B, C) scores, target (B, A)."""
        best = preds.topk(min(self.top_k, preds.shape[1]), dim=1).indices
        judged = (target >= 0).any(dim=1)
        hit = ((best[:, :, None] == target[:, None, :]).any(dim=2)).any(dim=1) & judged
        self.numerator += hit.sum()
        self.denominator += judged.sum()

    def compute(self) -> Tensor:
        """A 0-d tensor."""
        hits, judged = self.totals()
        return (hits.sum() / judged.sum()).float()


class MetricCollection:
    """Metrics by name that are fed the same batches."""

    def __init__(self, metrics: dict[str, CountingMetric]):
        self.metrics = metrics

    def to(self, device: torch.device | str) -> MetricCollection:
        """Count on `device`."""
        for metric in self.metrics.values():
            metric.to(device)
        return self

    def clone(self) -> MetricCollection:
        """An independent copy."""
        return copy.deepcopy(self)

    def reset(self) -> None:
        """Forget what was counted."""
        for metric in self.metrics.values():
            metric.reset()

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch in every metric."""
        for metric in self.metrics.values():
            metric.update(preds, target)

    def compute(self) -> dict[str, Tensor]:
        """The value of every metric, over all processes."""
        return {name: metric.compute() for name, metric in self.metrics.items()}


def build_metric(metric_type: MetricType, *, num_classes: int, ks: Iterable[int] | None = None) -> MetricCollection:
    """The metrics "top-k" of a type, for k = 1 and 5 unless told otherwise."""
    ks = (1, 5) if ks is None else tuple(ks)
    if metric_type.accuracy_averaging is not None:
        return build_topk_accuracy_metric(metric_type.accuracy_averaging, num_classes, ks)
    return build_topk_imagenet_real_accuracy_metric(num_classes, ks)


def build_topk_accuracy_metric(
    average_type: AccuracyAveraging, num_classes: int, ks: tuple[int, ...] = (1, 5)
) -> MetricCollection:
    """Top-k accuracies with one way of averaging."""
    return MetricCollection({f"top-{k}": TopKAccuracy(num_classes, k, average_type.value) for k in ks})


def build_topk_imagenet_real_accuracy_metric(num_classes: int, ks: tuple[int, ...] = (1, 5)) -> MetricCollection:
    """Top-k ImageNet-ReaL accuracies."""
    return MetricCollection({f"top-{k}": ImageNetReaLAccuracy(num_classes, k) for k in ks})
