"""The model's vital signs during a run, because the loss says nothing about what the features are worth.

With labelled folders (`evaluation.fit_dataset_path`, `evaluation.eval_dataset_path`): 1-NN, 20-NN and a linear probe.
With labels or without, on held-out images: the effective rank and the spread of the teacher's features, and an alarm
when they say that the features collapse.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.data import LabelledDataset
from dinov2.eval.features import FeatureTable, ImageFiles, extract, l2_normalise
from dinov2.eval.probes import align_classes, score_features
from dinov2.logging.writers import append_json_line

logger = logging.getLogger("dinov2")

READINGS = "eval_metrics.json"
REPORTED_SCORES = ("accuracy", "macro_f1", "balanced_accuracy")
MAX_IMAGES = 4096  # vital signs settle with a few thousand images
# A healthy run spreads its features over many directions. Set beforehand, then held against 16 short runs of
# a vit_tiny on blood cells: those that learned had a spread above 0.3 and a rank above 6 by their second reading, those
# that went nowhere stayed below 0.1 and 3.3. One run was still below at its first reading and recovered.
COLLAPSE_SPREAD = 0.1  # of 1.0, the spread of directions drawn at random
COLLAPSE_RANK = 3.0  # effective directions in use, of at most min(images, width)
COLLAPSE_RANK_SHARE = 0.5  # of the highest rank seen in this run
START_SCORE = "knn_20_accuracy"  # what a run that starts from weights must not lose


def rank_me(features: np.ndarray | Tensor, eps: float = 1e-7) -> float:
    """Effective rank of features (N, D): exp of the entropy of their normalised singular values, from 1 to min(N, D).

    Source: Garrido et al., "RankMe: Assessing the downstream performance of pretrained self-supervised representations
    by their rank", ICML 2023, equation 1.
    """
    x = torch.as_tensor(features).double()
    if not torch.isfinite(x).all():
        return math.nan
    singular = torch.linalg.svdvals(x)
    p = singular / singular.sum().clamp_min(eps) + eps
    return float(torch.exp(-(p * p.log()).sum()))


def feature_std(features: np.ndarray | Tensor) -> float:
    """Spread of the directions of features (N, D): sqrt(D) times the mean deviation of L2-normalised coordinates.

    1 for directions that are spread evenly over the sphere, 0 when every image has the same features.

    Source: the collapse check of Chen & He, "Exploring simple Siamese representation learning", CVPR 2021, section 4.1.
    """
    x = l2_normalise(np.asarray(features, np.float64))
    return float(np.sqrt(x.shape[1]) * x.std(axis=0).mean())


class HealthMonitor:
    """Measures a backbone every so often; all processes enter `measure` together and get the same numbers.

    Args:
        cfg: the run's configuration; reads `evaluation`, `crops.global_crops_size`, `student.patch_size`,
            `student.pretrained_weights` and the normalisation in `augmentations`.
        device: where the backbone lives.
        held_out: paths of images that are not trained on, such as `ImageDataset.preserved_images`; None for none.
        history: earlier readings of the same run (`read_history`), for alarms that compare with them.

    Raises:
        ValueError: only one of the two labelled folders is given, or their classes do not match.
    """

    def __init__(self, cfg: Any, *, device: torch.device, held_out: Any = None, history: Sequence[dict] = ()):
        evaluation = cfg.evaluation
        if bool(evaluation.fit_dataset_path) != bool(evaluation.eval_dataset_path):
            raise ValueError(
                "evaluation.fit_dataset_path and evaluation.eval_dataset_path go together: "
                f"got {evaluation.fit_dataset_path!r} and {evaluation.eval_dataset_path!r}"
            )
        self.device = device
        self.linear_probe = bool(evaluation.linear_probe)
        self.fit, self.eval = (
            LabelledDataset(path, in_chans=cfg.student.in_chans, cache_dir=cfg.train.cache_dir or None)
            if path
            else None
            for path in (evaluation.fit_dataset_path, evaluation.eval_dataset_path)
        )
        self.held_out = (
            ImageFiles(held_out, cfg.student.in_chans, MAX_IMAGES)
            if held_out is not None and len(held_out)
            else self.eval
        )
        self.extraction = {
            "batch_size": evaluation.batch_size,
            "device": device,
            "image_size": evaluation.image_size or cfg.crops.global_crops_size,
            "mean": tuple(cfg.augmentations.mean),
            "std": tuple(cfg.augmentations.std),
        }
        self.best_rank = max((row["rankme"] for row in history if "rankme" in row), default=0.0)
        self.starts_from_weights = bool(cfg.student.pretrained_weights)
        self.start_score = next((row.get(START_SCORE) for row in history if row["iteration"] == 0), None)
        if self.fit is not None:
            align_classes(_labels_only(self.fit), _labels_only(self.eval))
            logger.info(f"probes learn from {len(self.fit)} images and are scored on {len(self.eval)}")
        elif self.held_out is None:
            logger.warning(
                "no labelled folders (evaluation.fit_dataset_path, evaluation.eval_dataset_path) and no held-out "
                "images (train.path_preserved): the health of the model cannot be measured"
            )

    def measure(self, backbone: nn.Module, *, alarm: bool = True) -> dict[str, float]:
        """Vital signs by name: "knn_1_accuracy", ..., "linear_macro_f1", "rankme", "feature_std"; empty without images.

        Pass `alarm=False` before the first step: to an untrained network all images do look alike.
        """
        signs: dict[str, float] = {}
        seen: FeatureTable | None = None
        if self.fit is not None:
            fit, seen = (extract(backbone, data, **self.extraction) for data in (self.fit, self.eval))
            if finite(fit.features) and finite(seen.features):
                for probe, scores in score_features(fit, seen, linear=self.linear_probe).items():
                    signs |= {f"{probe}_{name}": scores[name] for name in REPORTED_SCORES}
        if self.held_out is not None and self.held_out is not self.eval:
            seen = extract(backbone, self.held_out, **self.extraction)
        if seen is not None:
            signs |= self.spread(seen.features, alarm=alarm)
        if not alarm:
            self.start_score = signs.get(START_SCORE)
        elif self.starts_from_weights:
            self.compare_with_start(signs)
        return signs

    def compare_with_start(self, signs: dict[str, float]) -> None:
        """An alarm in the log when 20-NN accuracy is below that of the weights that the run started from."""
        start, score = self.start_score, signs.get(START_SCORE)
        if start is None or score is None or score >= start:
            return
        chance = math.sqrt(start * (1 - start) / len(self.eval))
        logger.error(
            f"ALARM: 20-NN accuracy is {score:.1%}, below the {start:.1%} before the first step (standard error on "
            f"{len(self.eval)} images: {chance:.1%}): training takes away what the weights brought. If the next "
            "reading says the same, start again with a longer optim.freeze_backbone_epochs, a lower "
            "optim.backbone_lr_mult or a lower optim.base_lr (docs/continue.md); eval/ keeps each reading's weights"
        )

    def spread(self, features: np.ndarray, *, alarm: bool = True) -> dict[str, float]:
        """Effective rank and spread of features (N, D); an alarm in the log when they collapse."""
        if not finite(features):
            logger.error(
                "ALARM: the teacher's features are not finite; the run is lost, go back to an earlier checkpoint"
            )
            return {"rankme": math.nan, "feature_std": math.nan}
        signs = {"rankme": rank_me(features), "feature_std": feature_std(features)}
        for problem in self.symptoms(signs) if alarm else ():
            logger.error(
                f"ALARM: the features collapse: {problem}. Early in a run this may pass; if the next reading says the "
                "same, stop and lower optim.base_lr, raise the batch or teacher.warmup_teacher_temp_epochs, or use "
                "train.centering=sinkhorn_knopp"
            )
        self.best_rank = max(self.best_rank, signs["rankme"])
        return signs

    def symptoms(self, signs: dict[str, float]) -> list[str]:
        """What is wrong with "rankme" and "feature_std", in words; empty when healthy."""
        rank, std = signs["rankme"], signs["feature_std"]
        problems = []
        if std < COLLAPSE_SPREAD:
            problems.append(
                f"feature_std={std:.3f} is below {COLLAPSE_SPREAD}: all images get nearly the same features"
            )
        if rank < COLLAPSE_RANK:
            problems.append(f"rankme={rank:.1f} is below {COLLAPSE_RANK:g}: the features use hardly any direction")
        elif rank < COLLAPSE_RANK_SHARE * self.best_rank:
            problems.append(f"rankme={rank:.1f} has fallen below half of its best value {self.best_rank:.1f}")
        return problems


def read_history(output_dir: str | Path, before: float = math.inf) -> list[dict[str, float]]:
    """The readings in `eval_metrics.json` of a run, up to and with iteration `before`; of repeated ones, the last."""
    path = Path(output_dir) / READINGS
    latest = {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if line:
                logger.warning("%s, line %d is cut off and left out", path, number)
            continue
        if row["iteration"] <= before:
            latest[row["iteration"]] = row
    return [latest[iteration] for iteration in sorted(latest)]


def append_reading(output_dir: str | Path, iteration: int, signs: Mapping[str, float]) -> None:
    """Add a reading to `eval_metrics.json`."""
    append_json_line(Path(output_dir) / READINGS, {"iteration": iteration, **signs})


def finite(features: np.ndarray) -> bool:
    """No NaN, no infinity."""
    return bool(np.isfinite(features).all())


def _labels_only(dataset: Any) -> FeatureTable:
    """A table without features, to compare classes before anything is extracted."""
    return FeatureTable(
        np.zeros((len(dataset), 0), np.float32), np.asarray(dataset.labels), dataset.paths, dataset.classes
    )
