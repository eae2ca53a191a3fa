import pytest

from dinov2.distributed import _parse_slurm_node_list, detect, enable

TORCHRUN = {
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29501",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
}
SLURM = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "gpu[07-08],big1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}


def test_no_launcher_means_one_process():
    alone = detect({"PATH": "/bin"})
    assert (alone.launcher, alone.rank, alone.world_size, alone.local_rank, alone.local_world_size) == (
        "single",
        0,
        1,
        0,
        1,
    )


def test_torchrun_variables_are_read():
    here = detect(TORCHRUN)
    assert here.launcher == "torchrun"
    assert (here.rank, here.world_size, here.local_rank, here.local_world_size) == (5, 8, 1, 4)
    assert (here.master_addr, here.master_port) == ("10.0.0.1", 29501)


def test_torchrun_inside_a_slurm_job_wins():
    assert detect(SLURM | TORCHRUN).launcher == "torchrun"


def test_a_slurm_step_is_read_and_the_first_host_is_the_meeting_point():
    here = detect(SLURM)
    assert here.launcher == "slurm"
    assert (here.rank, here.world_size, here.local_rank, here.local_world_size) == (4, 5, 0, 1)
    assert here.master_addr == "gpu07"


def test_all_ranks_of_a_slurm_step_derive_the_same_port_and_another_job_another_one():
    ports = {detect(SLURM | {"SLURM_PROCID": str(rank)}).master_port for rank in range(5)}
    assert len(ports) == 1
    assert ports != {detect(SLURM | {"SLURM_JOB_ID": "124"}).master_port}
    assert 1024 < ports.pop() < 32768  # below the range that Linux hands out by itself


def test_a_given_meeting_point_is_respected_under_slurm():
    here = detect(SLURM | {"MASTER_ADDR": "login", "MASTER_PORT": "4444"})
    assert (here.master_addr, here.master_port) == ("login", 4444)


def test_a_batch_script_or_salloc_shell_is_one_process_whatever_the_job_reserved():
    script = {"SLURM_JOB_ID": "9", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert detect(script).world_size == 1


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        (TORCHRUN | {"RANK": "8"}, "contradict"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu[1-"}, "gpu"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2x3"}, "2x3"),
    ],
)
def test_broken_variables_are_named(variables, word):
    with pytest.raises(ValueError, match=word):
        detect(variables)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("host7", ["host7"]),
        ("a1,b2", ["a1", "b2"]),
        ("node[1-3,5]", ["node1", "node2", "node3", "node5"]),
        ("n[008-011]", ["n008", "n009", "n010", "n011"]),
        ("a1,b[2-3],c-d4", ["a1", "b2", "b3", "c-d4"]),
        ("a[1-2],b[7]", ["a1", "a2", "b7"]),
        ("rack[1-2]n[01-02].lan", ["rack1n01.lan", "rack1n02.lan", "rack2n01.lan", "rack2n02.lan"]),
    ],
)
def test_slurm_host_lists_expand(text, hosts):
    assert _parse_slurm_node_list(text) == hosts


def test_an_empty_slurm_host_list_is_refused():
    with pytest.raises(ValueError, match="no host"):
        _parse_slurm_node_list("")


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"device cuda: .* sees no GPU here; use cpu or auto"):
        enable(device="cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match="device cuda:7: this machine shows 2"):
        enable(device="cuda:7")


def test_processes_cannot_be_sent_to_one_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="device cuda:1: 8 processes cannot share one GPU; with cuda"):
        enable(device="cuda:1")
