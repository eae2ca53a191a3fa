import argparse
import json
import sys

import pytest
from omegaconf import OmegaConf

from dinov2.run import local
from dinov2.run.job_folder import Run
from dinov2.run.script import PACKAGE_ROOT
from dinov2.run.task import Task
from dinov2.run.train.train import main


class Program(Task):
    """A program to start."""

    program = "dinov2/program.py"
    get_args_parser = staticmethod(argparse.ArgumentParser)


def test_a_local_run_has_the_job_folder_of_one_on_slurm_and_torchrun_for_several_processes(tmp_path):
    run = Run("", OmegaConf.create({"train": {"output_dir": f"{tmp_path}/%j"}}))
    command = local.prepare(Program(argparse.Namespace(ngpus=2)), run, f"{tmp_path}/%j")
    output = next(tmp_path.iterdir())
    job = output / "slurm" / output.name
    assert output.name.startswith("local-")
    assert OmegaConf.load(job / "config.yaml").train.output_dir == str(output)
    assert json.loads((job / "submission.json").read_text())["job_id"] == output.name
    assert command[:5] == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert command[7:] == [
        f"{PACKAGE_ROOT}/dinov2/program.py", "--output-dir", str(output), "--config-file", f"{job}/config.yaml",
    ]  # fmt: skip


def test_one_process_needs_no_launcher(tmp_path):
    command = local.prepare(Program(argparse.Namespace(ngpus=1)), Run("", None), str(tmp_path))
    assert command == [sys.executable, f"{PACKAGE_ROOT}/dinov2/program.py", "--output-dir", str(tmp_path)]


def test_the_exit_code_of_a_local_run_is_handed_on():
    assert local.execute([sys.executable, "-c", "raise SystemExit(7)"]) == 7


def test_a_request_to_stop_reaches_the_program_which_may_still_save():
    asked_to_stop = "trap 'exit 75' TERM; sleep 1; kill -TERM $PPID; sleep 20 & wait"
    assert local.execute(["bash", "-c", asked_to_stop]) == 75


@pytest.mark.slow
def test_two_local_processes_train_together(tiny, tmp_path):
    options = ["--local", "--ngpus", "2", "train.OFFICIAL_EPOCH_LENGTH=2"]
    assert main(["--config-file", str(tiny), "--output-dir", str(tmp_path / "run"), *options]) == 0
    assert len(list(tmp_path.glob("run/checkpoints/*/*.distcp"))) == 2
