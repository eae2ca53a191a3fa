"""DINOv2's logistic regression: the penalty swept on held-out images, then fitted on all; exact, on CPU or GPU.

python dinov2/eval/log_regression.py --pretrained-weights W --train-dataset DIR --val-dataset DIR --output-dir OUT
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dinov2 import distributed
from dinov2.data.transforms import make_classification_eval_transform
from dinov2.eval.metrics import MetricCollection, MetricType, build_metric
from dinov2.eval.probes import SoftmaxRegression, fit_softmax_regression
from dinov2.eval.setup import get_protocol_args_parser, setup_and_build_model
from dinov2.eval.utils import (
    ModelWithAutocast,
    append_json_lines,
    default_device,
    evaluate,
    extract_features,
    make_classification_datasets,
)
from dinov2.utils.dtype import as_torch_dtype

logger = logging.getLogger("dinov2")

DEFAULT_MAX_ITER = 1_000
C_POWER_RANGE = torch.linspace(-6, 5, 45)  # powers of ten
_CPU_DEVICE = torch.device("cpu")


def get_args_parser(
    description: str | None = None,
    parents: list[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """The command line of the logistic regression."""
    parser = get_protocol_args_parser("what is scored", description, parents, add_help)
    add = parser.add_argument
    add("--finetune-dataset-str", dest="finetune_dataset_str", help="what the penalty is chosen on")
    add(
        "--finetune-on-val",
        action="store_true",
        help="without a fine-tuning data set, choose the penalty on the validation set instead of a tenth of training",
    )
    add(
        "--metric-type",
        type=MetricType,
        choices=list(MetricType),
        default=MetricType.MEAN_ACCURACY,
        help="of the score",
    )
    add("--train-features-device", default="cpu", help="where the models are fitted (default: %(default)s)")
    add("--train-dtype", default="float64", help="precision of the fit (default: %(default)s)")
    add("--max-train-iters", type=int, default=DEFAULT_MAX_ITER, help="of L-BFGS (default: %(default)s)")
    return parser


class LogRegModule(nn.Module):
    """Logistic regression with an L2 penalty of strength 1 / C, as a module that answers with probabilities."""

    def __init__(
        self,
        C: float,
        max_iter: int = DEFAULT_MAX_ITER,
        dtype: torch.dtype = torch.float64,
        device: torch.device = _CPU_DEVICE,
    ):
        super().__init__()
        self.C, self.max_iter, self.dtype, self.device = C, max_iter, dtype, device
        self.estimator: SoftmaxRegression | None = None  # known after `fit`

    def fit(self, train_features: Tensor, train_labels: Tensor) -> None:
        """Find the optimum for features (N, D) and labels (N,)."""
        self.estimator = fit_softmax_regression(
            train_features.to(self.device, self.dtype),
            train_labels.to(self.device),
            int(train_labels.max()) + 1,
            C=self.C,
            max_iter=self.max_iter,
        )

    def forward(self, samples: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """{"preds": probabilities (B, C), "target": targets}."""
        assert self.estimator is not None, "fit comes before forward"
        return {"preds": self.estimator.predict_proba(samples).to(samples.device), "target": targets}


def evaluate_model(
    *, logreg_model: LogRegModule, logreg_metric: MetricCollection, test_data_loader: Any, device: torch.device
) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
    """Score a fitted model on batches of features; the result is under "metrics"."""
    return evaluate(nn.Identity(), test_data_loader, {"metrics": logreg_model}, {"metrics": logreg_metric}, device)


def train_for_C(
    *,
    C: float,
    max_iter: int,
    train_features: Tensor,
    train_labels: Tensor,
    dtype: torch.dtype = torch.float64,
    device: torch.device = _CPU_DEVICE,
) -> LogRegModule:
    """The model for one penalty."""
    model = LogRegModule(C, max_iter=max_iter, dtype=dtype, device=device)
    model.fit(train_features, train_labels)
    return model


def train_and_evaluate(
    *,
    C: float,
    max_iter: int,
    train_features: Tensor,
    train_labels: Tensor,
    logreg_metric: MetricCollection,
    test_data_loader: Any,
    train_dtype: torch.dtype = torch.float64,
    train_features_device: torch.device,
    eval_device: torch.device,
) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
    """Fit for one penalty and score."""
    model = train_for_C(
        C=C,
        max_iter=max_iter,
        train_features=train_features,
        train_labels=train_labels,
        dtype=train_dtype,
        device=train_features_device,
    )
    return evaluate_model(
        logreg_model=model, logreg_metric=logreg_metric, test_data_loader=test_data_loader, device=eval_device
    )


def sweep_C_values(
    *,
    train_features: Tensor,
    train_labels: Tensor,
    test_data_loader: Any,
    metric_type: MetricType,
    num_classes: int,
    train_dtype: torch.dtype = torch.float64,
    train_features_device: torch.device = _CPU_DEVICE,
    max_train_iters: int = DEFAULT_MAX_ITER,
) -> tuple[dict[str, Tensor], float]:
    """Fit for every C of `10 ** C_POWER_RANGE`, shared among the processes: the best scores and their C.

    Each fit starts from zero, so that the result does not depend on who fits what.
    """
    if metric_type == MetricType.PER_CLASS_ACCURACY:  # one number is needed to choose by
        metric_type = MetricType.MEAN_PER_CLASS_ACCURACY
    metric = build_metric(metric_type, num_classes=num_classes)
    all_C = (10**C_POWER_RANGE).tolist()
    mine = {}
    for C in all_C[distributed.get_global_rank() :: distributed.get_global_size()]:
        model = train_for_C(
            C=C,
            max_iter=max_train_iters,
            train_features=train_features,
            train_labels=train_labels,
            dtype=train_dtype,
            device=train_features_device,
        )
        mine[C] = (model.estimator.weight.cpu(), model.estimator.bias.cpu())
    fitted = {C: part for models in distributed.gather_objects(mine) for C, part in models.items()}

    best_stats: dict[str, Tensor] = {}
    best_C = all_C[0]
    for C in all_C:
        model = LogRegModule(C, dtype=train_dtype, device=train_features_device)
        model.estimator = SoftmaxRegression(*(part.to(train_features_device) for part in fitted[C]))
        _, results = evaluate_model(
            logreg_model=model,
            logreg_metric=metric.clone(),
            test_data_loader=test_data_loader,
            device=default_device(),
        )
        stats = results["metrics"]
        logger.info(f"Trained for C = {C:.5g}: { ({k: round(float(v), 4) for k, v in stats.items()}) }")
        if not best_stats or stats["top-1"] > best_stats["top-1"]:
            best_stats, best_C = stats, C
    logger.info(f"Sweep best { ({k: round(100 * float(v), 2) for k, v in best_stats.items()}) }, best C = {best_C:.6g}")
    return best_stats, best_C


def eval_log_regression(
    *,
    model: nn.Module,
    train_dataset: Dataset,
    val_dataset: Dataset,
    finetune_dataset: Dataset | None,
    metric_type: MetricType,
    batch_size: int,
    num_workers: int,
    finetune_on_val: bool = False,
    train_dtype: torch.dtype = torch.float64,
    train_features_device: torch.device = _CPU_DEVICE,
    max_train_iters: int = DEFAULT_MAX_ITER,
) -> dict[str, Any]:
    """Choose C on a fine-tuning set, fit on training and fine-tuning images, score on the validation set.

    Without a fine-tuning set C is chosen on a random tenth of the training images (the same tenth in every run), or on
    the validation set with `finetune_on_val`, which is then not added to the training images.

    Returns:
        {"top-1": ..., "top-5": ..., "best_C": ...}.
    """
    start = time.time()
    on_cpu = torch.device(train_features_device) == _CPU_DEVICE

    def features_of(dataset: Dataset) -> tuple[Tensor, Tensor]:
        return extract_features(model, dataset, batch_size, num_workers, gather_on_cpu=on_cpu)

    train_features, train_labels = features_of(train_dataset)
    val_features, val_labels = features_of(val_dataset)
    if finetune_dataset is not None:
        logger.info("Choosing hyperparameters on the finetune dataset")
        tune_features, tune_labels = features_of(finetune_dataset)
    elif finetune_on_val:
        logger.info("Choosing hyperparameters on the val dataset")
        tune_features, tune_labels = val_features, val_labels
    else:
        logger.info("Choosing hyperparameters on 10% of the train dataset")
        order = torch.randperm(len(train_features), generator=torch.Generator().manual_seed(0)).to(
            train_features.device
        )
        tenth = max(1, len(order) // 10)
        tune, rest = order[:tenth], order[tenth:]
        tune_features, tune_labels = train_features[tune], train_labels[tune]
        train_features, train_labels = train_features[rest], train_labels[rest]

    num_classes = int(max(train_labels.max(), tune_labels.max(), val_labels.max())) + 1
    fitting = {"train_dtype": train_dtype, "train_features_device": torch.device(train_features_device)}
    _, best_C = sweep_C_values(
        train_features=train_features,
        train_labels=train_labels,
        test_data_loader=DataLoader(TensorDataset(tune_features, tune_labels), batch_size=batch_size),
        metric_type=metric_type,
        num_classes=num_classes,
        max_train_iters=max_train_iters,
        **fitting,
    )
    if not (finetune_dataset is None and finetune_on_val):
        train_features, train_labels = (
            torch.cat([train_features, tune_features]),
            torch.cat([train_labels, tune_labels]),
        )
    logger.info("Training final model")
    _, results = train_and_evaluate(
        C=best_C,
        max_iter=max_train_iters,
        train_features=train_features,
        train_labels=train_labels,
        logreg_metric=build_metric(metric_type, num_classes=num_classes),
        test_data_loader=DataLoader(TensorDataset(val_features, val_labels), batch_size=batch_size),
        eval_device=default_device(),
        **fitting,
    )
    logger.info(f"Log regression evaluation done in {int(time.time() - start)}s")
    return {**results["metrics"], "best_C": best_C}


def eval_log_regression_with_model(
    model: nn.Module,
    train_dataset_str: str = "ImageNet:split=TRAIN",
    val_dataset_str: str = "ImageNet:split=VAL",
    finetune_dataset_str: str | None = None,
    autocast_dtype: torch.dtype = torch.float,
    finetune_on_val: bool = False,
    metric_type: MetricType = MetricType.MEAN_ACCURACY,
    train_dtype: torch.dtype = torch.float64,
    train_features_device: torch.device = _CPU_DEVICE,
    max_train_iters: int = DEFAULT_MAX_ITER,
    output_dir: str | None = None,
    num_workers: int = 5,
) -> dict[str, float]:
    """`eval_log_regression` on named data sets: {"top-1": per cent, "top-5": per cent, "best_C": ...}.

    With `output_dir` the result is also a line of `results_eval_log_regression.json` there.
    """
    transform = make_classification_eval_transform(resize_size=224)
    names = [train_dataset_str, val_dataset_str, *([finetune_dataset_str] if finetune_dataset_str else [])]
    train_dataset, val_dataset, *finetune = make_classification_datasets(names, [transform] * len(names))
    stats = eval_log_regression(
        model=ModelWithAutocast(model, autocast_dtype),
        train_dataset=train_dataset,
        val_dataset=val_dataset,
        finetune_dataset=finetune[0] if finetune else None,
        metric_type=metric_type,
        batch_size=256,
        num_workers=num_workers,
        finetune_on_val=finetune_on_val,
        train_dtype=train_dtype,
        train_features_device=train_features_device,
        max_train_iters=max_train_iters,
    )
    top = {name: 100.0 * float(stats[name].mean()) if name in stats else 0.0 for name in ("top-1", "top-5")}
    results = {**top, "best_C": stats["best_C"]}
    logger.info(
        "Training of the supervised logistic regression on frozen features completed.\n"
        f"Top-1 test accuracy: {results['top-1']:.1f}\nTop-5 test accuracy: {results['top-5']:.1f}\n"
        f"obtained for C = {results['best_C']:.6f}"
    )
    if output_dir:
        append_json_lines(Path(output_dir, "results_eval_log_regression.json"), results)
    distributed.barrier()
    return results


def main(args: argparse.Namespace) -> int:
    """Run the evaluation that the command line asks for."""
    model, autocast_dtype = setup_and_build_model(args)
    eval_log_regression_with_model(
        model=model,
        train_dataset_str=args.train_dataset_str,
        val_dataset_str=args.val_dataset_str,
        finetune_dataset_str=args.finetune_dataset_str,
        autocast_dtype=autocast_dtype,
        finetune_on_val=args.finetune_on_val,
        metric_type=args.metric_type,
        train_dtype=as_torch_dtype(args.train_dtype),
        train_features_device=torch.device(args.train_features_device),
        max_train_iters=args.max_train_iters,
        output_dir=args.output_dir or ".",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser(description="DINOv2 logistic regression evaluation").parse_args()))
