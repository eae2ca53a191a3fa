"""Run `dinov2 evaluate` on a SLURM cluster, with its own options and those of the launcher; see docs/slurm.md."""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by path: import from the clone, and nothing from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from dinov2.eval.cross_validation import get_args_parser
from dinov2.run.submit import run_command
from dinov2.run.task import Task


class Evaluator(Task):
    """The report on labelled images as a job."""

    program = "dinov2/eval/cross_validation.py"
    get_args_parser = staticmethod(get_args_parser)
    data_arguments = ("data", "test")


def main(argv: Sequence[str] | None = None) -> int:
    """Submit the evaluation; return the exit code of the launcher."""
    return run_command(Evaluator, "dinov2:evaluate", argv)


if __name__ == "__main__":
    sys.exit(main())
