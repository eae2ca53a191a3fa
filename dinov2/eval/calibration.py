"""Can a prediction be trusted: confidence against accuracy, a temperature that mends it, the price of abstaining."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BINS = 15


class Reliability(NamedTuple):
    """Per bin of confidence: number of predictions, their mean confidence and their accuracy (NaN where empty)."""

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def reliability(probabilities: np.ndarray, targets: np.ndarray, bins: int = BINS) -> Reliability:
    """Predictions (N, C) in `bins` equally wide bins of the confidence in the predicted class."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == targets
    where = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(where, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(where, weights=confidence, minlength=bins) / count
        accuracy = np.bincount(where, weights=correct, minlength=bins) / count
    return Reliability(count, mean_confidence, accuracy)


def expected_calibration_error(probabilities: np.ndarray, targets: np.ndarray, bins: int = BINS) -> float:
    """Mean distance of confidence and accuracy over bins, weighted by their size; 0 is calibrated, 1 is the worst.

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017, equation 3.
    """
    table = reliability(probabilities, targets, bins)
    gap = np.abs(np.nan_to_num(table.confidence - table.accuracy))
    return float((table.count * gap).sum() / table.count.sum())


def log_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Logarithms that stay finite for classes without a single vote."""
    return np.log(np.maximum(np.asarray(probabilities, np.float64), 1e-8))


def fit_temperature(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """The T for which softmax(log p / T) gives the targets the highest likelihood, between 0.01 and 100.

    The likelihood is concave in 1 / T, so the root of its derivative is found by bisection.
    """
    scores = log_probabilities(probabilities)
    own = scores[np.arange(len(targets)), targets]

    def slope(inverse_temperature: float) -> float:
        weights = softmax(scores * inverse_temperature)
        return float(((weights * scores).sum(axis=1) - own).mean())

    low, high = 1e-2, 1e2  # of 1 / T
    for _ in range(60):
        middle = np.sqrt(low * high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return float(1 / np.sqrt(low * high))


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log p / T), (N, C): T > 1 makes predictions less sure, and never changes which class is first."""
    return softmax(log_probabilities(probabilities) / temperature)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Rows that sum to 1."""
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def risk_coverage(probabilities: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Error rate among the most confident share of predictions, for every share: (coverage, risk), each (N,).

    Predictions of the same confidence are kept or refused together, so that their order in the data does not matter.

    Source: El-Yaniv & Wiener, "On the foundations of noise-free selective classification", JMLR 2010.
    """
    confidence = probabilities.max(axis=1)
    wrong = (probabilities.argmax(axis=1) != targets).astype(np.float64)
    order = np.argsort(-confidence, kind="stable")
    confidence, wrong = confidence[order], wrong[order]
    accepted = np.arange(1, len(wrong) + 1)
    last_of_tie = np.searchsorted(-confidence, -confidence, side="right") - 1
    return accepted / len(wrong), (np.cumsum(wrong) / accepted)[last_of_tie]


def accuracy_at_coverage(probabilities: np.ndarray, targets: np.ndarray, share: float) -> float:
    """Accuracy of the `share` of predictions that are most confident."""
    coverage, risk = risk_coverage(probabilities, targets)
    return float(1 - risk[np.searchsorted(coverage, min(share, 1.0) - 1e-12)])
