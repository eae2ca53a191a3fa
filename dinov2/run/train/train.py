"""Train on a SLURM cluster: the options of the training and of the launcher, in any order; see docs/slurm.md.

python dinov2/run/train/train.py --config-file CONFIG --output-dir DIR --partition NAME --ngpus 2 [key=value ...]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by path: import from the clone, and nothing from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from omegaconf import DictConfig

from dinov2.run.submit import run_command
from dinov2.run.task import Task, folders
from dinov2.train.train import EXIT_INTERRUPTED, get_args_parser


class Trainer(Task):
    """Training as a job: it resumes by itself after a preemption or at its time limit."""

    program = "dinov2/train/train.py"
    get_args_parser = staticmethod(get_args_parser)
    for_training = True
    resume_code = EXIT_INTERRUPTED

    def data_paths(self, cfg: DictConfig) -> dict[str, str]:
        """Return the paths of the training and of the evaluation during training, by path."""
        keys = {"train": ("dataset_path", "exclude"), "evaluation": ("fit_dataset_path", "eval_dataset_path")}
        named = {f"{section}.{key}": cfg[section][key] for section in keys for key in keys[section]}
        return {path: key for key, value in named.items() for path in folders(value)}


def main(argv: Sequence[str] | None = None) -> int:
    """Submit a training; return the exit code of the launcher."""
    return run_command(Trainer, "dinov2:train", argv)


if __name__ == "__main__":
    sys.exit(main())
