"""A run goes on only as the run it was."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from dinov2.configs import dinov2_default_config
from dinov2.data import ImageDataset
from dinov2.distributed import is_main_process
from dinov2.fsdp import first_free
from dinov2.logging.trackers import RUN_IDS
from dinov2.train.health import READINGS
from dinov2.utils.config import get_effective_batch_size

logger = logging.getLogger("dinov2")

LOGS = ("training_metrics.json", READINGS, "tensorboard", RUN_IDS)  # what a run appends to

# What may differ between a run and its continuation without changing what it learns.
FREE = (
    "MODEL",
    "compute_precision.student.*.sharding_strategy",
    "compute_precision.teacher.*.sharding_strategy",
    "train.output_dir",
    "train.num_workers",
    "train.saveckp_freq",
    "train.log_period",
    "train.peak_tflops",
    "train.profile_steps",
    "train.loggers",
    "train.device",
    "train.compile",
    "train.activation_checkpointing",
    "train.cache_dataset",
    "train.cache_max_gb",
    "train.cache_dir",
    "train.max_unreadable_share",
    "student.attention_backend",
    "student.pretrained_weights",
    "optim.lr",  # follows from base_lr and the effective batch
    "evaluation",
    "checkpoint",
)

# What may differ too, but is said: the run goes on, and is no longer the run it would have been.
TOLD = {
    "train.batch_size_per_gpu": "the same images are in each step, under other masks",
    "train.gradient_accumulation_steps": "KoLeo and Sinkhorn-Knopp see other parts of the batch",
    "training images": "they come in another order",
    "sample of their paths": "other images than before",
}
SAMPLED_PATHS = 1000


class ResumeError(ValueError):
    """The checkpoint belongs to a run with other settings; the message shows the difference."""


def run_identity(cfg: Any, dataset: ImageDataset) -> dict[str, Any]:
    """The settings and the images that make a run this run, flat, as JSON values."""
    sample = hashlib.sha256()
    for index in np.linspace(0, len(dataset) - 1, SAMPLED_PATHS).astype(int):
        sample.update(os.fsencode(dataset.path(int(index))) + b"\0")
    return {
        **_settings(cfg),
        "effective batch": get_effective_batch_size(cfg),
        "training images": len(dataset),
        "sample of their paths": sample.hexdigest()[:16],
    }


def compare_with_checkpoint(identity: dict[str, Any], checkpoint: str | Path) -> None:
    """Refuse to go on from a checkpoint of another run; warn where the run will differ from then on.

    Raises:
        ResumeError: `checkpoint` was written by a run with other settings; shows the difference.
    """
    before = json.loads((Path(checkpoint) / "checkpoint.json").read_text())["extra"]["config"]
    before = {**_settings(dinov2_default_config), **before}  # keys that the version which wrote it did not have
    changed = {
        key: f"{key}: {before.get(key, 'not known')} -> {identity.get(key, 'not known')}"
        for key in sorted(before.keys() | identity.keys())
        if before.get(key) != identity.get(key)
    }
    refused = [f"  {change}" for key, change in changed.items() if key not in TOLD]
    if refused:
        raise ResumeError(
            f"{checkpoint} belongs to a run with other settings (then -> now):\n" + "\n".join(refused) + "\n"
            "Undo the changes to go on with that run, or start a new one in another --output-dir "
            "(or with --no-resume, which moves the old checkpoints aside)"
        )
    for key, change in changed.items():
        logger.warning("changed since the checkpoint: %s (%s)", change, TOLD[key])


def set_logs_aside(output_dir: str | Path) -> None:
    """Move the metrics and curves of an earlier run out of the way of one that starts from nothing."""
    folder = Path(output_dir)
    logs = [path for name in LOGS if (path := folder / name).exists()]
    if not logs or not is_main_process():
        return
    aside = first_free(folder / "logs_before")
    aside.mkdir()
    for path in logs:
        path.rename(aside / path.name)
    logger.info("the metrics of an earlier run are now in %s", aside)


def _settings(cfg: Any) -> dict[str, Any]:
    """The settings that must stay, flat."""
    flat = _flatten(OmegaConf.to_container(cfg, resolve=True))
    return {key: value for key, value in flat if not any(_matches(key, pattern) for pattern in FREE)}


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _matches(key: str, pattern: str) -> bool:
    """Whether `key` is `pattern` or lies under it; `*` stands for one part."""
    parts, wanted = key.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(want in ("*", part) for want, part in zip(wanted, parts))
