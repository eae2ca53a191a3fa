"""Run on this machine, now: the same job folder, without SLURM."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from dinov2.run.job_folder import Run, write_config, write_record
from dinov2.run.script import JOB_FOLDER, JOB_ID, PACKAGE_ROOT
from dinov2.run.task import Task


def prepare(task: Task, run: Run, output_dir: str) -> list[str]:
    """Write the job folder of a run; return the command that runs it, through torchrun if it is several processes."""
    job_id = f"local-{time.strftime('%Y%m%d-%H%M%S')}"
    root = run.folder(output_dir.replace(JOB_ID, job_id))
    folder = root / JOB_FOLDER / job_id
    folder.mkdir(parents=True)
    write_record(folder, job_id, task.program, [root])
    options = ["--output-dir", str(root)]
    if run.config is not None:
        write_config(folder, run.config, job_id)
        options += ["--config-file", str(folder / "config.yaml")]
    launcher = []
    if (processes := count_processes(task)) > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        launcher += [f"--log-dir={folder}", "--tee=3"]
    program = str(PACKAGE_ROOT / task.program)
    return [sys.executable, *launcher, program, *options, *task.first_arguments(), *task.arguments()]


def count_processes(task: Task) -> int:
    """Return `--ngpus`; without it one process per GPU of this machine, or one."""
    return task.args.ngpus or max(1, torch.cuda.device_count())


def execute(command: Sequence[str]) -> int:
    """Run a command to its end and return its exit code; it, not we, answers the signals that come meanwhile."""
    path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    print(f"running on this machine: {shlex.join(command)}", flush=True)
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),  # a terminal sends it to both
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number)),
    }
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
