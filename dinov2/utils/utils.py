"""Small helpers that upstream keeps here: seeds, schedules, the code version. New helpers live where they are used."""

import logging
import random
import subprocess
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dinov2.models.weights import load_pretrained_weights

__all__ = ["CosineScheduler", "fix_random_seeds", "get_sha", "has_batchnorms", "load_pretrained_weights"]

logger = logging.getLogger("dinov2")


class CosineScheduler:
    """One value per iteration: frozen at 0, then a linear warm-up, then half a cosine down to the final value.

    `scheduler[i]` is the value of iteration i; from `total_iters` on it stays at `final_value`.

    Args:
        base_value: where the warm-up ends and the cosine begins.
        final_value: where the cosine ends.
        total_iters: iterations altogether, the frozen and warm-up ones included.
        warmup_iters: iterations of the warm-up.
        start_warmup_value: where the warm-up begins.
        freeze_iters: iterations at 0 before everything else.

    Raises:
        ValueError: freezing and warm-up take longer than `total_iters`.
    """

    def __init__(
        self,
        base_value: float,
        final_value: float,
        total_iters: int,
        warmup_iters: int = 0,
        start_warmup_value: float = 0,
        freeze_iters: int = 0,
    ):
        cosine_iters = total_iters - warmup_iters - freeze_iters
        if cosine_iters < 0:
            raise ValueError(
                f"{freeze_iters} frozen and {warmup_iters} warm-up iterations do not fit into {total_iters} iterations"
            )
        self.final_value = final_value
        self.total_iters = total_iters
        phase = np.pi * np.arange(cosine_iters) / max(cosine_iters, 1)
        self.schedule = np.concatenate(
            (
                np.zeros(freeze_iters),
                np.linspace(start_warmup_value, base_value, warmup_iters),
                final_value + 0.5 * (base_value - final_value) * (1 + np.cos(phase)),
            )
        )

    def __getitem__(self, iteration: int) -> float:
        """Return the value of one iteration."""
        return float(self.schedule[iteration]) if iteration < self.total_iters else self.final_value


def fix_random_seeds(seed: int = 31) -> None:
    """Seed Python's, numpy's and torch's generators (CPU and every GPU)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_sha() -> str:
    """Return one line that names the code that runs: `sha: <commit>, status: clean|has uncommitted changes, …`."""
    if not _git("ls-files", Path(__file__).name):  # installed, perhaps inside the checkout of something else
        return "sha: unknown (no git checkout), status: unknown, branch: unknown"
    sha = _git("rev-parse", "HEAD")
    status = "has uncommitted changes" if _git("status", "--porcelain", "--untracked-files=no") else "clean"
    return f"sha: {sha}, status: {status}, branch: {_git('rev-parse', '--abbrev-ref', 'HEAD') or 'unknown'}"


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def has_batchnorms(model: nn.Module) -> bool:
    """Return whether a module holds a batch norm of any kind."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return any(isinstance(module, kinds) for module in model.modules())
