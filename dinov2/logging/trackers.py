"""Experiment trackers as destinations of a run's numbers: Weights & Biases and MLflow. Neither is needed otherwise.

Nothing leaves the machine unless asked: W&B is offline unless WANDB_MODE says otherwise, MLflow writes to a file in the
output folder unless MLFLOW_TRACKING_URI names a server, and the libraries' own reports to their makers are turned off.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinov2.distributed import is_main_process
from dinov2.logging.writers import MetricWriter, NeverInTheWay

logger = logging.getLogger("dinov2")

RUN_IDS = "run_ids.json"  # in the output folder: which run of each tracker goes on when this one does
MOST_MLFLOW_PARAMETERS = 100  # that one call may carry


def build_trackers(names: Sequence[str], output_dir: str | Path, settings: Mapping[str, Any]) -> list[MetricWriter]:
    """Open the trackers `names` ("wandb", "mlflow") for the run in a folder; none on other ranks than the main one.

    A run that goes on in the folder goes on in the same runs of the trackers, named in `run_ids.json`.

    Args:
        names: of the trackers.
        output_dir: of the run.
        settings: the run's configuration (sections of keys), kept with the run.
    """
    if not is_main_process():
        return []
    makers = {"wandb": WandbWriter, "mlflow": MlflowWriter}
    path = Path(output_dir) / RUN_IDS
    ids = json.loads(path.read_text()) if path.exists() else {}
    writers: list[MetricWriter] = []
    for name in names:
        try:
            writer = makers[name](output_dir, settings, ids.get(name))
        except Exception as error:
            if name not in ids:  # a run that starts says so at once; one that goes on does without
                raise
            logger.warning("%s is left out of this start of the run: %s", name, error)
            continue
        ids[name] = writer.run_id
        writers.append(NeverInTheWay(name, writer))
    if writers:
        path.write_text(json.dumps(ids))
    return writers


class WandbWriter:
    """One Weights & Biases run, in the project WANDB_PROJECT ("dinov2" if unset).

    Curves are drawn over `iteration`, so scores of a checkpoint may come before the losses of its last step.

    Args:
        output_dir: of the run; W&B's files go to `wandb/` in it.
        settings: the run's configuration.
        run_id: the run to go on with; None starts one.
    """

    def __init__(self, output_dir: str | Path, settings: Mapping[str, Any], run_id: str | None = None):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # an extra, and slow to import

        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dinov2"),
            name=os.environ.get("WANDB_NAME", Path(output_dir).name),
            id=run_id,
            resume="allow" if mode == "online" else None,  # offline each start is a part of its own
            dir=str(output_dir),
            mode=mode,
            config=dict(settings),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="iteration")
        self.run_id: str = self._run.id
        logger.info("W&B run %s (%s) in %s/wandb", self.run_id, mode, output_dir)

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Add one point to every curve."""
        self._run.log({"iteration": iteration, **scalars})

    def close(self) -> None:
        """Hand over what is held back and end the run."""
        self._run.finish()


class MlflowWriter:
    """One MLflow run, in the experiment MLFLOW_EXPERIMENT_NAME ("dinov2" if unset).

    Args:
        output_dir: of the run; the store is `mlflow.db` in it, unless MLFLOW_TRACKING_URI names another.
        settings: the run's configuration, kept as the parameters of a run that starts.
        run_id: the run to go on with; None starts one.
    """

    def __init__(self, output_dir: str | Path, settings: Mapping[str, Any], run_id: str | None = None):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Metric  # an extra, and slow to import
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        folder = Path(output_dir).resolve()
        store = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        self._client = MlflowClient(tracking_uri=store)
        if run_id is None:
            run_id = self._start(folder, settings)
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.run_id: str = run_id
        logger.info("MLflow run %s", run_id)

    def _start(self, folder: Path, settings: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "dinov2")
        known = self._client.get_experiment_by_name(name)
        run = self._client.create_run(
            known.experiment_id if known else self._client.create_experiment(name), run_name=folder.name
        )
        parameters = [
            Param(f"{section}.{key}", str(value)) for section, keys in settings.items() for key, value in keys.items()
        ]
        for first in range(0, len(parameters), MOST_MLFLOW_PARAMETERS):
            self._client.log_batch(run.info.run_id, params=parameters[first : first + MOST_MLFLOW_PARAMETERS])
        return run.info.run_id

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Add one point to every curve."""
        now = int(time.time() * 1000)
        points = [self._metric(name, float(value), now, iteration) for name, value in scalars.items()]
        self._client.log_batch(self.run_id, metrics=points)

    def close(self) -> None:
        """Mark the run as ended; one that goes on later is marked as running again."""
        self._client.set_terminated(self.run_id)
