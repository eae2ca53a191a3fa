import numpy as np
import pytest

from dinov2.eval.calibration import (
    accuracy_at_coverage,
    apply_temperature,
    expected_calibration_error,
    fit_temperature,
    reliability,
    risk_coverage,
    softmax,
)


def two_classes(confidence, correct):
    """Predictions of class 0 with the given confidences, right or wrong."""
    p = np.asarray(confidence, float)
    return np.stack([p, 1 - p], axis=1), np.where(correct, 0, 1)


def test_the_calibration_error_is_the_gap_weighted_by_the_size_of_the_bins():
    probabilities, targets = two_classes([0.9] * 8 + [0.6] * 2, [True] * 4 + [False] * 4 + [True] * 2)
    # eight at 0.9 of which half are right, two at 0.6 which are both right
    assert expected_calibration_error(probabilities, targets, bins=10) == pytest.approx(0.8 * 0.4 + 0.2 * 0.4)


def test_certain_and_right_is_calibrated():
    probabilities, targets = two_classes([1.0, 1.0], [True, True])
    assert expected_calibration_error(probabilities, targets) == 0
    assert reliability(probabilities, targets).count[-1] == 2


def test_the_temperature_that_sharpened_the_truth_is_found_again():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((20000, 4)) * 1.5
    truth = softmax(scores)
    targets = (truth.cumsum(axis=1) > rng.random((len(truth), 1))).argmax(axis=1)
    assert fit_temperature(softmax(scores * 3), targets) == pytest.approx(3, rel=0.05)


def test_a_temperature_changes_confidence_but_not_the_prediction():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(5, 0.3), size=50)
    cooler = apply_temperature(probabilities, 2.0)
    np.testing.assert_array_equal(cooler.argmax(axis=1), probabilities.argmax(axis=1))
    assert (cooler.max(axis=1) <= probabilities.max(axis=1) + 1e-9).all()
    np.testing.assert_allclose(apply_temperature(probabilities, 1.0), probabilities, atol=1e-6)


def test_risk_is_the_error_rate_of_what_is_kept():
    probabilities, targets = two_classes([0.6, 0.9, 0.8, 0.7], [False, True, True, False])
    coverage, risk = risk_coverage(probabilities, targets)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert accuracy_at_coverage(probabilities, targets, 0.5) == 1
    assert accuracy_at_coverage(probabilities, targets, 1.0) == 0.5


def test_predictions_of_the_same_confidence_are_kept_together_in_any_order():
    forwards = two_classes([1.0] * 4, [True, True, False, False])
    backwards = two_classes([1.0] * 4, [False, False, True, True])
    assert risk_coverage(*forwards)[1].tolist() == risk_coverage(*backwards)[1].tolist() == [0.5] * 4
