"""Run the k-NN evaluation on a SLURM cluster, with its own options and those of the launcher; see docs/slurm.md."""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by path: import from the clone, and nothing from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from dinov2.eval.knn import get_args_parser
from dinov2.run.submit import run_command
from dinov2.run.task import Task


class Evaluator(Task):
    """K-nearest-neighbour evaluation as a job."""

    program = "dinov2/eval/knn.py"
    get_args_parser = staticmethod(get_args_parser)
    data_arguments = ("train_dataset_str", "val_dataset_str")


def main(argv: Sequence[str] | None = None) -> int:
    """Submit the k-NN evaluation; return the exit code of the launcher."""
    return run_command(Evaluator, "dinov2:knn", argv)


if __name__ == "__main__":
    sys.exit(main())
