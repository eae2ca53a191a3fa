"""Classifiers on frozen features: nearest neighbours, a linear probe, logistic regression.

All are exact and deterministic: the neighbours are those of brute force, and the two linear models are convex problems
solved to the optimum, so scikit-learn finds the same (a test says so).

- k-NN: L2-normalised features, votes weighted by exp(cosine / 0.07), as DINOv2.
- linear probe: softmax regression on standardised features with a fixed L2 penalty (C = 1), what
  `make_pipeline(StandardScaler(), LogisticRegression())` fits. Nothing to tune, so it can be read during training.
  DINOv2's own grid of SGD-trained linear layers is `dinov2.eval.linear`.
- logistic regression: features as they are, C chosen on a held-out tenth of the training rows, as DINOv2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dinov2.eval.features import FeatureTable
from dinov2.eval.metrics import classification_scores

DEFAULT_TEMPERATURE = 0.07
QUERY_BLOCK = 1024  # rows of a similarity block; 1024 x 65536 float32 values are 256 MiB
BANK_BLOCK = 65536
LOG_REGRESSION_POWERS = tuple(range(-6, 6))  # of ten: DINOv2's range of C, every fourth of its values


# --------------------------------------------------------------------------- nearest neighbours


def nearest_neighbours(
    bank: Tensor, queries: Tensor, k: int, *, backend: str = "torch", exclude_self: bool = False
) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` (N, D) with the largest dot product to each query (M, D), best first.

    Similarities are computed block by block, so memory does not grow with N x M.

    Args:
        bank: rows to choose from.
        queries: rows to find neighbours for, on any device of their own.
        k: at most N.
        backend: "torch", or "faiss" (extra `faiss`) for an exact search on the CPU.
        exclude_self: query i is row i of the bank, and is not its own neighbour.

    Returns:
        similarities (M, k) and row numbers (M, k).
    """
    if k > len(bank) - exclude_self:
        raise ValueError(f"{k} neighbours asked of {len(bank) - exclude_self} rows")
    search = {"torch": _search_blocks, "faiss": _search_faiss}[backend]
    found = [search(bank, block, k + exclude_self) for block in queries.split(QUERY_BLOCK)]
    if not found:
        return queries.new_zeros(0, k), torch.zeros(0, k, dtype=torch.long, device=queries.device)
    similarities, rows = (torch.cat(part) for part in zip(*found))
    if exclude_self:
        # a duplicate may come before the query itself, so look for it instead of dropping the first column
        own = rows == torch.arange(len(queries), device=rows.device)[:, None]
        own[~own.any(dim=1), -1] = True
        similarities, rows = similarities[~own].view(-1, k), rows[~own].view(-1, k)
    return similarities, rows


def _search_blocks(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Running top k over blocks of the bank."""
    best, rows = None, None
    for start in range(0, len(bank), BANK_BLOCK):
        block = bank[start : start + BANK_BLOCK].to(queries.device)
        similarities, found = (queries @ block.T).topk(min(k, len(block)), dim=1)
        found = found + start
        if best is not None:
            similarities, order = torch.cat([best, similarities], dim=1).topk(min(k, start + len(block)), dim=1)
            found = torch.cat([rows, found], dim=1).gather(1, order)
        best, rows = similarities, found
    return best, rows


def _search_faiss(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact inner-product search by faiss."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError("the faiss backend needs the extra: pip install 'dinov2[faiss]'") from error
    similarities, rows = faiss.knn(
        queries.cpu().float().numpy(), bank.cpu().float().numpy(), k, metric=faiss.METRIC_INNER_PRODUCT
    )
    return torch.from_numpy(similarities).to(queries.device), torch.from_numpy(rows).to(queries.device)


def neighbour_votes(
    similarities: Tensor, neighbour_labels: Tensor, ks: Sequence[int], temperature: float, num_classes: int
) -> dict[int, Tensor]:
    """DINOv2's vote: each neighbour gives exp(similarity / T) to its class; shares are of all neighbours given.

    Args:
        similarities: (M, K), best first.
        neighbour_labels: (M, K).
        ks: how many of the K neighbours vote, each at most K.

    Returns:
        For each k, votes (M, C). Rows sum to 1 for k = K and to less for smaller k.
    """
    weights = torch.softmax(similarities / temperature, dim=1)
    votes, counted, done = {}, weights.new_zeros(len(weights), num_classes), 0
    for k in sorted(ks):
        counted = counted.scatter_add(1, neighbour_labels[:, done:k], weights[:, done:k])
        votes[k], done = counted, k
    return {k: votes[k] for k in ks}


def knn_predict(
    train_features: np.ndarray | Tensor,
    train_labels: np.ndarray | Tensor,
    test_features: np.ndarray | Tensor,
    ks: Sequence[int],
    temperature: float = DEFAULT_TEMPERATURE,
    num_classes: int | None = None,
    backend: str = "torch",
) -> dict[int, Tensor]:
    """Class probabilities (M, C) for each k, by temperature-weighted vote of the nearest neighbours.

    Features are L2-normalised here. A k larger than the training set means all of it.
    """
    bank, queries = (torch.nn.functional.normalize(torch.as_tensor(f), dim=1) for f in (train_features, test_features))
    labels = torch.as_tensor(train_labels).to(queries.device)
    num_classes = int(num_classes or labels.max() + 1)
    allowed = {k: min(k, len(bank)) for k in ks}
    similarities, rows = nearest_neighbours(bank, queries, max(allowed.values()), backend=backend)
    votes = neighbour_votes(similarities, labels[rows], sorted(set(allowed.values())), temperature, num_classes)
    return {k: votes[n] / votes[n].sum(dim=1, keepdim=True) for k, n in allowed.items()}


# --------------------------------------------------------------------------- softmax regression


@dataclass(frozen=True)
class SoftmaxRegression:
    """A linear model with softmax: probabilities of (M, D) are softmax(x @ weight.T + bias)."""

    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)

    def logits(self, features: np.ndarray | Tensor) -> Tensor:
        """Scores (M, C)."""
        x = torch.as_tensor(features).to(self.weight)
        return x @ self.weight.T + self.bias

    def predict_proba(self, features: np.ndarray | Tensor) -> Tensor:
        """Probabilities (M, C)."""
        return self.logits(features).softmax(dim=1)


class SoftmaxProblem:
    """Softmax regression on one training set: minimise C * (sum of cross-entropies) + |weight|^2 / 2 for any C.

    The objective is that of scikit-learn's `LogisticRegression` (the bias is not penalised). It is solved with L-BFGS
    in coordinates in which its curvature is nearly the same in all directions: features are centred (the bias takes it
    up), rotated to their principal axes, and scaled along each by the square root of the bound on the curvature. The
    optimum is the same, and found in tens of steps instead of thousands.

    Source of the bound: Boehning, "Multinomial logistic regression algorithm", Ann. Inst. Stat. Math. 1992.

    Args:
        features: (N, D); the precision of the solution is theirs.
        labels: (N,), from 0 to num_classes - 1; a class may be absent, its probability then tends to 0.
    """

    def __init__(self, features: np.ndarray | Tensor, labels: np.ndarray | Tensor, num_classes: int):
        x = torch.as_tensor(features)
        self.targets = one_hot(torch.as_tensor(labels).to(x.device, torch.long), num_classes).to(x.dtype)
        self.mean = x.mean(dim=0)
        centred = (x - self.mean).double()
        self.axes, self.variance = _principal_axes(centred)
        self.scores = (centred @ self.axes).to(x.dtype)  # (N, R)

    def solve(
        self, C: float, *, max_iter: int = 1000, tolerance: float = 1e-5, start: SoftmaxRegression | None = None
    ) -> SoftmaxRegression:
        """The optimum for one C.

        Args:
            C: inverse strength of the penalty.
            max_iter: L-BFGS iterations at most.
            tolerance: stop when no component of the gradient of the mean loss, in scaled coordinates, is larger.
            start: where to begin, such as the solution for a nearby C.
        """
        n, like = len(self.scores), self.scores
        penalty = 1 / (C * n)  # the mean loss has gradients of the same size for every C and N
        unit = (self.variance / 2 + penalty).sqrt()  # of each coordinate
        x, shrink = like / unit.to(like), (penalty / unit.square()).to(like)
        if start is None:
            weight, bias = like.new_zeros(self.targets.shape[1], x.shape[1]), like.new_zeros(self.targets.shape[1])
        else:
            weight = (start.weight.double() @ self.axes * unit).to(like)
            bias = start.bias + start.weight @ self.mean
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)

        @torch.no_grad()
        def objective() -> Tensor:
            log_p = torch.log_softmax(torch.addmm(bias, x, weight.T), dim=1)
            error = (log_p.exp() - self.targets) / n
            weight.grad.copy_(error.T @ x).addcmul_(weight, shrink)
            bias.grad.copy_(error.sum(dim=0))
            return -(log_p * self.targets).sum() / n + (weight.square() * shrink).sum() / 2

        torch.optim.LBFGS(
            [weight, bias],
            max_iter=max_iter,
            tolerance_grad=tolerance,
            tolerance_change=1e-12,
            history_size=20,
            line_search_fn="strong_wolfe",
        ).step(objective)
        weight = ((weight.double() / unit) @ self.axes.T).to(like)
        return SoftmaxRegression(weight, bias - weight @ self.mean)


def _principal_axes(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal axes (D, R) of centred rows (N, D), float64, and the variance along each; without those of none."""
    n, width = centred.shape
    if n < width:  # the smaller of the two Gram matrices has the same eigenvalues
        variance, rows = torch.linalg.eigh(centred @ centred.T / n)
    else:
        variance, axes = torch.linalg.eigh(centred.T @ centred / n)
    kept = variance > 1e-13 * variance.amax().clamp_min(1e-300)
    variance = variance[kept]
    return (centred.T @ rows[:, kept] / (variance * n).sqrt() if n < width else axes[:, kept]), variance


def fit_softmax_regression(
    features: np.ndarray | Tensor,
    labels: np.ndarray | Tensor,
    num_classes: int,
    *,
    C: float = 1.0,
    max_iter: int = 1000,
    tolerance: float = 1e-5,
) -> SoftmaxRegression:
    """`SoftmaxProblem(features, labels, num_classes).solve(C)`."""
    return SoftmaxProblem(features, labels, num_classes).solve(C, max_iter=max_iter, tolerance=tolerance)


def standardise(train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Zero mean and unit deviation per column of `train`; the others by the same numbers; constant columns become 0."""
    train = np.asarray(train, np.float64)
    mean, std = train.mean(axis=0), train.std(axis=0)
    std = np.where(std < 10 * np.finfo(np.float32).eps * np.maximum(np.abs(mean), 1e-30), 1.0, std)
    return tuple((np.asarray(x, np.float64) - mean) / std for x in (train, *others))


def linear_probe_predict(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    num_classes: int,
    *,
    C: float = 1.0,
    max_iter: int = 1000,
) -> Tensor:
    """Class probabilities (M, C) of softmax regression on standardised features."""
    train, test = standardise(train_features, test_features)
    return fit_softmax_regression(train, train_labels, num_classes, C=C, max_iter=max_iter).predict_proba(test)


def choose_C(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    num_classes: int,
    *,
    powers: Sequence[float] = LOG_REGRESSION_POWERS,
    max_iter: int = 1000,
    tune: np.ndarray | None = None,
) -> float:
    """The C of logistic regression: fitted on the other rows, it has to do well on those of the mask `tune` (N,).

    Without a mask a tenth of each class is drawn. Every power of ten in `powers` is tried, each fit starting from the
    one before; the smallest C with the highest accuracy wins. DINOv2 tries 45 powers, and so does
    `dinov2.eval.log_regression`.
    """
    x = torch.as_tensor(np.asarray(train_features, np.float64))
    y = torch.as_tensor(np.asarray(train_labels, np.int64))
    tune = stratified_share(np.asarray(train_labels), 0.1, seed=0) if tune is None else tune
    problem = SoftmaxProblem(x[~tune], y[~tune], num_classes)
    best_accuracy, best_C, model = -1.0, 1.0, None
    for power in sorted(powers):
        model = problem.solve(10.0**power, max_iter=max_iter, start=model)
        accuracy = float((model.logits(x[tune]).argmax(dim=1) == y[tune]).double().mean())
        if accuracy > best_accuracy:
            best_accuracy, best_C = accuracy, 10.0**power
    return best_C


def logistic_regression_predict(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    num_classes: int,
    *,
    C: float,
    max_iter: int = 1000,
) -> Tensor:
    """Class probabilities (M, C) of logistic regression on features as they are."""
    model = fit_softmax_regression(
        np.asarray(train_features, np.float64), train_labels, num_classes, C=C, max_iter=max_iter
    )
    return model.predict_proba(test_features)


def stratified_share(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A random share of the rows of each class, as a mask (N,); one row at least, and never all of a class."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        chosen[rows[: min(round(share * len(rows)), len(rows) - 1)]] = True
    if not chosen.any():
        largest = np.flatnonzero(labels == np.bincount(labels).argmax())
        chosen[rng.choice(largest)] = True
    return chosen


# --------------------------------------------------------------------------- scores


def align_classes(train: FeatureTable, test: FeatureTable) -> FeatureTable:
    """`test` with its labels counted as in `train.classes`.

    Raises:
        ValueError: unlabelled rows, fewer than two classes to learn, or a class in `test` that `train` does not have.
    """
    for role, table in (("training", train), ("test", test)):
        if (table.labels < 0).any():
            raise ValueError(f"{int((table.labels < 0).sum())} images of the {role} set have no label")
    if len(np.unique(train.labels)) < 2:
        raise ValueError(
            f"only one class to learn from ({', '.join(train.classes) or 'unnamed'}): "
            "a classifier needs at least two; give a folder with one sub-folder per class"
        )
    if list(train.classes) == list(test.classes):
        return test
    used = [test.classes[i] for i in np.unique(test.labels)]
    if unknown := [name for name in used if name not in train.classes]:
        raise ValueError(
            f"classes {unknown} of the test set are not among those of the training set {list(train.classes)}; "
            "rename the folders or give a label map (--label-map)"
        )
    return test.relabelled(train.classes)


def score_features(
    train: FeatureTable, test: FeatureTable, ks: Sequence[int] = (1, 20), linear: bool = True
) -> dict[str, dict[str, float]]:
    """Scores on `test` of classifiers fitted on `train`, by probe: {"knn_1": {"accuracy": ...}, ..., "linear": ...}.

    Every score of `dinov2.eval.metrics.SCORES` is given. Raises what `align_classes` raises.
    """
    test = align_classes(train, test)
    num_classes = max(len(train.classes), int(train.labels.max()) + 1)
    votes = knn_predict(train.features, train.labels, test.features, ks, num_classes=num_classes)
    predictions = {f"knn_{k}": vote.argmax(dim=1).numpy() for k, vote in votes.items()}
    if linear:
        probabilities = linear_probe_predict(train.features, train.labels, test.features, num_classes)
        predictions["linear"] = probabilities.argmax(dim=1).numpy()
    return {name: classification_scores(test.labels, p, num_classes) for name, p in predictions.items()}
