"""The whole command on real (drawn) cells: what it leaves, how it goes on, how it stops."""

import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny_runs import arguments, losses_of

import dinov2
from dinov2.configs import dinov2_default_config
from dinov2.data.multicrop import TooManyUnreadable
from dinov2.fsdp import CheckpointError
from dinov2.train import train as module
from dinov2.train.health import read_history
from dinov2.train.resume import ResumeError
from dinov2.train.schedules import build_schedulers
from dinov2.train.train import EXIT_INTERRUPTED, EXIT_NOT_FINITE, main
from dinov2.train.watch import NonFiniteLossError, StepWatch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quiet_again():
    """The command sets up the process's logging; leave it as it was."""
    logger = logging.getLogger("dinov2")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = handlers, level, propagate


@pytest.fixture(scope="module")
def finished(cell_folder, tmp_path_factory):
    """A run of eight iterations, with labelled folders and held-out images."""
    output_dir = tmp_path_factory.mktemp("run")
    code = main(
        arguments(
            cell_folder,
            output_dir,
            **{
                "train.path_preserved": cell_folder,
                "train.frac": 0.25,
                "evaluation.fit_dataset_path": cell_folder,
                "evaluation.eval_dataset_path": cell_folder,
            },
        )
    )
    assert code == 0
    return output_dir


def test_a_run_leaves_its_settings_losses_scores_weights_and_held_out_list(finished):
    losses = losses_of(finished)
    assert sorted(losses) == list(range(8))
    assert all(loss == loss for loss in losses.values())
    scores = [json.loads(line) for line in (finished / "eval_metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in scores] == [0, 4, 8]
    assert {"knn_1_accuracy", "knn_20_macro_f1", "linear_balanced_accuracy", "rankme"} <= set(scores[0])
    held_out = [line for line in (finished / "held_out_images.txt").read_text().splitlines() if line[0] != "#"]
    assert len(held_out) == 8
    assert OmegaConf.load(finished / "config.yaml").student.arch == "vit_tiny"
    assert list((finished / "tensorboard").iterdir())
    assert sorted(p.name for p in (finished / "checkpoints").glob("model_*")) == ["model_0000005", "model_0000007"]


def test_the_weights_load_with_one_line_and_are_the_teachers(finished):
    folder = finished / "eval" / "training_8"
    whole = torch.load(folder / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    for name in ("teacher_backbone.pth", "teacher_backbone.safetensors"):
        model = dinov2.load(folder / name)
        assert torch.equal(model.pos_embed, whole["backbone.pos_embed"])
        assert model.patch_size == 14
        assert model(torch.zeros(1, 3, 28, 28)).shape == (1, 192)


def test_a_finished_run_started_again_does_nothing_more(finished, cell_folder):
    before = (finished / "training_metrics.json").read_text()
    extra = {
        "train.path_preserved": cell_folder,
        "train.frac": 0.25,
        "evaluation.fit_dataset_path": cell_folder,
        "evaluation.eval_dataset_path": cell_folder,
    }
    assert main(arguments(cell_folder, finished, **extra)) == 0
    assert (finished / "training_metrics.json").read_text() == before
    assert main(arguments(cell_folder, finished, "--eval-only", **extra)) == 0
    assert [row["iteration"] for row in read_history(finished)] == [0, 4, 8]


def test_a_changed_setting_is_refused_and_shown(finished, cell_folder):
    changes = {"train.path_preserved": cell_folder, "train.frac": 0.25, "optim.base_lr": 0.5}
    settings = (finished / "config.yaml").read_text()
    with pytest.raises(ResumeError, match=r"optim\.base_lr: 0\.004 -> 0\.5"):
        main(arguments(cell_folder, finished, **changes))
    assert (finished / "config.yaml").read_text() == settings


def test_a_run_stopped_in_the_middle_goes_on_to_the_same_losses(cell_folder, tmp_path, monkeypatch):
    assert main(arguments(cell_folder, tmp_path / "straight")) == 0

    save = module.save

    def save_then_stop(identity, checkpointer, model, done):
        save(identity, checkpointer, model, done)
        if done == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, "save", save_then_stop)
    assert main(arguments(cell_folder, tmp_path / "stopped")) == EXIT_INTERRUPTED
    monkeypatch.undo()
    assert max(losses_of(tmp_path / "stopped")) < 7
    assert main(arguments(cell_folder, tmp_path / "stopped")) == 0
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "straight")
    assert read_history(tmp_path / "stopped") == read_history(tmp_path / "straight")  # also the one due when it stopped
    ends = [dinov2.load(tmp_path / run / "eval/training_8/teacher_backbone.pth") for run in ("straight", "stopped")]
    for a, b in zip(ends[0].parameters(), ends[1].parameters()):
        assert torch.equal(a, b)


def test_a_loss_that_is_not_finite_twice_stops_the_run_and_keeps_the_last_good_checkpoint(
    cell_folder, tmp_path, monkeypatch, caplog
):
    forward_backward = module.SSLMetaArch.forward_backward
    calls = []

    def poisoned(self, *args, **kwargs):
        calls.append(1)
        losses = forward_backward(self, *args, **kwargs)
        return {**losses, "ibot_loss": losses["ibot_loss"] * (float("nan") if len(calls) > 5 else 1)}

    monkeypatch.setattr(module.SSLMetaArch, "forward_backward", poisoned)
    with caplog.at_level("WARNING"):
        logging.getLogger("dinov2").propagate = True
        code = main(arguments(cell_folder, tmp_path))
    assert code == EXIT_NOT_FINITE
    assert len(calls) == 7
    log = (tmp_path / "logs" / "log.txt").read_text()
    assert "rank 0: ibot_loss=nan" in log
    assert "last at iteration 6" in log
    assert (tmp_path / "checkpoints" / "last_checkpoint").read_text() == "model_0000005"


def test_one_bad_step_is_forgiven():
    watch = StepWatch(torch.device("cpu"))
    bad, good = {"loss": torch.tensor(float("inf"))}, {"loss": torch.tensor(1.0)}
    for losses in (bad, good, bad, good):
        watch.observe(0, losses, stop=False)
    watch.observe(4, bad, stop=False)
    with pytest.raises(NonFiniteLossError, match="iteration 5"):
        watch.observe(5, bad, stop=False)


def test_no_resume_starts_anew_and_keeps_the_old_checkpoints_aside(cell_folder, tmp_path):
    short = {"optim.epochs": 1, "optim.warmup_epochs": 0, "evaluation.eval_period_iterations": 0}
    assert main(arguments(cell_folder, tmp_path, **short)) == 0
    assert main(arguments(cell_folder, tmp_path, "--no-resume", **short)) == 0
    assert (tmp_path / "checkpoints.1" / "model_0000003").is_dir()
    assert sorted(losses_of(tmp_path / "logs_before.1")) == [0, 1, 2, 3]
    assert len((tmp_path / "training_metrics.json").read_text().splitlines()) == 4


def test_a_run_in_which_too_many_images_cannot_be_read_saves_and_says_so(cell_folder, tmp_path):
    cells = shutil.copytree(cell_folder, tmp_path / "cells")
    for path in sorted(path for path in cells.rglob("*") if path.is_file())[::2]:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TooManyUnreadable, match=r"max_unreadable_share=0.01 allows(.*\n)*.*all is saved"):
        main(arguments(cells, tmp_path / "run"))
    assert list((tmp_path / "run" / "checkpoints").glob("model_*"))


def test_images_that_changed_since_the_checkpoint_are_told(cell_folder, tmp_path):
    cells = shutil.copytree(cell_folder, tmp_path / "cells")
    short = {"optim.epochs": 1, "optim.warmup_epochs": 0, "evaluation.eval_period_iterations": 0}
    assert main(arguments(cells, tmp_path / "run", **short)) == 0
    some = next(path for path in cells.rglob("*") if path.is_file())
    some.with_stem("another").write_bytes(some.read_bytes())
    assert main(arguments(cells, tmp_path / "run", **short)) == 0
    log = (tmp_path / "run" / "logs" / "log.txt").read_text()
    assert re.search(r"changed since the checkpoint: training images: (\d+) -> (\d+)", log)


def test_a_profile_traces_the_steps_after_the_first_ones_and_changes_no_loss(finished, cell_folder, tmp_path):
    changes = {"train.path_preserved": cell_folder, "train.frac": 0.25, "evaluation.eval_period_iterations": 0}
    assert main(arguments(cell_folder, tmp_path, "--profile", **changes, **{"train.profile_steps": 2})) == 0
    (trace,) = (tmp_path / "profile").glob("*.pt.trace.json")
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert "aten::addmm" in names
    assert losses_of(tmp_path) == losses_of(finished)


def test_a_profile_is_of_one_start_and_tells_the_steps_that_it_has(cell_folder, tmp_path):
    changes = {"train.log_period": 4, "evaluation.eval_period_iterations": 0}
    assert main(arguments(cell_folder, tmp_path, "--profile", **changes)) == 0
    assert "wrote the trace of 3 steps" in (tmp_path / "logs" / "log.txt").read_text()  # of 8, the first 5 pass
    assert OmegaConf.load(tmp_path / "config.yaml").train.profile_steps == 0


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_activation_checkpointing_changes_no_loss(cell_folder, tmp_path, checkpointing):
    short = {"optim.epochs": 1, "optim.warmup_epochs": 0, "evaluation.eval_period_iterations": 0}
    assert main(arguments(cell_folder, tmp_path / "plain", **short)) == 0
    changes = {**short, "train.activation_checkpointing": checkpointing}
    assert main(arguments(cell_folder, tmp_path / "less", **changes)) == 0
    assert losses_of(tmp_path / "plain") == pytest.approx(losses_of(tmp_path / "less"), rel=1e-5)


@pytest.fixture
def small_files_only():
    """What a full disk is to large files: a write past 1 MiB fails, smaller ones do not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_weights_that_cannot_be_written_end_a_run_only_if_they_are_the_last(
    cell_folder, tmp_path, caplog, small_files_only
):
    short = {"optim.epochs": 1, "optim.warmup_epochs": 0, "evaluation.eval_period_iterations": 2}
    with caplog.at_level("ERROR"), pytest.raises(CheckpointError, match="the last checkpoint could not be written"):
        main(arguments(cell_folder, tmp_path, **short))
    assert "model_0000001 was NOT saved" in caplog.text
    for name in ("training_2", "training_4"):
        assert re.search(rf"could not be written to \S*{name} \(\d+ MiB free", caplog.text)
    assert sorted(losses_of(tmp_path)) == [0, 1, 2, 3]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".partial", ".tmp", ".pth", ".safetensors")]


def test_the_schedules_start_warm_and_end_as_configured():
    cfg = OmegaConf.merge(dinov2_default_config, {"optim": {"lr": 1.0}})
    schedules = build_schedulers(cfg)
    total = 100 * 1250
    assert schedules.at(0).lr == 0
    assert schedules.at(10 * 1250).lr == pytest.approx(1.0)
    assert schedules.at(total - 1).lr == pytest.approx(1e-6, abs=1e-8)
    assert schedules.at(0).last_layer_lr == schedules.at(1249).last_layer_lr == 0
    assert schedules.at(1250).last_layer_lr == schedules.at(1250).lr
    assert schedules.at(0).teacher_temp == pytest.approx(0.04)
    assert schedules.at(30 * 1250).teacher_temp == schedules.at(total + 5).teacher_temp == pytest.approx(0.07)


def test_torchrun_trains_two_processes_and_scores_their_checkpoint(cell_folder, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    short = {"optim.epochs": 1, "optim.warmup_epochs": 0}
    changes = {**short, "evaluation.fit_dataset_path": cell_folder, "evaluation.eval_dataset_path": cell_folder}
    for options in ([], ["--eval-only"]):
        command = [*torchrun, "dinov2/train/train.py", *arguments(cell_folder, tmp_path, *options, **changes)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(losses_of(tmp_path)) == [0, 1, 2, 3]
    assert len(list(tmp_path.glob("checkpoints/model_0000003/*.distcp"))) == 2
    rows = [json.loads(line) for line in (tmp_path / "eval_metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 4, 4]
    assert rows[1] == pytest.approx(rows[2])


@pytest.mark.slow
def test_a_run_killed_twenty_times_at_any_moment_ends_as_one_never_interrupted(cell_folder, tmp_path):
    """SIGKILL at random times, also while a checkpoint is being written; bit-identical losses and weights."""
    changes = {"optim.epochs": 30, "evaluation.eval_period_iterations": 0, "checkpoint.period_iterations": 3}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(run):
        command = [sys.executable, "-m", "dinov2.train.train", *arguments(cell_folder, tmp_path / run, **changes)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start("straight").wait(600) == 0
    generator = torch.Generator().manual_seed(0)
    kills = 0
    while True:
        process = start("killed")
        metrics = tmp_path / "killed" / "training_metrics.json"
        size = metrics.stat().st_size if metrics.exists() else 0
        while kills < 20 and process.poll() is None:  # let it get into its steps, then kill it at a random moment
            if metrics.exists() and metrics.stat().st_size > size:
                time.sleep(float(torch.rand(1, generator=generator)) * 0.4)
                process.kill()
                kills += 1
                break
            time.sleep(0.01)
        if process.wait(600) == 0:
            break
    assert kills == 20
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "straight")
    ends = [tmp_path / run / "checkpoints" / "model_0000119" for run in ("straight", "killed")]
    checkpoints = [{f.name: f.read_bytes() for f in sorted(end.glob("*.distcp"))} for end in ends]
    assert checkpoints[0] == checkpoints[1]
