"""DINOv2's linear evaluation: a grid of linear layers (learning rate x blocks x average pooling) trained at once.

    python dinov2/eval/linear.py --pretrained-weights W --train-dataset DIR --val-dataset DIR --output-dir OUT

The backbone is frozen and seen once per image for the whole grid. Image number p of the training stream, and how it is
augmented, depend on p and the seed only, so several processes train on the same batches as one with the same total.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, default_collate

from dinov2 import distributed
from dinov2.data.loaders import resolve_num_workers
from dinov2.data.samplers import PermutedStream
from dinov2.data.transforms import make_classification_eval_transform, make_classification_train_transform
from dinov2.eval.metrics import MetricType, build_metric
from dinov2.eval.setup import get_protocol_args_parser, setup_and_build_model
from dinov2.eval.utils import (
    ModelWithIntermediateLayers,
    append_json_lines,
    autocast,
    evaluate,
    make_classification_datasets,
    make_share_loader,
    model_device,
    targets_of,
)
from dinov2.logging import MetricLogger

logger = logging.getLogger("dinov2")

DEFAULT_LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
LAST_BLOCKS = (1, 4)  # how many blocks' class tokens a classifier sees
LAST_CHECKPOINT = "last_checkpoint"  # a file with the name of the newest checkpoint
RUNNING_CHECKPOINT = "running_checkpoint_linear_eval"

Tokens = Sequence[tuple[Tensor, Tensor]]  # per block: patch tokens (B, N, D) and class token (B, D)


def get_args_parser(
    description: str | None = None,
    parents: list[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """The command line of the linear evaluation."""
    parser = get_protocol_args_parser("what the best classifier is chosen on", description, parents, add_help)
    add = parser.add_argument
    add("--test-datasets", dest="test_dataset_strs", nargs="+", help="what it is scored on; none: the validation set")
    add("--epochs", type=int, default=10, help="default: %(default)s")
    add("--batch-size", type=int, default=128, help="images per process and iteration (default: %(default)s)")
    add("--num-workers", type=int, default=8, help="loader processes at most (default: %(default)s)")
    add("--epoch-length", type=int, default=1250, help="iterations of an epoch (default: %(default)s)")
    add("--save-checkpoint-frequency", type=int, default=20, help="epochs between named checkpoints")
    add("--eval-period-iterations", type=int, default=1250, help="iterations between two validations; 0: the last only")
    add("--learning-rates", nargs="+", type=float, default=list(DEFAULT_LEARNING_RATES), help="the grid, for batch 256")
    add("--no-resume", action="store_true", help="start anew where there is a checkpoint")
    metric = {"type": MetricType, "choices": list(MetricType)}
    add("--val-metric-type", default=MetricType.MEAN_ACCURACY, help="default: %(default)s", **metric)
    add("--test-metric-types", nargs="+", help="one per test set; none: that of the validation", **metric)
    add("--classifier-fpath", help="classifiers to start from")
    add("--val-class-mapping-fpath", help=".npy file: the classifier output of each class of the validation set")
    add("--test-class-mapping-fpaths", nargs="+", default=[None], help="the same per test set; None for none")
    return parser


# --------------------------------------------------------------------------- classifiers


def has_ddp_wrapper(m: nn.Module) -> bool:
    """Whether the module averages its gradients over processes."""
    return isinstance(m, DistributedDataParallel)


def remove_ddp_wrapper(m: nn.Module) -> nn.Module:
    """The module itself."""
    return m.module if has_ddp_wrapper(m) else m


def create_linear_input(x_tokens_list: Tokens, use_n_blocks: int, use_avgpool: bool) -> Tensor:
    """Float32 input of a classifier: class tokens of the last blocks (B, n x D), and the last mean patch if asked."""
    blocks = x_tokens_list[-use_n_blocks:]
    parts = [class_token for _, class_token in blocks]
    if use_avgpool:
        parts.append(blocks[-1][0].mean(dim=1))
    return torch.cat(parts, dim=-1).float()


class LinearClassifier(nn.Module):
    """One linear layer on frozen tokens."""

    def __init__(self, out_dim: int, use_n_blocks: int, use_avgpool: bool, num_classes: int = 1000):
        super().__init__()
        self.out_dim = out_dim  # width of the input: DINOv2's name for what the backbone puts out
        self.use_n_blocks = use_n_blocks
        self.use_avgpool = use_avgpool
        self.num_classes = num_classes
        self.linear = nn.Linear(out_dim, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_tokens_list: Tokens) -> Tensor:
        """Logits (B, C)."""
        return self.linear(create_linear_input(x_tokens_list, self.use_n_blocks, self.use_avgpool))


class AllClassifiers(nn.Module):
    """The grid: every classifier on the same tokens."""

    def __init__(self, classifiers_dict: dict[str, nn.Module]):
        super().__init__()
        self.classifiers_dict = nn.ModuleDict(dict(classifiers_dict.items()))

    def forward(self, inputs: Tokens) -> dict[str, Tensor]:
        """Logits by name."""
        return {name: classifier(inputs) for name, classifier in self.classifiers_dict.items()}

    def __len__(self) -> int:
        return len(self.classifiers_dict)


class LinearPostprocessor(nn.Module):
    """Turns tokens into the arguments of a metric, perhaps for the classes of another data set."""

    def __init__(self, linear_classifier: nn.Module, class_mapping: Sequence[int] | None = None):
        super().__init__()
        self.linear_classifier = linear_classifier
        mapping = None if class_mapping is None else torch.as_tensor(np.asarray(class_mapping), dtype=torch.long)
        self.register_buffer("class_mapping", mapping)

    def forward(self, samples: Tokens, targets: Tensor) -> dict[str, Tensor]:
        """{"preds": logits (B, C), "target": targets}."""
        preds = self.linear_classifier(samples)
        return {"preds": preds if self.class_mapping is None else preds[:, self.class_mapping], "target": targets}


def scale_lr(learning_rates: float, batch_size: int) -> float:
    """The rate for `batch_size` images per process, given that for 256 images in all."""
    return learning_rates * (batch_size * distributed.get_global_size()) / 256.0


def setup_linear_classifiers(
    sample_output: Tokens,
    n_last_blocks_list: Sequence[int],
    learning_rates: Sequence[float],
    batch_size: int,
    num_classes: int = 1000,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The grid, on the device of `sample_output`, and its parameter groups with their learning rates.

    A name such as `classifier_1_blocks_avgpool_False_lr_0_00010` has as many digits as tell all rates apart.
    """
    device = sample_output[-1][1].device
    rates = [scale_lr(rate, batch_size) for rate in learning_rates]
    if len(set(rates)) < len(rates):
        raise ValueError(f"a learning rate is given twice: {list(learning_rates)}")
    digits = next(d for d in range(5, 400) if len({f"{rate:.{d}f}" for rate in rates}) == len(rates))
    classifiers, groups = {}, []
    for n_blocks in n_last_blocks_list:
        for avgpool in (False, True):
            width = create_linear_input(sample_output, n_blocks, avgpool).shape[1]
            for rate in rates:
                classifier = LinearClassifier(width, n_blocks, avgpool, num_classes).to(device)
                name = f"classifier_{n_blocks}_blocks_avgpool_{avgpool}_lr_{rate:.{digits}f}".replace(".", "_")
                classifiers[name] = classifier
                groups.append({"params": list(classifier.parameters()), "lr": rate})
    grid: nn.Module = AllClassifiers(classifiers)
    if distributed.is_enabled():
        grid = DistributedDataParallel(grid)
    return grid, groups


# --------------------------------------------------------------------------- data


class TrainingStream(Dataset):
    """The endless shuffled stream of a data set: item p is an image, augmented as belongs to position p."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        self.order = PermutedStream(len(dataset), seed)

    def __getitem__(self, position: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed << 40) + position)
            return self.dataset[int(self.order[np.array([position])][0])]


class PositionsOfRank:
    """This process's stream positions, batch by batch: every n-th of the next `batch_size` x n, for n processes."""

    def __init__(self, batch_size: int, start_iteration: int, stop_iteration: int):
        self.batch_size, self.start, self.stop = batch_size, start_iteration, stop_iteration

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = distributed.get_global_rank(), distributed.get_global_size()
        for iteration in range(self.start, self.stop):
            first = iteration * self.batch_size * world
            yield list(range(first + rank, first + self.batch_size * world, world))


def make_train_data_loader(
    dataset: Dataset, batch_size: int, num_workers: int, start_iteration: int, max_iter: int, seed: int
) -> DataLoader:
    """Batches of the training stream from an iteration on, whatever was trained before."""
    return DataLoader(
        TrainingStream(dataset, seed),
        batch_sampler=PositionsOfRank(batch_size, start_iteration, max_iter),
        num_workers=resolve_num_workers(num_workers, distributed.get_local_size()),
        pin_memory=torch.cuda.is_available(),
    )


def _pad_and_collate(batch: list[tuple[Tensor, np.ndarray]]) -> list[Tensor]:
    """Collate images that have several right classes each, filled up with -1."""
    longest = max(len(targets) for _, targets in batch)
    return default_collate(
        [(image, np.pad(targets, (0, longest - len(targets)), constant_values=-1)) for image, targets in batch]
    )


def _make_eval_loader(dataset: Dataset, batch_size: int, num_workers: int, metric_type: MetricType) -> DataLoader:
    collate = _pad_and_collate if metric_type == MetricType.IMAGENET_REAL_ACCURACY else None
    return make_share_loader(dataset, batch_size, num_workers, collate)


def make_eval_data_loader(
    test_dataset_str: str, batch_size: int, num_workers: int, metric_type: MetricType
) -> DataLoader:
    """This process's share of a named data set, every image once."""
    (dataset,) = make_classification_datasets([test_dataset_str], [make_classification_eval_transform()])
    return _make_eval_loader(dataset, batch_size, num_workers, metric_type)


# --------------------------------------------------------------------------- training and scoring


class ClassifierCheckpointer:
    """Saves and restores the grid with its optimizer and schedule; the pointer to the newest file is written last."""

    def __init__(self, grid: nn.Module, optimizer: Any, scheduler: Any, folder: str | Path):
        self.parts = {"model": remove_ddp_wrapper(grid), "optimizer": optimizer, "scheduler": scheduler}
        self.folder = Path(folder)

    def save(self, name: str, iteration: int) -> None:
        """Write `name`.pth after `iteration` (main process)."""
        if distributed.is_main_process():
            state = {part: value.state_dict() for part, value in self.parts.items()}
            partial_file = self.folder / f"{name}.pth.part"
            torch.save({**state, "iteration": iteration}, partial_file)
            partial_file.replace(self.folder / f"{name}.pth")
            (self.folder / LAST_CHECKPOINT).write_text(f"{name}.pth", encoding="utf-8")

    def load(self, classifier_fpath: str | None, resume: bool) -> int:
        """Restore the newest checkpoint, or else the classifiers of a file; returns the next iteration."""
        pointer = self.folder / LAST_CHECKPOINT
        if resume and pointer.is_file():
            path = self.folder / pointer.read_text(encoding="utf-8").strip()
            state = torch.load(path, map_location="cpu", weights_only=True)
            for part, value in self.parts.items():
                value.load_state_dict(state[part])
            logger.info(f"resumed the linear classifiers of {path}, iteration {state['iteration']}")
            return state["iteration"] + 1
        if classifier_fpath:
            state = torch.load(classifier_fpath, map_location="cpu", weights_only=True)
            self.parts["model"].load_state_dict(state.get("model", state))
        return 0


@torch.no_grad()
def evaluate_linear_classifiers(
    feature_model: nn.Module,
    linear_classifiers: AllClassifiers,
    data_loader: Any,
    metric_type: MetricType,
    metrics_file_path: str | Path,
    training_num_classes: int,
    iteration: int,
    prefixstring: str = "",
    class_mapping: np.ndarray | None = None,
    best_classifier_on_val: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Score every classifier; the best one, or the one chosen on the validation set, is the result.

    Returns:
        {"best_classifier": {"name": ..., "accuracy": between 0 and 1}}, also written to `metrics_file_path`.
    """
    logger.info("running validation !")
    classifiers = linear_classifiers.classifiers_dict
    num_classes = training_num_classes if class_mapping is None else len(class_mapping)
    metric = build_metric(metric_type, num_classes=num_classes)
    device = model_device(linear_classifiers)
    _, results = evaluate(
        feature_model,
        data_loader,
        {name: LinearPostprocessor(classifier, class_mapping).to(device) for name, classifier in classifiers.items()},
        {name: metric.clone() for name in classifiers},
        device,
    )
    accuracy = {name: float(result["top-1"].mean()) for name, result in results.items()}
    for name, value in accuracy.items():
        logger.info(f"{prefixstring} -- Classifier: {name} * top-1 {value:.4f}")
    best = best_classifier_on_val or max(accuracy, key=lambda name: (not math.isnan(accuracy[name]), accuracy[name]))
    outcome = {"best_classifier": {"name": best, "accuracy": accuracy[best]}}
    logger.info(f"best classifier: {outcome['best_classifier']}")
    append_json_lines(metrics_file_path, {"iteration": iteration, **outcome})
    return outcome


def eval_linear(
    *,
    feature_model: nn.Module,
    linear_classifiers: nn.Module,
    train_data_loader: Any,
    val_data_loader: Any,
    metrics_file_path: str | Path,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    output_dir: str | Path,
    max_iter: int,
    checkpoint_period: int,
    running_checkpoint_period: int,
    eval_period: int,
    metric_type: MetricType,
    training_num_classes: int,
    resume: bool = True,
    classifier_fpath: str | None = None,
    val_class_mapping: np.ndarray | None = None,
) -> tuple[dict[str, dict[str, Any]], nn.Module, nn.Module, int]:
    """Train the grid to `max_iter` and score it on the validation set.

    Args:
        feature_model: images to `Tokens`, frozen.
        linear_classifiers: the grid.
        train_data_loader: batches from the iteration on that a resume starts with.
        val_data_loader: this process's share of the validation set.
        metrics_file_path: gets a line per validation.
        optimizer: of the grid.
        scheduler: of the optimizer, one step per iteration.
        output_dir: gets the checkpoints.
        max_iter: iterations in all.
        checkpoint_period: iterations between checkpoints that stay.
        running_checkpoint_period: iterations between writes of the one that is replaced.
        eval_period: iterations between validations; 0: only the last.
        metric_type: of the validation.
        training_num_classes: C.
        resume: go on from the newest checkpoint in output_dir.
        classifier_fpath: where to start when there is none.
        val_class_mapping: classifier output of each class of the validation set.

    Returns:
        the result of the last validation, the backbone, the grid, and the number of iterations done.
    """
    checkpointer = ClassifierCheckpointer(linear_classifiers, optimizer, scheduler, output_dir)
    start = checkpointer.load(classifier_fpath, resume)
    device = model_device(linear_classifiers)
    validate = partial(
        evaluate_linear_classifiers,
        feature_model=feature_model,
        linear_classifiers=remove_ddp_wrapper(linear_classifiers),
        data_loader=val_data_loader,
        metric_type=metric_type,
        metrics_file_path=metrics_file_path,
        training_num_classes=training_num_classes,
        class_mapping=val_class_mapping,
    )
    logger.info(f"Starting training from iteration {start}")
    metric_logger = MetricLogger(delimiter="  ")
    batches = metric_logger.log_every(train_data_loader, 10, "Training", max_iter, start)
    for iteration, (images, labels) in enumerate(batches, start):
        outputs = linear_classifiers(feature_model(images.to(device, non_blocking=True)))
        labels = labels.to(device, non_blocking=True)
        loss = sum(nn.functional.cross_entropy(logits, labels) for logits in outputs.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        metric_logger.update(loss=loss.detach(), lr=optimizer.param_groups[0]["lr"])

        done = iteration + 1
        if done % checkpoint_period == 0:
            checkpointer.save(f"model_{iteration:07d}", iteration)
        elif done % running_checkpoint_period == 0:
            checkpointer.save(RUNNING_CHECKPOINT, iteration)
        if eval_period > 0 and done % eval_period == 0 and done < max_iter:
            validate(iteration=iteration, prefixstring=f"ITER: {iteration}")
    if start < max_iter:
        checkpointer.save("model_final", max_iter - 1)
    return validate(iteration=max_iter), feature_model, linear_classifiers, max_iter


def test_on_datasets(
    feature_model: nn.Module,
    linear_classifiers: nn.Module,
    test_dataset_strs: Sequence[str],
    batch_size: int,
    num_workers: int,
    test_metric_types: Sequence[MetricType],
    metrics_file_path: str | Path,
    training_num_classes: int,
    iteration: int,
    best_classifier_on_val: str,
    prefixstring: str = "",  # noqa: PT028 (not a test)
    test_class_mappings: Sequence[np.ndarray | None] = (None,),  # noqa: PT028
) -> dict[str, float]:
    """Percentages {"DATASET_accuracy": ...} of the classifier that was best on the validation set."""
    results = {}
    for dataset_str, mapping, metric_type in zip(test_dataset_strs, test_class_mappings, test_metric_types):
        logger.info(f"Testing on {dataset_str}")
        outcome = evaluate_linear_classifiers(
            feature_model,
            remove_ddp_wrapper(linear_classifiers),
            make_eval_data_loader(dataset_str, batch_size, num_workers, metric_type),
            metric_type,
            metrics_file_path,
            training_num_classes,
            iteration,
            prefixstring=prefixstring,
            class_mapping=mapping,
            best_classifier_on_val=best_classifier_on_val,
        )
        results[f"{dataset_str}_accuracy"] = 100.0 * outcome["best_classifier"]["accuracy"]
    return results


def _load_class_mapping(path: str | None) -> np.ndarray | None:
    return np.load(path, allow_pickle=False) if path not in (None, "None") else None


def run_eval_linear(
    model: nn.Module,
    output_dir: str,
    train_dataset_str: str,
    val_dataset_str: str,
    batch_size: int,
    epochs: int,
    epoch_length: int,
    num_workers: int,
    save_checkpoint_frequency: int,
    eval_period_iterations: int,
    learning_rates: Sequence[float],
    autocast_dtype: torch.dtype,
    test_dataset_strs: Sequence[str] | None = None,
    resume: bool = True,
    classifier_fpath: str | None = None,
    val_class_mapping_fpath: str | None = None,
    test_class_mapping_fpaths: Sequence[str | None] = (None,),
    val_metric_type: MetricType = MetricType.MEAN_ACCURACY,
    test_metric_types: Sequence[MetricType] | None = None,
) -> dict[str, Any]:
    """The whole linear evaluation on named data sets: {"best_classifier": name, "DATASET_accuracy": per cent}.

    Raises:
        ValueError: as many test sets, metrics and class mappings are needed.
    """
    test_dataset_strs = list(test_dataset_strs or [val_dataset_str])
    test_metric_types = list(test_metric_types or [val_metric_type] * len(test_dataset_strs))
    if not len(test_dataset_strs) == len(test_metric_types) == len(test_class_mapping_fpaths):
        raise ValueError(
            f"{len(test_dataset_strs)} test data sets need as many metric types (got {len(test_metric_types)}) "
            f"and class mappings (got {len(test_class_mapping_fpaths)}; None for none)"
        )
    seed = 0
    train_dataset, val_dataset = make_classification_datasets(
        [train_dataset_str, val_dataset_str],
        [make_classification_train_transform(), make_classification_eval_transform()],
    )
    num_classes = int(targets_of(train_dataset).max()) + 1
    device = model_device(model)
    feature_model = ModelWithIntermediateLayers(model, max(LAST_BLOCKS), partial(autocast, device, autocast_dtype))
    sample_output = feature_model(val_dataset[0][0].unsqueeze(0).to(device))

    torch.manual_seed(seed)  # the same first weights on every process and in every run
    grid, groups = setup_linear_classifiers(sample_output, LAST_BLOCKS, learning_rates, batch_size, num_classes)
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0)
    max_iter = epochs * epoch_length
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_iter, eta_min=0)
    start = ClassifierCheckpointer(grid, optimizer, scheduler, output_dir).load(classifier_fpath, resume)
    metrics_file_path = Path(output_dir, "results_eval_linear.json")
    outcome, feature_model, grid, iteration = eval_linear(
        feature_model=feature_model,
        linear_classifiers=grid,
        train_data_loader=make_train_data_loader(train_dataset, batch_size, num_workers, start, max_iter, seed),
        val_data_loader=_make_eval_loader(val_dataset, batch_size, num_workers, val_metric_type),
        metrics_file_path=metrics_file_path,
        optimizer=optimizer,
        scheduler=scheduler,
        output_dir=output_dir,
        max_iter=max_iter,
        checkpoint_period=save_checkpoint_frequency * epoch_length,
        running_checkpoint_period=epoch_length,
        eval_period=eval_period_iterations,
        metric_type=val_metric_type,
        training_num_classes=num_classes,
        resume=resume,
        classifier_fpath=classifier_fpath,
        val_class_mapping=_load_class_mapping(val_class_mapping_fpath),
    )
    best = outcome["best_classifier"]
    results: dict[str, Any] = {}
    if test_dataset_strs != [val_dataset_str]:
        results = test_on_datasets(
            feature_model,
            grid,
            test_dataset_strs,
            batch_size,
            num_workers,
            test_metric_types,
            metrics_file_path,
            num_classes,
            iteration,
            best["name"],
            test_class_mappings=[_load_class_mapping(path) for path in test_class_mapping_fpaths],
        )
    results |= {"best_classifier": best["name"], f"{val_dataset_str}_accuracy": 100.0 * best["accuracy"]}
    logger.info(f"Test Results Dict {results}")
    return results


def main(args: argparse.Namespace) -> int:
    """Run the evaluation that the command line asks for."""
    model, autocast_dtype = setup_and_build_model(args)
    run_eval_linear(
        model=model,
        output_dir=args.output_dir,
        train_dataset_str=args.train_dataset_str,
        val_dataset_str=args.val_dataset_str,
        test_dataset_strs=args.test_dataset_strs,
        batch_size=args.batch_size,
        epochs=args.epochs,
        epoch_length=args.epoch_length,
        num_workers=args.num_workers,
        save_checkpoint_frequency=args.save_checkpoint_frequency,
        eval_period_iterations=args.eval_period_iterations,
        learning_rates=args.learning_rates,
        autocast_dtype=autocast_dtype,
        resume=not args.no_resume,
        classifier_fpath=args.classifier_fpath,
        val_metric_type=args.val_metric_type,
        test_metric_types=args.test_metric_types,
        val_class_mapping_fpath=args.val_class_mapping_fpath,
        test_class_mapping_fpaths=args.test_class_mapping_fpaths,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser(description="DINOv2 linear evaluation").parse_args()))
