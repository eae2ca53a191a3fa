import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dinov2.eval import probes
from dinov2.eval.features import FeatureTable
from dinov2.eval.probes import (
    SoftmaxProblem,
    fit_softmax_regression,
    knn_predict,
    linear_probe_predict,
    nearest_neighbours,
    neighbour_votes,
    score_features,
)


def blobs(n, seed, classes=5, dim=24, noise=1.5):
    centres = np.random.default_rng(99).standard_normal((classes, dim))
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return (centres[labels] + noise * rng.standard_normal((n, dim))).astype(np.float32), labels


def table(features, labels, classes="abcde"):
    return FeatureTable(features, labels, [str(i) for i in range(len(labels))], list(classes))


@pytest.fixture
def data():
    return *blobs(150, seed=1), *blobs(70, seed=2)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_is_that_of_scikit_learn_with_the_same_weights(data, k):
    train_x, train_y, test_x, _ = data
    classifier = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    classifier.fit(train_x, train_y)
    ours = knn_predict(train_x, train_y, test_x, [1, 5, 20], num_classes=5)[k]
    np.testing.assert_allclose(ours, classifier.predict_proba(test_x), atol=1e-4)


def test_blocks_find_the_neighbours_that_one_matrix_finds(data, monkeypatch):
    monkeypatch.setattr(probes, "QUERY_BLOCK", 16)
    monkeypatch.setattr(probes, "BANK_BLOCK", 7)  # fewer than k rows, and the last block is not full
    bank, queries = torch.from_numpy(data[0]), torch.from_numpy(data[2])
    similarities, rows = nearest_neighbours(bank, queries, 12)
    expected = (queries @ bank.T).sort(dim=1, descending=True)
    torch.testing.assert_close(similarities, expected.values[:, :12])
    torch.testing.assert_close(rows, expected.indices[:, :12])


def test_faiss_finds_the_same_neighbours(data):
    pytest.importorskip("faiss")
    bank, queries = torch.from_numpy(data[0]), torch.from_numpy(data[2])
    ours, theirs = (nearest_neighbours(bank, queries, 7, backend=name) for name in ("torch", "faiss"))
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-3, rtol=1e-4)
    assert (ours[1] == theirs[1]).float().mean() > 0.99  # ties in rounding aside


def test_a_query_of_the_bank_is_not_its_own_neighbour_even_when_it_has_a_twin():
    bank = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0], [1, 0.1], [0, 1]]), dim=1)
    _, rows = nearest_neighbours(bank, bank, 2, exclude_self=True)
    assert all(i not in found for i, found in enumerate(rows.tolist()))
    assert sorted(rows[2].tolist()) == [0, 1]


def test_votes_of_fewer_neighbours_keep_their_share_of_all():
    similarities, labels = torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[1, 0, 1]])
    weights = torch.softmax(similarities / 0.5, dim=1)[0]
    votes = neighbour_votes(similarities, labels, [1, 3], temperature=0.5, num_classes=2)
    torch.testing.assert_close(votes[1], torch.stack([torch.tensor(0.0), weights[0]])[None])
    torch.testing.assert_close(votes[3], torch.stack([weights[1], weights[0] + weights[2]])[None])


def test_more_neighbours_than_training_images_means_all_of_them(data):
    train_x, train_y, test_x, _ = data
    votes = knn_predict(train_x[:10], train_y[:10], test_x, [10, 200], num_classes=5)
    torch.testing.assert_close(votes[10], votes[200])


@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0])
def test_logistic_regression_is_that_of_scikit_learn(data, C):
    train_x, train_y, test_x, _ = data
    theirs = LogisticRegression(C=C, max_iter=5000, tol=1e-8).fit(train_x.astype(np.float64), train_y)
    ours = fit_softmax_regression(train_x.astype(np.float64), train_y, 5, C=C, tolerance=1e-7)
    np.testing.assert_allclose(ours.predict_proba(test_x), theirs.predict_proba(test_x), atol=2e-3)


def test_the_linear_probe_is_scikit_learns_default_on_standardised_features(data):
    train_x, train_y, test_x, _ = data
    theirs = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000, tol=1e-8)).fit(train_x, train_y)
    ours = linear_probe_predict(train_x, train_y, test_x, 5)
    np.testing.assert_allclose(ours, theirs.predict_proba(test_x), atol=2e-3)


def test_starting_from_another_solution_ends_at_the_same_optimum(data):
    problem = SoftmaxProblem(data[0].astype(np.float64), data[1], 5)
    cold = problem.solve(10, tolerance=1e-9)
    warm = problem.solve(10, tolerance=1e-9, start=problem.solve(0.1))
    torch.testing.assert_close(warm.weight, cold.weight, atol=1e-4, rtol=0)


def test_the_optimum_is_the_same_with_more_columns_than_rows_and_with_repeated_columns():
    x, y = blobs(30, seed=1, dim=60)
    x = np.concatenate([x, x[:, :5], 7 + 1e-3 * x[:, :5]], axis=1).astype(np.float64)
    theirs = LogisticRegression(C=3.0, max_iter=20000, tol=1e-9).fit(x, y)
    ours = fit_softmax_regression(x, y, 5, C=3.0, tolerance=1e-8)
    np.testing.assert_allclose(ours.weight, theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-4)


def test_the_gradient_is_zero_at_the_optimum_of_features_of_very_different_scales():
    x, y = blobs(200, seed=1)
    x = x.astype(np.float64) * np.logspace(-2, 3, x.shape[1]) + 1e4
    model = fit_softmax_regression(x, y, 5)
    error = (model.predict_proba(x) - torch.nn.functional.one_hot(torch.from_numpy(y), 5)).T
    gradient = error @ torch.from_numpy(x - x.mean(axis=0)) + model.weight
    curvature = torch.from_numpy(x.var(axis=0) / 2 + 1 / len(x))  # the bound, of data term and penalty
    assert (gradient.abs() / len(x) / curvature.sqrt()).max() < 1e-4
    assert error.sum(dim=1).abs().max() / len(x) < 1e-5


def test_a_class_without_training_images_is_never_predicted(data):
    train_x, train_y, test_x, _ = data
    known = train_y != 4
    assert (linear_probe_predict(train_x[known], train_y[known], test_x, 5).argmax(1) != 4).all()


def test_a_constant_column_does_not_disturb_the_linear_probe(data):
    train_x, train_y, test_x, _ = data
    wide = [np.concatenate([x, np.full((len(x), 1), 0.1, np.float32)], axis=1) for x in (train_x, test_x)]
    torch.testing.assert_close(
        linear_probe_predict(wide[0], train_y, wide[1], 5), linear_probe_predict(train_x, train_y, test_x, 5)
    )


def test_scores_name_every_probe_and_are_high_when_classes_are_apart():
    train, test = (table(*blobs(n, seed=n, noise=0.2)) for n in (60, 40))
    scores = score_features(train, test)
    assert list(scores) == ["knn_1", "knn_20", "linear"]
    assert all(scores[probe]["macro_f1"] == 1 for probe in scores)


def test_test_classes_are_matched_by_name_not_by_position():
    features, labels = blobs(60, seed=1, noise=0.2)
    flipped = table(features, 4 - labels, classes="edcba")
    assert score_features(table(features, labels), flipped, ks=[1])["knn_1"]["accuracy"] == 1


def test_a_test_class_that_training_lacks_is_named_with_the_way_out():
    features, labels = blobs(60, seed=1)
    with pytest.raises(ValueError, match=r"classes \['z'\] of the test set .* label map"):
        score_features(table(features, labels), table(features, labels, classes="abcdz"))


def test_one_class_cannot_be_learned():
    features, _ = blobs(10, seed=1)
    one = table(features, np.zeros(10, np.int64), classes="a")
    with pytest.raises(ValueError, match="only one class"):
        score_features(one, one)
