"""What the launcher leaves beside a run, so that it can be understood a year later."""

import getpass
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

import dinov2
from dinov2.run.script import JOB_ID, PACKAGE_ROOT
from dinov2.utils.utils import get_sha


@dataclass(frozen=True)
class Run:
    """One training or evaluation: a job, or one of a job array."""

    name: str  # below the output folder; empty where that is its folder
    config: DictConfig | None

    def folder(self, output_dir: str) -> Path:
        """Return the folder of the run."""
        return Path(output_dir, self.name)


def write_config(folder: Path, cfg: DictConfig, job_id: str) -> None:
    """Write the resolved config, with the job's id in its paths."""
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg).replace(JOB_ID, job_id))


def write_record(folder: Path, job_id: str, name: str, run_folders: Sequence[Path]) -> None:
    """Write `submission.json`: who submitted what, where, when, with which code."""
    record = {
        "job_id": job_id,
        "name": name,
        "submitted_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "cwd": os.getcwd(),
        "command": sys.orig_argv,
        "runs": [str(folder) for folder in run_folders],
        "dinov2": dinov2.__version__,
        "package_root": str(PACKAGE_ROOT),
        "code": get_sha(),
        "python": sys.version.split()[0],
    }
    (folder / "submission.json").write_text(json.dumps(record, indent=2) + "\n")
