"""Parsing, checks and messages of the launcher; no job runs here."""

import argparse
import enum
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dinov2.run import submit
from dinov2.run.submit import parse_arguments
from dinov2.run.task import Task, command_line, folders

CHECKOUT = Path(__file__).resolve().parents[2]


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


def program_parser(add_help: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=add_help)
    parser.add_argument("--config-file", default="")
    parser.add_argument("--output-dir", "--output_dir", default="")
    parser.add_argument("--no-resume", action="store_true")
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("--cache", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.1])
    parser.add_argument("--colour", type=Colour, default=Colour.RED)
    parser.add_argument("--data")
    parser.add_argument("opts", nargs="*", default=None)
    return parser


class Program(Task):
    """A program to start."""

    program = "program.py"
    get_args_parser = staticmethod(program_parser)
    data_arguments = ("data",)


@pytest.fixture
def config(tmp_path, cell_folder):
    path = tmp_path / "cells.yaml"
    path.write_text(yaml.safe_dump({"train": {"dataset_path": [str(cell_folder)]}}))
    return path


@pytest.fixture
def launch(config, tmp_path, capsys):
    """Run the launcher of the training; return its exit code and what it printed."""
    from dinov2.run.train.train import main

    def run(*options: str, output: str = str(tmp_path / "out")):
        code = main(["--config-file", str(config), "--output-dir", output, *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    """A PATH without SLURM's commands."""
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--eval-only", "--rates", "0.5", "0.25", "--colour", "blue", "--data", "/cells"],
        ["--no-cache", "train.seed=1", "optim.epochs=3"],
    ],
)
def test_parsed_arguments_are_written_as_the_words_that_parse_to_them(words):
    assert command_line(program_parser(), program_parser().parse_args(words)) == words


def test_an_argument_that_cannot_be_written_is_not_dropped_silently():
    parser = argparse.ArgumentParser()
    parser.add_argument("-v", action="count", default=0)
    with pytest.raises(TypeError, match="cannot write -v, a _CountAction"):
        command_line(parser, parser.parse_args(["-vv"]))


def test_options_of_launcher_and_program_may_be_mixed():
    args = parse_arguments(
        Program, ["--ngpus", "2", "--eval-only", "train.seed=1", "--partition", "hard", "--time", "1-0"]
    )
    assert (args.ngpus, args.partition, args.time, args.eval_only, args.opts) == (
        2,
        "hard",
        "1-0",
        True,
        ["train.seed=1"],
    )


@pytest.mark.parametrize("flag", ["--ngpus", "--gpus", "--gpus-per-node"])
def test_the_names_of_dinov2_for_gpus_and_nodes_are_understood(flag):
    args = parse_arguments(Program, [flag, "3", "--nnodes", "2"])
    assert (args.ngpus, args.nodes, args.timeout) == (3, 2, 2800)


def test_the_help_shows_the_options_of_both(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(Program, ["--help"])
    shown = capsys.readouterr().out
    assert "--mem-per-gpu" in shown
    assert "--eval-only" in shown


def test_a_program_is_given_its_own_arguments_only():
    task = Program(
        parse_arguments(Program, ["--ngpus", "2", "--eval-only", "--no-resume", "--output-dir", "x", "a.b=1"])
    )
    assert task.arguments() == ["--eval-only", "a.b=1"]
    assert task.first_arguments() == ["--no-resume"]


@pytest.mark.parametrize(
    ("value", "paths"),
    [
        (None, []),
        ("/cells", ["/cells"]),
        (["/a", "/b"], ["/a", "/b"]),
        ("ImageNet:split=TRAIN", []),
        ("ImageNet:split=TRAIN:root=/data:extra=/more", ["/data", "/more"]),
    ],
)
def test_the_folders_in_a_dataset_option_are_found(value, paths):
    assert folders(value) == paths


def test_a_missing_data_folder_is_named_with_its_option(tmp_path, capsys):
    code = submit.run_command(Program, "program", ["--output-dir", str(tmp_path), "--data", f"{tmp_path}/no"])
    assert code == 2
    assert capsys.readouterr().err == f"error: --data: {tmp_path}/no is not there (of its path only {tmp_path} is)\n"


def test_without_an_output_folder_the_launcher_says_what_it_is_for(capsys):
    assert submit.run_command(Program, "program", []) == 2
    assert "--output-dir is missing" in capsys.readouterr().err


def test_the_environment_of_a_job_is_the_users_without_that_of_another_job(monkeypatch):
    monkeypatch.setattr(
        os,
        "environ",
        {
            "HOME": "/home/me",
            "SLURM_CONF": "/etc/slurm.conf",
            "SLURM_JOB_ID": "1",
            "RANK": "0",
            "SBATCH_PARTITION": "old",
            "SBATCH_ACCOUNT": "mine",
        },
    )
    script = "#!/bin/bash\n#SBATCH --partition=hard\n"
    assert submit._environment(script) == {
        "HOME": "/home/me",
        "SLURM_CONF": "/etc/slurm.conf",
        "SBATCH_ACCOUNT": "mine",
    }


# --- the launcher of the training -----------------------------------------------------------------------------------


def test_a_dry_run_shows_script_and_config_and_writes_nothing(launch, tmp_path, no_slurm):
    code, shown, warnings = launch("--ngpus", "2", "--partition", "hard", "--dry-run", "optim.epochs=70")
    assert code == 0
    for line in (
        "#SBATCH --partition=hard",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --ntasks-per-node=2",
        "  epochs: 70",
    ):
        assert line in shown.splitlines()
    assert "not checked" in warnings
    assert not (tmp_path / "out").exists()


def test_every_resource_option_reaches_the_script(launch, no_slurm):
    options = {
        "--qos": "high",
        "--account": "lab",
        "--constraint": "a100|h100",
        "--exclude": "n[1-3]",
        "--nodelist": "n7",
        "--mem-per-gpu": "30G",
        "--cpus-per-task": "6",
        "--comment": "a try",
    }
    shown = launch("--dry-run", "--time", "2-00:00:00", *(word for option in options.items() for word in option))[1]
    assert "#SBATCH --time=2880" in shown
    for flag, value in options.items():
        assert (
            f"#SBATCH {flag}={value}".replace("a try", "'a try'")
            .replace("=a100|h100", "='a100|h100'")
            .replace("=n[1-3]", "='n[1-3]'")
            in shown.splitlines()
        )


def test_big_gpus_are_what_the_site_calls_so(launch, no_slurm, monkeypatch):
    code, _, error = launch("--dry-run", "--use-big-gpus")
    assert code == 2
    assert "--use-big-gpus: set DINOV2_BIG_GPU_CONSTRAINT to a feature of your cluster's nodes" in error
    monkeypatch.setenv("DINOV2_BIG_GPU_CONSTRAINT", "gpu80g")
    assert "#SBATCH --constraint=gpu80g" in launch("--dry-run", "--use-big-gpus")[1]


def test_without_sbatch_the_way_to_run_here_is_shown(launch, no_slurm):
    code, _, error = launch("--ngpus", "2")
    assert code == 2
    assert error.startswith("error: no sbatch on the PATH: this machine submits to no SLURM cluster.")
    assert "--local" in error


def test_an_impossible_config_is_refused_before_it_waits_in_a_queue(launch, no_slurm):
    code, _, error = launch("--dry-run", "crops.global_crops_size=225", "optim.epoch=3")
    assert code == 2
    assert "optim.epochs" in error


def test_an_output_folder_that_cannot_be_written_is_refused(launch, no_slurm):
    code, _, error = launch("--dry-run", output="/proc/none/%j")
    assert code == 2
    assert error.startswith("error: --output-dir /proc/none: cannot write there:")


def test_a_time_limit_shorter_than_the_warning_of_its_end_is_refused(launch, no_slurm):
    code, _, error = launch("--dry-run", "--timeout", "3")
    assert code == 2
    assert "a time limit of 3 min leaves no time to train" in error


def test_memory_per_gpu_without_gpus_is_refused(launch, no_slurm):
    assert launch("--dry-run", "--ngpus", "0", "--mem-per-gpu", "30G")[0] == 2


def test_the_launcher_starts_by_path_from_anywhere():
    by_path = [sys.executable, f"{CHECKOUT}/dinov2/run/train/train.py", "--help"]
    assert "--eval-only" in subprocess.check_output(by_path, text=True, cwd="/")


@pytest.mark.parametrize("name", submit.TASKS)
def test_every_task_has_a_launcher_with_its_options_and_ours(name, capsys):
    with pytest.raises(SystemExit):
        submit.main([name, "--help"])
    shown = capsys.readouterr().out
    assert "--mem-per-gpu" in shown
    assert "--output-dir" in shown


def test_an_unknown_task_is_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        submit.main(["trian"])
    assert "train" in capsys.readouterr().err


# --- against sinfo of a real cluster --------------------------------------------------------------------------------


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--partition", "hrad"],
            "--partition hrad: no such partition on this cluster; did you mean hard? it has hard, preempt",
        ),
        (["--ngpus", "3"], "no node of partition hard has more than 2 GPUs; --ngpus 2 --nodes 2 gives 4"),
        (["--nodes", "5"], "--nodes 5: partition hard has only 2 node(s) with 2 GPUs"),
        (["--cpus-per-task", "9"], "--cpus-per-task 9: 2 process(es) of a node need 18 CPUs"),
        (["--nodelist", "n9"], "sbatch refused the job: sbatch: error: Batch job submission failed: Invalid node name"),
    ],
)
def test_what_the_cluster_cannot_give_is_refused_with_what_it_can(launch, slurm, tmp_path, options, message):
    code, _, error = launch("--partition", "hard", "--ngpus", "2", *options)
    assert code == 2
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slurm
def test_a_controller_that_does_not_answer_is_said_so(launch, slurm, monkeypatch, tmp_path):
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        "ClusterName=none\nSlurmctldHost=localhost\nSlurmctldPort=1\nNodeName=n1\nPartitionName=p Nodes=n1\n"
    )
    monkeypatch.setenv("SLURM_CONF", str(conf))
    code, _, error = launch("--partition", "hard", "--ngpus", "2", "--dry-run")
    assert code == 0
    assert "warning: sinfo does not answer: partition and resources are not checked" in error


@pytest.mark.slurm
def test_all_gpus_of_a_node_and_their_share_of_its_cpus_are_the_default(launch, slurm):
    shown = launch("--partition", "hard", "--dry-run")[1]
    assert "#SBATCH --gpus-per-node=2" in shown
    assert "#SBATCH --cpus-per-task=8" in shown
