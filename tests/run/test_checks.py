import pytest

from dinov2.run import checks
from dinov2.utils.cluster import Node, Partition

PARTITIONS = {
    "hard": Partition("hard", (Node("n1", 2, 16), Node("n2", 4, 64)), 1440),
    "cpu": Partition("cpu", (Node("c1", 0, 32),), None),
}


def problems(partition="hard", *, nodes=1, gpus=1, cpus_per_task=None):
    return list(checks.resource_problems(PARTITIONS, partition, nodes=nodes, gpus=gpus, cpus_per_task=cpus_per_task))


def test_a_job_that_fits_has_no_problems():
    assert problems(nodes=2, gpus=2, cpus_per_task=8) == []
    assert problems(None, gpus=4) == []


def test_an_unknown_partition_is_named_with_its_nearest_neighbour_and_all_there_are():
    assert problems("hrad") == [
        "--partition hrad: no such partition on this cluster; did you mean hard? it has cpu, hard"
    ]


def test_more_gpus_than_any_node_has_come_with_the_nodes_that_would_do():
    assert problems(gpus=8) == [
        "--ngpus 8: no node of partition hard has more than 4 GPUs; --ngpus 4 --nodes 2 gives 8"
    ]
    assert problems("cpu", gpus=1) == [
        "--ngpus 1: no node of partition cpu has more than 0 GPUs; --ngpus 0 runs on CPUs"
    ]


def test_more_nodes_than_the_partition_has_with_so_many_gpus_are_refused():
    assert problems(nodes=2, gpus=4) == ["--nodes 2: partition hard has only 1 node(s) with 4 GPUs"]


def test_more_cpus_than_a_node_has_come_with_the_number_that_would_do():
    assert problems(gpus=4, cpus_per_task=20) == [
        "--cpus-per-task 20: 4 process(es) of a node need 80 CPUs, and no node of partition hard has more than 64; "
        "at most 16 each"
    ]


def test_each_process_gets_the_cpus_of_its_gpu_on_the_poorest_node():
    assert checks.shared_cpus(PARTITIONS, "hard", 2) == 8
    assert checks.shared_cpus(PARTITIONS, "hard", 4) == 16
    assert checks.shared_cpus(PARTITIONS, "cpu", 0) == 32
    assert checks.shared_cpus({}, "hard", 2) is None


def test_the_longest_limit_of_several_partitions_counts():
    assert checks.time_limit(PARTITIONS, "hard") == 1440
    assert checks.time_limit(PARTITIONS, "hard,cpu") is None
    assert checks.time_limit(PARTITIONS, None) is None


def test_a_folder_that_does_not_exist_yet_is_writable_where_its_parent_is(tmp_path):
    assert checks.folder_problem(tmp_path / "a" / "b") is None
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_below_a_file_or_in_the_kernel_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write there: Not a directory" in checks.folder_problem(tmp_path / "file")
    assert checks.folder_problem(checks.Path("/proc/none/here")).startswith(
        "--output-dir /proc/none/here: cannot write"
    )


def test_a_missing_path_is_named_with_the_part_of_it_that_exists(tmp_path):
    paths = {f"{tmp_path}/no/such": "--train-dataset", str(tmp_path): "--val-dataset"}
    assert list(checks.missing_paths(paths)) == [
        f"--train-dataset: {tmp_path}/no/such is not there (of its path only {tmp_path} is)"
    ]


def test_a_path_on_a_disk_of_this_machine_is_warned_of_where_other_machines_run_the_job(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "_mounts", lambda: [(str(tmp_path / "shared"), "nfs4"), ("/", "ext4")])
    paths = [tmp_path / "own", tmp_path / "shared" / "cells"]
    assert list(checks.locality_warnings(map(str, paths), ["n2", "n1"])) == [
        f"{tmp_path}/own is on a disk of this machine (ext4): make sure that n1 ... n2 see it under the same path"
    ]
    assert list(checks.locality_warnings(map(str, paths), [checks.socket.gethostname()])) == []


@pytest.mark.parametrize("partition", ["hard,nope", "nope,hard"])
def test_every_one_of_several_partitions_must_exist(partition):
    assert len(problems(partition)) == 1
