"""What DINOv2's protocols share: wrappers of a backbone, the evaluation loop, features of a torch data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from dinov2 import distributed
from dinov2.data import DatasetWithEnumeratedTargets, LabelledDataset, make_dataset
from dinov2.data.datasets.registry import is_dataset_string
from dinov2.data.loaders import resolve_num_workers
from dinov2.eval.metrics import MetricCollection
from dinov2.logging import MetricLogger

logger = logging.getLogger("dinov2")


class ModelWithNormalize(nn.Module):
    """A model whose outputs (B, D) are scaled to length 1."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, samples: Tensor) -> Tensor:
        """Unit features (B, D)."""
        return nn.functional.normalize(self.model(samples), dim=1, p=2)


class ModelWithAutocast(nn.Module):
    """A model that computes in `dtype`; what is done with its outputs keeps full precision."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, samples: Tensor) -> Tensor:
        """Float32 outputs of the model."""
        with autocast(samples.device, self.dtype):
            return self.model(samples).float()


class ModelWithIntermediateLayers(nn.Module):
    """The last blocks of a frozen backbone: a tuple of (patch tokens (B, N, D), class token (B, D)) in their order."""

    def __init__(
        self, feature_model: nn.Module, n_last_blocks: int, autocast_ctx: Callable[[], AbstractContextManager]
    ):
        super().__init__()
        self.feature_model = feature_model.eval()
        self.n_last_blocks = n_last_blocks
        self.autocast_ctx = autocast_ctx

    def forward(self, images: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Tokens of images (B, C, H, W), without gradient."""
        with torch.no_grad(), self.autocast_ctx():
            return self.feature_model.get_intermediate_layers(images, self.n_last_blocks, return_class_token=True)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data_loader: Any,
    postprocessors: dict[Any, nn.Module],
    metrics: dict[Any, MetricCollection],
    device: torch.device,
    criterion: nn.Module | None = None,
) -> tuple[dict[str, float], dict[Any, dict[str, Tensor]]]:
    """Run `model` over (samples, targets, ...) and count every metric; the counts of all processes are added up.

    Args:
        model: frozen; its outputs go to every postprocessor.
        data_loader: this process's share of the data.
        postprocessors: turn (outputs, targets) into the arguments of the metric of the same name.
        metrics: what is counted.
        device: where all of it happens.
        criterion: a loss to report as well.

    Returns:
        averages of what was logged (the loss), and the value of every metric.
    """
    model.eval()
    for metric in metrics.values():
        metric.to(device)
    metric_logger = MetricLogger(delimiter="  ")
    for samples, targets, *_ in metric_logger.log_every(data_loader, 10, "Test:"):
        outputs, targets = model(samples.to(device, non_blocking=True)), targets.to(device, non_blocking=True)
        if criterion is not None:
            metric_logger.update(loss=criterion(outputs, targets).item())
        for name, metric in metrics.items():
            metric.update(**postprocessors[name](outputs, targets))
    metric_logger.synchronize_between_processes()
    logger.info(f"Averaged stats: {metric_logger}")
    averages = {name: meter.global_avg for name, meter in metric_logger.meters.items()}
    return averages, {name: metric.compute() for name, metric in metrics.items()}


def all_gather_and_flatten(tensor_rank: Tensor) -> Tensor:
    """Rows of all processes, in rank order."""
    return distributed.gather_rows(tensor_rank)


def share_of_rank(count: int) -> range:
    """The run of rows that this process works on; the runs of all processes are `count` rows, none of them twice."""
    rank, world = distributed.get_global_rank(), distributed.get_global_size()
    return range(count * rank // world, count * (rank + 1) // world)


def make_share_loader(
    dataset: Dataset, batch_size: int, num_workers: int, collate_fn: Callable | None = None
) -> DataLoader:
    """A loader of this process's share of a data set, in order, every image exactly once."""
    num_workers = resolve_num_workers(num_workers, distributed.get_local_size())
    return DataLoader(
        Subset(dataset, share_of_rank(len(dataset))),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=torch.cuda.is_available(),
    )


def extract_features(
    model: nn.Module, dataset: Dataset, batch_size: int, num_workers: int, gather_on_cpu: bool = False
) -> tuple[Tensor, Tensor]:
    """Features (N, D) and targets (N,) or (N, A) of a data set, in its order, the same on every process.

    Args:
        model: gives (B, D); where it lives is where images are sent.
        dataset: item i is (tensor, target).
        batch_size: images per forward pass.
        num_workers: loader processes at most; 0 reads in this one.
        gather_on_cpu: keep the table in main memory.
    """
    data_loader = make_share_loader(DatasetWithEnumeratedTargets(dataset), batch_size, num_workers)
    return extract_features_with_dataloader(model, data_loader, len(dataset), gather_on_cpu)


@torch.no_grad()
def extract_features_with_dataloader(
    model: nn.Module, data_loader: Any, sample_count: int, gather_on_cpu: bool = False
) -> tuple[Tensor, Tensor]:
    """`extract_features` over batches (samples, (row, target)), which may come in any order.

    Raises:
        ValueError: rows of the table that no process has seen.
    """
    device = model_device(model)
    store = torch.device("cpu") if gather_on_cpu else device
    rows, features, targets = [], [], []
    for samples, (index, labels) in MetricLogger(delimiter="  ").log_every(data_loader, 10, "Features:"):
        features.append(model(samples.to(device, non_blocking=True)).float().to(store))
        rows.append(index.to(store))
        targets.append(labels.to(store))

    def everywhere(parts: list[Tensor]) -> Tensor:
        # a process without rows still takes part, with the shape and type of the others
        like = [p for p in distributed.gather_objects(parts[0][:0].cpu() if parts else None) if p is not None]
        return all_gather_and_flatten(torch.cat([like[0].to(store), *parts]))

    rows, features, targets = everywhere(rows), everywhere(features), everywhere(targets)
    order = torch.full((sample_count,), -1, dtype=torch.long, device=store)
    order[rows] = torch.arange(len(rows), device=store)  # a row that came twice counts once
    if (order < 0).any():
        raise ValueError(f"{int((order < 0).sum())} of {sample_count} rows were in no batch")
    logger.info(f"Features shape: {(sample_count, *features.shape[1:])}")
    return features[order], targets[order]


def model_device(model: nn.Module) -> torch.device:
    """Where the parameters of a model are; for one without any, the device to evaluate on."""
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else default_device()


def default_device() -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to `dtype`; nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


# --------------------------------------------------------------------------- labelled data sets


def make_classification_datasets(dataset_strs: Sequence[str], transforms: Sequence[Callable | None]) -> list[Any]:
    """Labelled data sets: folders, CSV files or dataset strings; folders number their classes as the first one does.

    Raises:
        ValueError: a class that the first data set does not have.
    """
    datasets: list[Any] = []
    for name, transform in zip(dataset_strs, transforms):
        if is_dataset_string(name):
            datasets.append(make_dataset(dataset_str=name, transform=transform))
            continue
        classes = getattr(datasets[0], "classes", None) if datasets else None
        try:
            datasets.append(LabelledDataset(name, transform=transform, classes=classes))
        except ValueError as error:
            if classes is None:
                raise
            raise ValueError(
                f"{name}: {error}. Rename its folders as in {dataset_strs[0]}, or use `dinov2 evaluate --label-map`"
            ) from error
    return datasets


def targets_of(dataset: Any) -> np.ndarray:
    """The class number of every image, without reading images."""
    if hasattr(dataset, "get_targets"):
        return np.asarray(dataset.get_targets()).astype(np.int64)
    if hasattr(dataset, "labels"):
        return np.asarray(dataset.labels, np.int64)
    return np.asarray([dataset.get_target(i) for i in range(len(dataset))], np.int64)


def append_json_lines(path: str | Path, results: dict[str, Any]) -> None:
    """Add one line {name: value} per result to a file; the main process writes."""
    import json

    if distributed.is_main_process():
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({name: value}) + "\n" for name, value in results.items())
