"""A run goes on only as the run it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dinov2.utils.config import get_effective_batch_size

# What may differ between a run and its continuation: it does not change the numbers, or only in their last digits.
FREE = (
    "MODEL",
    "compute_precision.student.*.sharding_strategy",
    "compute_precision.teacher.*.sharding_strategy",
    "train.output_dir",
    "train.num_workers",
    "train.batch_size_per_gpu",  # the batch of all processes must stay: "effective batch"
    "train.gradient_accumulation_steps",
    "train.saveckp_freq",
    "train.log_period",
    "train.peak_tflops",
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


class ResumeError(ValueError):
    """The checkpoint belongs to a run with other settings; the message shows the difference."""


def run_identity(cfg: Any) -> dict[str, Any]:
    """The settings that make a run this run, flat, as JSON values."""
    flat = dict(_flatten(OmegaConf.to_container(cfg, resolve=True)))
    kept = {key: value for key, value in flat.items() if not any(_matches(key, pattern) for pattern in FREE)}
    return {**kept, "effective batch": get_effective_batch_size(cfg)}


def refuse_changed_config(cfg: Any, checkpoint: str | Path) -> None:
    """Raise ResumeError, showing the difference, when `checkpoint` was written by a run with other settings."""
    before = json.loads((Path(checkpoint) / "checkpoint.json").read_text())["extra"]["config"]
    now = run_identity(cfg)
    changed = [
        f"  {key}: {before.get(key, 'not set')} -> {now.get(key, 'not set')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ResumeError(
            f"{checkpoint} belongs to a run with other settings (then -> now):\n" + "\n".join(changed) + "\n"
            "Undo the changes to go on with that run, or start a new one in another --output-dir "
            "(or with --no-resume, which moves the old checkpoints aside)"
        )


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
