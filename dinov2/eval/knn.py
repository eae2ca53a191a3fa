"""DINOv2's k-NN evaluation: the temperature-weighted vote of the nearest training images, also with a few per class.

python dinov2/eval/knn.py --pretrained-weights W --train-dataset DIR --val-dataset DIR --output-dir OUT
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2 import distributed
from dinov2.data.transforms import make_classification_eval_transform
from dinov2.eval.metrics import AccuracyAveraging, build_topk_accuracy_metric
from dinov2.eval.probes import DEFAULT_TEMPERATURE, nearest_neighbours, neighbour_votes
from dinov2.eval.setup import get_protocol_args_parser, setup_and_build_model
from dinov2.eval.utils import (
    ModelWithAutocast,
    ModelWithNormalize,
    append_json_lines,
    extract_features,
    make_classification_datasets,
    model_device,
    share_of_rank,
)

logger = logging.getLogger("dinov2")


def get_args_parser(
    description: str | None = None,
    parents: list[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """The command line of the k-NN evaluation."""
    parser = get_protocol_args_parser("what is classified", description, parents, add_help)
    add = parser.add_argument
    add(
        "--nb_knn", nargs="+", type=int, default=[10, 20, 100, 200], help="numbers of neighbours (default: %(default)s)"
    )
    add("--temperature", type=float, default=DEFAULT_TEMPERATURE, help="of the vote (default: %(default)s)")
    add(
        "--gather-on-cpu", action="store_true", help="keep the training features in main memory: slower, for large sets"
    )
    add("--batch-size", type=int, default=256, help="images per forward pass (default: %(default)s)")
    add("--n-per-class-list", nargs="+", type=int, default=[-1], help="training images per class; -1: all of them")
    add("--n-tries", type=int, default=1, help="draws that a few-shot result is the mean of (default: %(default)s)")
    return parser


class KnnModule(nn.Module):
    """Votes of the nearest training features; each process asks for its own rows and holds a part of the training set.

    Every process must call it the same number of times; it may call it with no rows.

    Args:
        train_features: (N, D) with rows of length 1, the same on every process.
        train_labels: (N,).
        nb_knn: the numbers of neighbours to answer for.
        T: temperature of the vote.
        device: where the search runs.
        num_classes: C.
    """

    def __init__(
        self,
        train_features: Tensor,
        train_labels: Tensor,
        nb_knn: Sequence[int],
        T: float,
        device: torch.device | int | str,
        num_classes: int = 1000,
    ):
        super().__init__()
        share = share_of_rank(len(train_features))
        self.device = device
        self.train_features_rank = train_features[share.start : share.stop].to(device)
        self.candidates = train_labels[share.start : share.stop].to(device)
        self.nb_knn = list(nb_knn)
        self.max_k = min(max(self.nb_knn), len(train_features))
        self.T = T
        self.num_classes = int(num_classes)

    def compute_neighbors(self, features_rank: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities and labels (M, max_k) of the nearest training features of all processes, best first."""
        queries = distributed.gather_rows(features_rank.to(self.device))
        k = min(self.max_k, len(self.candidates))
        similarities = queries.new_full((len(queries), self.max_k), -math.inf)
        labels = torch.zeros(len(queries), self.max_k, dtype=self.candidates.dtype, device=queries.device)
        if k:
            similarities[:, :k], rows = nearest_neighbours(self.train_features_rank, queries, k)
            labels[:, :k] = self.candidates[rows]
        # the best of each process side by side: (processes, M, k) to (M, processes x k)
        similarities, labels = (
            distributed.gather_rows(part[None]).transpose(0, 1).flatten(1) for part in (similarities, labels)
        )
        similarities, order = similarities.topk(self.max_k, dim=1)
        mine = self._own_rows(len(features_rank))
        return similarities[mine], labels.gather(1, order)[mine]

    def _own_rows(self, count: int) -> slice:
        counts = distributed.gather_objects(count)
        start = sum(counts[: distributed.get_global_rank()])
        return slice(start, start + count)

    def forward(self, features_rank: Tensor) -> dict[int, Tensor]:
        """Votes (M, C) for each number of neighbours."""
        similarities, labels = self.compute_neighbors(features_rank)
        return neighbour_votes(similarities, labels, self.nb_knn, self.T, self.num_classes)


class DictKeysModule(nn.Module):
    """Picks one prediction out of nested dicts of predictions."""

    def __init__(self, keys: Sequence[Any]):
        super().__init__()
        self.keys = keys

    def forward(self, features_dict: Any, targets: Tensor) -> dict[str, Tensor]:
        """The arguments of a metric."""
        for key in self.keys:
            features_dict = features_dict[key]
        return {"preds": features_dict, "target": targets}


class ModuleDictWithForward(nn.ModuleDict):
    """Modules by name that are all called with the same arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The outputs by name."""
        return {name: module(*args, **kwargs) for name, module in self.items()}


def create_class_indices_mapping(labels: Tensor) -> dict[int, Tensor]:
    """The rows of each class that occurs."""
    return {int(label): (labels == label).nonzero().flatten() for label in labels.unique()}


def filter_train(mapping: dict[int, Tensor], n_per_class: int, seed: int) -> Tensor:
    """`n_per_class` random rows of each class, or all of a smaller one; the same rows for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [
            rows[torch.randperm(len(rows), generator=generator)[:n_per_class].to(rows.device)]
            for rows in mapping.values()
        ]
    )


def create_module_dict(
    *,
    module: Callable[..., KnnModule],
    n_per_class_list: Sequence[int],
    n_tries: int,
    nb_knn: Sequence[int],
    train_features: Tensor,
    train_labels: Tensor,
) -> ModuleDictWithForward:
    """A k-NN per number of images per class ("full", "4 per class") and draw ("0", "1"; "1" for full).

    With n images per class, n neighbours are asked for as well, and never more than n.
    """
    mapping = create_class_indices_mapping(train_labels)
    modules = {}
    for n_per_class in n_per_class_list:
        if n_per_class < 0:
            full = module(train_features=train_features, train_labels=train_labels, nb_knn=list(nb_knn))
            modules["full"] = ModuleDictWithForward({"1": full})
            continue
        ks = sorted(k for k in {*nb_knn, n_per_class} if k <= n_per_class)
        tries = {}
        for seed in range(n_tries):
            rows = filter_train(mapping, n_per_class, seed)
            tries[str(seed)] = module(train_features=train_features[rows], train_labels=train_labels[rows], nb_knn=ks)
        modules[f"{n_per_class} per class"] = ModuleDictWithForward(tries)
    return ModuleDictWithForward(modules)


def eval_knn(
    model: nn.Module,
    train_dataset: Any,
    val_dataset: Any,
    accuracy_averaging: AccuracyAveraging,
    nb_knn: Sequence[int],
    temperature: float,
    batch_size: int,
    num_workers: int,
    gather_on_cpu: bool,
    n_per_class_list: Sequence[int] = (-1,),
    n_tries: int = 1,
) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Accuracies {("full", 20): {"top-1": ..., "top-5": ...}, ("4 per class", 4): ...}, the mean over the draws.

    Every process gets the same numbers, whatever their count.
    """
    model = ModelWithNormalize(model)
    logger.info("Extracting features for train set...")
    train_features, train_labels = extract_features(model, train_dataset, batch_size, num_workers, gather_on_cpu)
    logger.info(f"Train features created, shape {tuple(train_features.shape)}.")
    val_features, val_labels = extract_features(model, val_dataset, batch_size, num_workers, gather_on_cpu)

    device = model_device(model)
    num_classes = int(train_labels.max()) + 1
    if int(val_labels.max()) >= num_classes:
        raise ValueError(
            f"the validation set has class {int(val_labels.max())}, the training set only 0..{num_classes - 1}"
        )
    classifiers = create_module_dict(
        module=partial(KnnModule, T=temperature, device=device, num_classes=num_classes),
        n_per_class_list=n_per_class_list,
        n_tries=n_tries,
        nb_knn=nb_knn,
        train_features=train_features,
        train_labels=train_labels,
    )
    metrics = {
        (setting, draw, k): build_topk_accuracy_metric(accuracy_averaging, num_classes).to(device)
        for setting, draws in classifiers.items()
        for draw, classifier in draws.items()
        for k in classifier.nb_knn
    }
    logger.info("Start the k-NN classification.")
    share = share_of_rank(len(val_features))
    calls = math.ceil(math.ceil(len(val_features) / distributed.get_global_size()) / batch_size)  # as many everywhere
    for call in range(calls):
        rows = share[call * batch_size : (call + 1) * batch_size]
        votes = classifiers(val_features[rows.start : rows.stop].to(device))
        targets = val_labels[rows.start : rows.stop].to(device)
        for (setting, draw, k), metric in metrics.items():
            metric.update(votes[setting][draw][k], targets)
    values = {key: metric.compute() for key, metric in metrics.items()}
    return {
        (setting, k): {
            name: torch.stack([values[setting, draw, k][name] for draw in draws]).mean(dim=0)
            for name in values[setting, next(iter(draws)), k]
        }
        for setting, draws in classifiers.items()
        for k in next(iter(draws.values())).nb_knn
    }


def eval_knn_with_model(
    model: nn.Module,
    output_dir: str,
    train_dataset_str: str = "ImageNet:split=TRAIN",
    val_dataset_str: str = "ImageNet:split=VAL",
    nb_knn: Sequence[int] = (10, 20, 100, 200),
    temperature: float = DEFAULT_TEMPERATURE,
    autocast_dtype: torch.dtype = torch.float,
    accuracy_averaging: AccuracyAveraging = AccuracyAveraging.MEAN_ACCURACY,
    transform: Callable | None = None,
    gather_on_cpu: bool = False,
    batch_size: int = 256,
    num_workers: int = 5,
    n_per_class_list: Sequence[int] = (-1,),
    n_tries: int = 1,
) -> dict[str, float]:
    """`eval_knn` on named data sets: percentages {"('full', 20) Top 1": 81.2, ...}, also into results_eval_knn.json."""
    transform = transform or make_classification_eval_transform()
    train_dataset, val_dataset = make_classification_datasets(
        [train_dataset_str, val_dataset_str], [transform, transform]
    )
    accuracies = eval_knn(
        model=ModelWithAutocast(model, autocast_dtype),
        train_dataset=train_dataset,
        val_dataset=val_dataset,
        accuracy_averaging=accuracy_averaging,
        nb_knn=nb_knn,
        temperature=temperature,
        batch_size=batch_size,
        num_workers=num_workers,
        gather_on_cpu=gather_on_cpu,
        n_per_class_list=n_per_class_list,
        n_tries=n_tries,
    )
    results = {}
    for key, accuracy in accuracies.items():
        top1, top5 = (100 * float(accuracy[name].mean()) for name in ("top-1", "top-5"))
        results |= {f"{key} Top 1": top1, f"{key} Top 5": top5}
        logger.info(f"{key} classifier result: Top1: {top1:.2f} Top5: {top5:.2f}")
    append_json_lines(Path(output_dir, "results_eval_knn.json"), results)
    distributed.barrier()
    return results


def main(args: argparse.Namespace) -> int:
    """Run the evaluation that the command line asks for."""
    model, autocast_dtype = setup_and_build_model(args)
    eval_knn_with_model(
        model=model,
        output_dir=args.output_dir,
        train_dataset_str=args.train_dataset_str,
        val_dataset_str=args.val_dataset_str,
        nb_knn=args.nb_knn,
        temperature=args.temperature,
        autocast_dtype=autocast_dtype,
        gather_on_cpu=args.gather_on_cpu,
        batch_size=args.batch_size,
        n_per_class_list=args.n_per_class_list,
        n_tries=args.n_tries,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser(description="DINOv2 k-NN evaluation").parse_args()))
