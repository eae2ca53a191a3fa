"""Trackers with the real libraries, offline: what arrives, and that a resumed run is the same run."""

import json
import math

import pytest

from dinov2 import distributed
from dinov2.logging import MetricLogger, build_trackers
from dinov2.logging.writers import NeverInTheWay

SETTINGS = {"train": {"seed": 3, "dataset_path": ["a", "b"]}, "optim": {"lr": 0.5}}


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def report(names, folder, iterations):
    metrics = MetricLogger(writers=build_trackers(names, folder, SETTINGS), window_size=1)
    for iteration in metrics.log_every(iterations, 1, n_iterations=iterations.stop, start_iteration=iterations.start):
        metrics.update(loss=float(iteration))
    metrics.log_scalars(iterations.stop, {"eval/rankme": 7.0, "eval/bad": math.nan})
    metrics.close()
    return json.loads((folder / "run_ids.json").read_text())


def test_mlflow_gets_settings_and_numbers_and_goes_on_in_the_same_run(tmp_path):
    tracking = pytest.importorskip("mlflow.tracking")
    first = report(["mlflow"], tmp_path, range(0, 2))
    assert report(["mlflow"], tmp_path, range(2, 4)) == first
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("dinov2").experiment_id])
    assert run.info.run_id == first["mlflow"]
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.seed": "3", "train.dataset_path": "['a', 'b']", "optim.lr": "0.5"}
    losses = client.get_metric_history(first["mlflow"], "loss")
    assert [(point.step, point.value) for point in losses] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert [point.step for point in client.get_metric_history(first["mlflow"], "eval/rankme")] == [2, 4]


def test_wandb_stays_offline_and_goes_on_in_the_same_run(tmp_path):
    pytest.importorskip("wandb")
    first = report(["wandb"], tmp_path, range(0, 2))
    assert report(["wandb"], tmp_path, range(2, 4)) == first
    stores = list((tmp_path / "wandb").glob(f"offline-run-*-{first['wandb']}/run-{first['wandb']}.wandb"))
    assert len(stores) == 2
    written = b"".join(store.read_bytes() for store in stores)
    assert b"eval/rankme" in written
    assert b"iteration" in written


def test_other_ranks_open_no_tracker(tmp_path, monkeypatch):
    monkeypatch.setattr("dinov2.logging.trackers.is_main_process", lambda: False)
    assert build_trackers(["wandb", "mlflow"], tmp_path, SETTINGS) == []
    assert list(tmp_path.iterdir()) == []


def test_without_a_tracker_nothing_is_written(tmp_path):
    assert distributed.is_main_process()
    assert build_trackers([], tmp_path, SETTINGS) == []
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_fails_is_told_once_and_costs_the_run_nothing(caplog):
    class Broken:
        calls = 0

        def write(self, iteration, scalars):
            self.calls += 1
            raise ConnectionError("no route to host")

        def close(self):
            raise AssertionError("left alone after its first failure")

    broken = Broken()
    writer = NeverInTheWay("mlflow", broken)
    writer.write(3, {"loss": 1.0})
    writer.write(4, {"loss": 1.0})
    writer.close()
    assert broken.calls == 1
    assert "mlflow takes no more numbers, from iteration 3 on: no route to host" in caplog.text
