"""A real SLURM with two nodes of two stand-in GPUs each."""

import getpass
import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from dinov2.run.follow import job_states

CLUSTER = Path(__file__).resolve().parents[3] / "shared" / "slurm" / "slurm-cluster.sh"
PATIENCE_S = 600  # for anything to happen, on a machine that has much else to do


def _free_port() -> int:
    """Return a value for --port whose ports (17 to 22 above it, for two nodes) are all free."""
    for first in range(27000, 32000, 40):
        try:
            for port in range(first + 17, first + 23):
                with socket.create_server(("127.0.0.1", port)):
                    pass
        except OSError:
            continue
        return first
    raise RuntimeError("no six free ports in a row")


@pytest.fixture(scope="session")
def cluster():
    """SLURM_CONF of a cluster that is up while the tests of this session run."""
    if not CLUSTER.exists():
        pytest.skip(f"no SLURM to try on: {CLUSTER} does not exist")
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        where = ["--dir", folder]
        try:
            up = [CLUSTER, "up", "--nodes", "2", "--gpus", "2", "--port", str(_free_port()), *where]
            subprocess.run(up, check=True, stdout=subprocess.DEVNULL)
            yield f"{folder}/slurm.conf"
        finally:
            subprocess.run([CLUSTER, "down", *where], check=True)


class Slurm:
    """What a user does on the cluster."""

    def pause(self, job_id: str) -> None:
        """Stop the processes where they are, so that a quick machine is not done before SLURM has decided."""
        subprocess.run(["scancel", "--signal=STOP", job_id], check=True)
        self.wait("the signal to arrive", lambda: self.field(job_id, "JobState") != "SIGNALING")
        assert self.field(job_id, "JobState") in ("RUNNING", "STOPPED"), f"job {job_id} ended before it could be paused"

    def go_on(self, job_id: str) -> None:
        subprocess.run(["scancel", "--signal=CONT", job_id], check=True)

    def field(self, job_id: str, name: str) -> str:
        text = subprocess.check_output(["scontrol", "show", "job", "--oneliner", job_id], text=True)
        return next(word.partition("=")[2] for word in text.split() if word.startswith(f"{name}="))

    def wait(self, what, until) -> None:
        """Wait until the function says yes; fail with what was waited for."""
        deadline = time.monotonic() + PATIENCE_S
        while not until():
            assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}"
            time.sleep(0.2)

    def wait_for_state(self, job_id: str, *states: str) -> None:
        self.wait(f"job {job_id} to be {states}", lambda: job_states(job_id)[job_id][0] in states)


@pytest.fixture
def slurm(cluster, monkeypatch):
    """The cluster as this test's own: no variables of another job, and no job left behind."""
    for name in os.environ:
        if name.startswith(("SLURM_", "SBATCH_")):  # of a job around the tests
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", cluster)
    yield Slurm()
    subprocess.run(["scancel", "--user", getpass.getuser()], check=True, env={**os.environ, "SLURM_CONF": cluster})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, cell_folder):
    """A configuration file of a training of seconds, 40 steps long."""
    head = {"head_n_prototypes": 64, "head_hidden_dim": 32, "head_bottleneck_dim": 16}
    sections = {
        "train": {
            "dataset_path": [str(cell_folder)],
            "batch_size_per_gpu": 4,
            "OFFICIAL_EPOCH_LENGTH": 40,
            "num_workers": 1,
            "log_period": 1,
            "device": "cpu",
        },
        "student": {"arch": "vit_tiny", "patch_size": 14, "drop_path_rate": 0.0},
        "dino": head,
        "ibot": head,
        "optim": {"epochs": 1, "warmup_epochs": 0, "freeze_last_layer_epochs": 0},
        "teacher": {"warmup_teacher_temp_epochs": 1},
        "crops": {"global_crops_size": 28, "local_crops_size": 14, "local_crops_number": 2},
        "evaluation": {"eval_period_iterations": 0},
    }
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path
