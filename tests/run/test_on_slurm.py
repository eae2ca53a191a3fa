"""The launcher on a real SLURM, with real (tiny) trainings on CPU: two tasks that meet over gloo."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dinov2.run.train.train import main

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

CHECKOUT = Path(__file__).resolve().parents[2]
ITERATIONS = 40  # of the tiny training: enough that a quick machine is not done before it can be disturbed


@pytest.fixture(scope="module")
def undisturbed(cluster, tiny, tmp_path_factory):
    """What the README's command leaves behind: its output folder, and what it printed."""
    output = tmp_path_factory.mktemp("readme") / "run"
    command = [sys.executable, "dinov2/run/train/train.py", "--config-file", str(tiny)]
    command += ["--output-dir", str(output), "--partition", "hard", "--ngpus", "2", "--wait"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    environment |= {"SLURM_CONF": cluster, "A_VARIABLE_OF_THE_USER": "seen"}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout


def losses(output: Path) -> dict[int, float]:
    """Return the logged loss of each iteration; of one that was done twice, that of the last start."""
    lines = (output / "training_metrics.json").read_text().splitlines()
    return {record["iteration"]: record["total_loss"] for record in map(json.loads, lines)}


def assert_resumed(output: Path, undisturbed: Path) -> None:
    """The run was started twice, went on where it was, and every loss is that of a run that was left alone."""
    log = next(output.glob("slurm/*/task_0.log")).read_text()
    assert log.count("resuming from") == 1
    assert "killed by signal" not in log  # the workers of the loader, which get every signal too
    expected, logged = losses(undisturbed), losses(output)
    assert len(logged) >= ITERATIONS - 1  # a step that is interrupted before its log line leaves none
    assert max(logged) == ITERATIONS - 1
    assert logged == pytest.approx({iteration: expected[iteration] for iteration in logged}, rel=1e-4)


def submit(capsys, tiny: Path, output: Path, *options: str) -> str:
    """Submit a training on two GPUs; return the job id."""
    assert main(["--config-file", str(tiny), "--output-dir", str(output), "--ngpus", "2", *options]) == 0
    return capsys.readouterr().out.split()[2]


def has_begun(output: Path):
    return lambda: (output / "training_metrics.json").exists() and len(losses(output)) >= 1


def test_the_command_of_the_readme_trains_to_the_end_and_leaves_checkpoints(undisturbed):
    output, printed = undisturbed
    job = next((output / "slurm").iterdir())
    assert max(losses(output)) == ITERATIONS - 1
    assert list((output / "checkpoints").iterdir())
    assert f"--- job {job.name} is COMPLETED" in printed
    assert "Training" in printed  # the log was followed


def test_a_submission_leaves_script_config_record_and_a_log_per_task(undisturbed):
    output, _ = undisturbed
    job = next((output / "slurm").iterdir())
    assert {path.name for path in job.iterdir()} == {
        "submit.sh", "config.yaml", "submission.json", "batch.log", "task_0.log", "task_1.log",
    }  # fmt: skip
    assert OmegaConf.load(job / "config.yaml").crops.global_crops_size == 28
    record = json.loads((job / "submission.json").read_text())
    assert record["job_id"] == job.name
    assert record["command"][-4:] == ["hard", "--ngpus", "2", "--wait"]


def test_two_tasks_are_two_ranks_of_one_group(undisturbed):
    output, printed = undisturbed
    assert "effective batch of 8" in printed  # of two processes with four images each
    assert len(list(output.glob("checkpoints/*/*.distcp"))) == 2  # a shard of each


def test_two_nodes_train_together(slurm, tiny, tmp_path, undisturbed):
    options = ["--partition", "hard", "--nodes", "2", "--ngpus", "1", "--wait"]
    assert main(["--config-file", str(tiny), "--output-dir", str(tmp_path / "%j"), *options]) == 0
    output = next(tmp_path.iterdir())
    assert output.name == next((output / "slurm").iterdir()).name  # %j
    assert "on n[1-2], start 1" in next(output.glob("slurm/*/batch.log")).read_text()
    assert losses(output) == pytest.approx(losses(undisturbed[0]), rel=1e-4)


def test_a_requeued_job_resumes_and_ends_with_the_losses_of_an_undisturbed_one(
    slurm, tiny, tmp_path, capsys, undisturbed
):
    output = tmp_path / "run"
    # SLURM kills what it requeues after KillWait (5 s here): the last regular checkpoint has to do.
    job = submit(capsys, tiny, output, "--partition", "hard", "--no-resume", "checkpoint.period_iterations=4")
    slurm.wait("a checkpoint", lambda: list(output.glob("checkpoints/*/checkpoint.json")))
    subprocess.run(["scontrol", "requeue", job], check=True)
    slurm.wait_for_state(job, "COMPLETED")
    assert_resumed(output, undisturbed[0])


def test_at_its_time_limit_a_job_saves_and_goes_on(slurm, tiny, tmp_path, capsys, undisturbed):
    output = tmp_path / "run"
    job = submit(capsys, tiny, output, "--partition", "hard", "--timeout", "30", "--signal-delay", "600")
    slurm.wait("the first steps", has_begun(output))
    slurm.pause(job)
    subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=5"], check=True)  # the signal is overdue
    time.sleep(35)  # SLURM looks every 30 s
    slurm.go_on(job)
    slurm.wait("the job to be back in the queue", lambda: slurm.field(job, "Restarts") == "1")
    subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=30"], check=True)
    slurm.wait_for_state(job, "COMPLETED")
    assert "back to the queue" in (output / "slurm" / job / "batch.log").read_text()
    assert_resumed(output, undisturbed[0])


def test_a_preempted_job_makes_room_and_goes_on(slurm, tiny, tmp_path, capsys, undisturbed):
    output = tmp_path / "run"
    job = submit(capsys, tiny, output, "--partition", "preempt")
    slurm.wait("the first steps", has_begun(output))
    slurm.pause(job)
    urgent = ["sbatch", "--parsable", "--partition=hard", "--nodes=2", "--gpus-per-node=2", "--output=/dev/null"]
    urgent_job = subprocess.check_output([*urgent, "--wrap=true"], text=True).strip()
    time.sleep(3)
    slurm.go_on(job)
    slurm.wait_for_state(urgent_job, "COMPLETED")
    slurm.wait_for_state(job, "COMPLETED")
    assert "back to the queue" in (output / "slurm" / job / "batch.log").read_text()
    assert_resumed(output, undisturbed[0])


def test_a_job_that_fails_stays_failed_and_hands_on_its_exit_code(slurm, tiny, tmp_path, capsys):
    weights = tmp_path / "weights.pth"
    torch.save({"nothing": torch.zeros(1)}, weights)
    options = ["--partition", "hard", "--wait", f"student.pretrained_weights={weights}"]
    assert main(["--config-file", str(tiny), "--output-dir", str(tmp_path / "run"), "--ngpus", "2", *options]) == 2
    job = next((tmp_path / "run" / "slurm").iterdir()).name
    assert slurm.field(job, "JobState") == "FAILED"
    assert slurm.field(job, "Restarts") == "0"


def test_a_cancelled_job_stays_cancelled(slurm, tiny, tmp_path, capsys):
    output = tmp_path / "run"
    job = submit(capsys, tiny, output, "--partition", "hard")
    slurm.wait("the first steps", has_begun(output))
    subprocess.run(["scancel", job], check=True)
    slurm.wait_for_state(job, "CANCELLED")
    slurm.wait("its processes to end", lambda: not subprocess.check_output(["squeue", "--noheader", "--jobs", job]))
    assert slurm.field(job, "JobState") == "CANCELLED"
    assert slurm.field(job, "Restarts") == "0"


def test_a_sweep_is_a_job_array_with_a_folder_per_value(slurm, tiny, tmp_path, capsys):
    options = ["--ngpus", "1", "--partition", "hard", "--sweep", "optim.base_lr=1e-4,2e-4", "--wait", "optim.epochs=1"]
    options += ["train.OFFICIAL_EPOCH_LENGTH=2"]
    assert main(["--config-file", str(tiny), "--output-dir", str(tmp_path / "sweep"), *options]) == 0
    for name, lr in (("0_optim.base_lr=1e-4", 1e-4), ("1_optim.base_lr=2e-4", 2e-4)):
        output = tmp_path / "sweep" / name
        assert max(losses(output)) == 1
        assert OmegaConf.load(output / "config.yaml").optim.base_lr == lr
    assert "1_optim.base_lr=2e-4: " in capsys.readouterr().out
