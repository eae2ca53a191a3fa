import os

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.loaders import (
    SamplerType,
    make_custom_dataset,
    make_data_loader,
    make_dataset,
    make_eval_dataset,
    make_labelled_dataset,
    resolve_num_workers,
    usable_cpus,
)


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 11

    def __getitem__(self, index):
        return index


def loader(**options):
    return make_data_loader(dataset=Numbers(), batch_size=4, num_workers=0, **options)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "cells" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "cells" / name / f"{i}.png")
    return tmp_path / "cells"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))


def test_one_plain_pass_keeps_the_order_and_the_last_batch():
    batches = [batch.tolist() for batch in loader(sampler_type=None, shuffle=False, drop_last=False)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_an_epoch_may_be_shorter_than_the_data():
    batches = loader(sampler_type=SamplerType.EPOCH, sampler_size=9, shuffle=False, drop_last=False)
    assert [len(batch) for batch in batches] == [4, 4, 1]


@pytest.mark.parametrize("kind", [SamplerType.INFINITE, SamplerType.SHARDED_INFINITE, SamplerType.SHARDED_INFINITE_NEW])
def test_an_infinite_loader_can_be_advanced(kind):
    def first(count, **options):
        batches = iter(loader(sampler_type=kind, seed=2, **options))
        return [index for _ in range(count) for index in next(batches).tolist()]

    assert first(2, sampler_advance=8) == first(4)[8:]


def test_the_distributed_sampler_works_on_one_process():
    seen = [i for batch in loader(sampler_type=SamplerType.DISTRIBUTED, drop_last=False) for i in batch.tolist()]
    assert sorted(seen) == list(range(11))


@pytest.mark.parametrize(
    "options",
    [
        {"sampler_type": SamplerType.INFINITE, "sampler_size": 3},
        {"sampler_type": SamplerType.SHARDED_INFINITE, "sampler_size": 3},
        {"sampler_type": SamplerType.EPOCH, "sampler_advance": 3},
        {"sampler_type": SamplerType.DISTRIBUTED, "sampler_advance": 3},
    ],
)
def test_an_option_that_the_sampler_does_not_have_is_refused(options):
    with pytest.raises(ValueError, match="is only for"):
        loader(**options)


def test_an_unknown_dataset_string_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="ImageNet22k"):
        make_dataset(dataset_str="NoSuchDataset:split=TRAIN")


def test_datasets_are_made_from_folders(folder):
    assert len(make_custom_dataset(folder)) == 8
    assert make_dataset(dataset_str=f"ImageDataset:root={folder}")[0].size == (50, 40)
    picture, label = make_labelled_dataset(folder)[7]
    assert picture.size == (50, 40)
    assert label == 1
    assert make_eval_dataset(folder, 64)[0][0].shape == (3, 64, 64)


def test_no_more_workers_than_cpus_and_never_fewer_than_asked_for_without_need():
    cpus = len(os.sched_getaffinity(0))
    assert resolve_num_workers("auto", 1) <= cpus
    assert resolve_num_workers(0, 1) == 0
    assert resolve_num_workers(10_000, 1) <= cpus
    with pytest.raises(ValueError, match="or auto"):
        resolve_num_workers(-1, 1)


def control_groups(root, membership, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def many_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


@pytest.mark.usefixtures("many_cpus")
@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000\n"}, 64),
        ("0::/", {"cpu.max": "350000 100000\n"}, 3),
        ("0::/job/step", {"job/cpu.max": "800000 100000", "job/step/cpu.max": "max 100000"}, 8),
        (
            "3:memory:/x\n4:cpu,cpuacct:/x",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "600000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            6,
        ),
        (
            "4:cpu,cpuacct:/x",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "-1", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            64,
        ),
        ("", {}, 64),
    ],
)
def test_a_container_quota_limits_the_cpus(tmp_path, membership, files, expected):
    assert usable_cpus(1, {}, control_groups(tmp_path, membership, files)) == expected


@pytest.mark.usefixtures("many_cpus")
@pytest.mark.parametrize(
    ("local_world_size", "environ", "expected"),
    [
        (4, {}, 16),
        (1, {"SLURM_CPUS_PER_TASK": "6"}, 6),
        (4, {"SLURM_CPUS_PER_TASK": "6", "SLURM_TASKS_PER_NODE": "4(x2)"}, 6),  # one task per process
        (4, {"SLURM_CPUS_PER_TASK": "8", "SLURM_TASKS_PER_NODE": "1"}, 2),  # one task, torchrun inside it
        (100, {}, 1),
    ],
)
def test_processes_of_a_node_share_its_cpus(tmp_path, local_world_size, environ, expected):
    assert usable_cpus(local_world_size, environ, tmp_path) == expected
