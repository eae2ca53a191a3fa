"""Real processes under torchrun, on the CPU with gloo: what they compute together is what one computes alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_ranks

HELPERS = Path(__file__).parents[1] / "helpers"
ROOT = Path(__file__).parents[2]


def train(out, processes, *args):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(HELPERS)])}
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(HELPERS / "train_worker.py"), str(out), *map(str, args)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(out.read_text())


def assert_same_run(one, other, rel=2e-3):
    assert len(one["losses"]) == len(other["losses"])
    for a, b in zip(one["losses"], other["losses"]):
        assert a == pytest.approx(b, rel=rel, abs=1e-4)
    assert one["weights"] == pytest.approx(other["weights"], rel=rel, abs=1e-2)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_two_processes_compute_what_one_does_with_the_double_batch(tmp_path, centering):
    alone = train(tmp_path / "one.json", 1, 3, "NO_SHARD", centering)
    together = train(tmp_path / "two.json", 2, 3, "SHARD_GRAD_OP", centering)
    assert_same_run(alone, together)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["NO_SHARD", "FULL_SHARD", "HYBRID_SHARD"])
def test_every_sharding_strategy_computes_the_same(tmp_path, strategy):
    alone = train(tmp_path / "one.json", 1, 3, "NO_SHARD", "sinkhorn_knopp")
    assert_same_run(alone, train(tmp_path / "two.json", 2, 3, strategy, "sinkhorn_knopp"))


@pytest.mark.slow
def test_a_run_goes_on_with_two_one_and_two_processes_sharded_or_not(tmp_path):
    straight = train(tmp_path / "straight.json", 1, 6, "NO_SHARD", "centering")
    folder = tmp_path / "checkpoints"
    parts = [
        train(tmp_path / "a.json", 2, 2, "FULL_SHARD", "centering", folder),
        train(tmp_path / "b.json", 1, 4, "NO_SHARD", "centering", folder),
        train(tmp_path / "c.json", 2, 6, "NO_SHARD", "centering", folder),
    ]
    assert [part["start"] for part in parts] == [0, 2, 4]
    joined = {"losses": [loss for part in parts for loss in part["losses"]], "weights": parts[-1]["weights"]}
    assert_same_run(straight, joined)


def test_replicas_start_alike_and_drop_other_samples(tmp_path):
    body = """
from tiny_training import tiny_config
from dinov2.train.train import build_model
cfg = tiny_config(**{"train.device": "cpu", **{
    f"compute_precision.{role}.{part}.sharding_strategy": "NO_SHARD"
    for role in ("student", "teacher") for part in ("backbone", "dino_head", "ibot_head")}})
torch.manual_seed(cfg.train.seed + rank)  # as setup does
model = build_model(cfg)
answers["student"] = sum(float(p.double().abs().sum()) for p in model.student.parameters())
answers["next"] = float(torch.rand(()))
"""
    first, second = run_ranks(body, tmp_path)
    assert first["student"] == second["student"]
    assert first["next"] != second["next"]
