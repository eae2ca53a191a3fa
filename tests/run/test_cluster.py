import pytest

from dinov2.utils import cluster
from dinov2.utils.cluster import (
    Node,
    Partition,
    get_slurm_executor_parameters,
    parse_gres_gpus,
    parse_sinfo,
    parse_time,
)


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", 0),
        ("gpu:2", 2),
        ("gpu:a100:4(S:0-1)", 4),
        ("gpu:a100:2(S:0),gpu:v100:2(S:1)", 4),
        ("tmp:1T,gpu:nvidia_h100_80gb_hbm3:8", 8),
        ("gpu_mem:80", 0),
    ],
)
def test_gpus_are_counted_in_every_notation_of_slurm(gres, gpus):
    assert parse_gres_gpus(gres) == gpus


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("1:30", 2),
        ("2:00:00", 120),
        ("1-0", 1440),
        ("1-12:30", 2190),
        ("7-00:00:00", 10080),
        ("infinite", None),
    ],
)
def test_a_slurm_time_is_read_as_minutes_rounded_up(text, minutes):
    assert parse_time(text) == minutes


def test_a_time_that_slurm_does_not_know_is_refused():
    with pytest.raises(ValueError, match="'2h' is not a SLURM time"):
        parse_time("2h")


def test_the_nodes_of_a_partition_come_from_one_line_each():
    text = "hard*|n1|gpu:2|16|1-00:00:00\nhard*|n2|(null)|32+|1-00:00:00\nlong|n1|gpu:2|16|infinite\n"
    assert parse_sinfo(text) == {
        "hard": Partition("hard", (Node("n1", 2, 16), Node("n2", 0, 32)), 1440, default=True),
        "long": Partition("long", (Node("n1", 2, 16),), None),
    }


def test_without_sinfo_nothing_is_known_of_the_partitions(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert cluster.query_partitions() is None
    assert cluster.get_cluster_type() is cluster.ClusterType.LOCAL


def test_the_default_partition_is_the_one_that_slurm_itself_reads(monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "hard")
    assert cluster.get_slurm_partition() == "hard"
    monkeypatch.delenv("SBATCH_PARTITION")
    assert cluster.get_slurm_partition() is None


def test_one_task_is_asked_for_per_gpu_and_one_per_node_without_any():
    with_gpus = get_slurm_executor_parameters(nodes=2, num_gpus_per_node=4, mem_per_gpu="30G", timeout_min=60, qos=None)
    assert with_gpus == {
        "nodes": 2, "tasks_per_node": 4, "gpus_per_node": 4, "mem_per_gpu": "30G", "timeout_min": 60,
    }  # fmt: skip
    assert get_slurm_executor_parameters(nodes=2, num_gpus_per_node=0) == {"nodes": 2, "tasks_per_node": 1}
