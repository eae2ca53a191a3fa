import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from dinov2.eval.metrics import (
    AccuracyAveraging,
    ImageNetReaLAccuracy,
    MetricType,
    bootstrap_intervals,
    build_metric,
    build_topk_accuracy_metric,
    classification_scores,
    confusion_matrix,
    per_class_scores,
)


@pytest.fixture
def answers():
    """Targets and predictions over 6 classes; class 4 is never a target, class 5 neither a target nor predicted."""
    rng = np.random.default_rng(0)
    targets = rng.choice(4, size=200, p=[0.6, 0.2, 0.15, 0.05])
    predictions = np.where(rng.random(200) < 0.7, targets, rng.choice(5, size=200))
    return targets, predictions


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_scores_are_those_of_scikit_learn_also_with_absent_classes(answers):
    targets, predictions = answers
    expected = {
        "accuracy": sk.accuracy_score(targets, predictions),
        "balanced_accuracy": sk.balanced_accuracy_score(targets, predictions),
        "macro_f1": sk.f1_score(targets, predictions, average="macro"),
        "weighted_f1": sk.f1_score(targets, predictions, average="weighted"),
        "macro_recall": sk.recall_score(targets, predictions, average="macro", zero_division=0),
        "weighted_recall": sk.recall_score(targets, predictions, average="weighted"),
        "macro_precision": sk.precision_score(targets, predictions, average="macro"),
        "weighted_precision": sk.precision_score(targets, predictions, average="weighted"),
    }
    assert classification_scores(targets, predictions, num_classes=6) == pytest.approx(expected)


def test_the_confusion_matrix_has_true_classes_in_rows(answers):
    targets, predictions = answers
    np.testing.assert_array_equal(
        confusion_matrix(targets, predictions, 6), sk.confusion_matrix(targets, predictions, labels=range(6))
    )


def test_per_class_scores_are_those_of_scikit_learn(answers):
    targets, predictions = answers
    ours = per_class_scores(confusion_matrix(targets, predictions, 6))
    expected = sk.precision_recall_fscore_support(targets, predictions, labels=range(6), zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), expected):
        np.testing.assert_allclose(ours[name], values)


def test_the_bootstrap_interval_of_accuracy_is_the_binomial_one():
    n, share = 2000, 0.8
    targets = np.zeros(n, np.int64)
    predictions = (np.arange(n) >= share * n).astype(np.int64)
    low, high = bootstrap_intervals(targets, predictions, 2, resamples=4000)["accuracy"]
    half = 1.96 * math.sqrt(share * (1 - share) / n)
    assert low == pytest.approx(share - half, abs=0.003)
    assert high == pytest.approx(share + half, abs=0.003)


def test_the_bootstrap_over_groups_is_wider_when_a_group_is_right_or_wrong_as_a_whole():
    groups = np.repeat(np.arange(20), 50)
    targets = np.zeros(1000, np.int64)
    predictions = (groups < 5).astype(np.int64)  # 5 of 20 patients are wrong throughout
    low, high = bootstrap_intervals(targets, predictions, 2, groups=groups)["accuracy"]
    half = 1.96 * math.sqrt(0.75 * 0.25 / 20)
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)


def test_words_of_the_command_line():
    assert [str(m) for m in MetricType] == [
        "mean_accuracy",
        "mean_per_class_accuracy",
        "per_class_accuracy",
        "imagenet_real_accuracy",
    ]
    assert [str(a) for a in AccuracyAveraging] == ["micro", "macro", "none"]
    assert MetricType.IMAGENET_REAL_ACCURACY.accuracy_averaging is None


@pytest.mark.parametrize("k", [1, 3])
def test_top_k_accuracies_are_those_of_a_loop_whatever_the_batches(k):
    generator = torch.Generator().manual_seed(0)
    preds, target = torch.randn(40, 6, generator=generator), torch.randint(0, 5, (40,), generator=generator)
    hits = np.array([int(t in np.argsort(-p)[:k]) for p, t in zip(preds.numpy(), target.tolist())])
    by_class = [hits[target.numpy() == c].mean() for c in range(5)]
    for name, expected in (
        ("MEAN_ACCURACY", hits.mean()),
        ("MEAN_PER_CLASS_ACCURACY", np.mean(by_class)),
        ("PER_CLASS_ACCURACY", [*by_class, 0.0]),
    ):
        metric = build_metric(MetricType[name], num_classes=6, ks=(k,))
        for rows in (slice(0, 7), slice(7, 40)):
            metric.update(preds[rows], target[rows])
        np.testing.assert_allclose(metric.compute()[f"top-{k}"], expected, rtol=1e-6)


def test_a_clone_counts_for_itself_and_reset_forgets():
    metric = build_topk_accuracy_metric(AccuracyAveraging.MEAN_ACCURACY, num_classes=3)
    assert list(metric.compute()) == ["top-1", "top-5"]
    copy = metric.clone()
    metric.update(torch.eye(3), torch.tensor([0, 1, 2]))
    copy.update(torch.eye(3), torch.tensor([1, 1, 1]))
    assert float(metric.compute()["top-1"]) == 1
    assert float(copy.compute()["top-1"]) == pytest.approx(1 / 3)
    copy.reset()
    copy.update(torch.eye(3), torch.tensor([0, 1, 2]))
    assert float(copy.compute()["top-1"]) == 1


def test_imagenet_real_counts_any_right_answer_and_leaves_out_images_without_one():
    metric = ImageNetReaLAccuracy(num_classes=3)
    preds = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.9, 0.1, 0.0]])
    metric.update(preds, torch.tensor([[1, 0], [1, 2], [-1, -1]]))
    assert float(metric.compute()) == 0.5
