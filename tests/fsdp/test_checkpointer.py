"""Checkpoints: whole or not there, and the newest good one is found whatever happened to the others."""

import json
import os

import pytest
import torch
from torch import nn

from dinov2.fsdp import CheckpointError, FSDPCheckpointer
from dinov2.fsdp import checkpointer as module


def make(folder, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer, FSDPCheckpointer(model, folder, optimizer=optimizer, **options)


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_restored_run_goes_on_bit_for_bit_with_its_random_numbers(tmp_path, asynchronous):
    model, optimizer, checkpointer = make(tmp_path, asynchronous=asynchronous)
    step(model, optimizer)
    checkpointer.save("model_0000000", iteration=1, note="first")
    expected = [step(model, optimizer) for _ in range(3)]
    checkpointer.wait()

    model, optimizer, checkpointer = make(tmp_path)
    torch.randn(17)
    extra = checkpointer.resume_or_load()
    assert (extra["iteration"], extra["note"]) == (1, "first")
    for weights in expected:
        assert torch.equal(step(model, optimizer), weights)


def test_nothing_to_resume_from_is_said_by_an_empty_answer(tmp_path):
    _, _, checkpointer = make(tmp_path)
    assert checkpointer.resume_or_load() == {}
    assert not checkpointer.has_checkpoint()


def test_the_last_ones_stay_and_every_kth_for_ever(tmp_path):
    _, _, checkpointer = make(tmp_path, keep_last=2, keep_every=4)
    for done in range(1, 11):
        checkpointer.save(f"model_{done - 1:07d}", iteration=done)
    kept = sorted(path.name for path in tmp_path.glob("model_*"))
    assert kept == ["model_0000003", "model_0000007", "model_0000008", "model_0000009"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000009"


def damage_truncated(path):
    shard = next(path.glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size // 2)


def damage_flipped(path):
    shard = next(path.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def damage_shard_gone(path):
    next(path.glob("*.distcp")).unlink()


def damage_index(path):
    (path / "checkpoint.json").write_text('{"files": ')


@pytest.mark.parametrize("damage", [damage_truncated, damage_flipped, damage_shard_gone, damage_index])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, caplog):
    _, _, checkpointer = make(tmp_path)
    for done in (1, 2):
        checkpointer.save(f"model_{done - 1:07d}", iteration=done)
    damage(tmp_path / "model_0000001")
    _, _, checkpointer = make(tmp_path)
    with caplog.at_level("WARNING", logger="dinov2"):
        assert checkpointer.resume_or_load()["iteration"] == 1
    assert "model_0000001" in caplog.text
    with pytest.raises(CheckpointError, match="model_0000001"):
        checkpointer.load(tmp_path / "model_0000001")


def test_a_damaged_checkpoint_does_not_push_out_the_good_ones_that_are_written_after_it(tmp_path):
    _, _, checkpointer = make(tmp_path, keep_last=1)
    checkpointer.save("model_0000009", iteration=10)
    damage_truncated(tmp_path / "model_0000009")
    for done in (5, 6):
        checkpointer.save(f"model_{done - 1:07d}", iteration=done)
    assert checkpointer.resume_or_load()["iteration"] == 6
    assert not (tmp_path / "model_0000004").exists()


def test_a_half_written_checkpoint_is_not_taken_for_one_and_is_cleared_away(tmp_path):
    (tmp_path / ".model_0000005.partial").mkdir(parents=True)
    (tmp_path / ".model_0000005.partial" / "__0_0.distcp").write_bytes(b"half")
    _, _, checkpointer = make(tmp_path)
    assert not checkpointer.has_checkpoint()
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("where", ["shards", "index"])
def test_a_full_disk_costs_one_checkpoint_and_says_so(tmp_path, monkeypatch, caplog, asynchronous, where):
    _, _, checkpointer = make(tmp_path, asynchronous=asynchronous)
    checkpointer.save("model_0000000", iteration=1)
    checkpointer.wait()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if where == "shards":
        monkeypatch.setattr(torch.distributed.checkpoint.FileSystemWriter, "write_data", full)
    else:
        monkeypatch.setattr(module, "_write_synced", full)
    with caplog.at_level("ERROR", logger="dinov2"):
        checkpointer.save("model_0000001", iteration=2)
        checkpointer.wait()
    monkeypatch.undo()
    assert checkpointer.last_save_failed
    assert "NOT saved" in caplog.text
    assert "No space left" in caplog.text
    assert checkpointer.resume_or_load()["iteration"] == 1
    assert not list(tmp_path.glob(".*.partial"))


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoints"):
        make(tmp_path / "file" / "checkpoints")


def test_another_models_checkpoint_is_refused_by_name(tmp_path):
    _, _, checkpointer = make(tmp_path)
    checkpointer.save("model_0000000", iteration=1)
    other = FSDPCheckpointer(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), tmp_path)
    with pytest.raises(CheckpointError, match=r"has no model\.2\.bias"):
        other.resume_or_load()


def test_a_new_run_moves_old_checkpoints_aside_instead_of_deleting_them(tmp_path):
    _, _, checkpointer = make(tmp_path / "checkpoints")
    checkpointer.save("model_0000000", iteration=1)
    checkpointer.set_aside()
    assert not checkpointer.has_checkpoint()
    assert (tmp_path / "checkpoints.1" / "model_0000000" / "checkpoint.json").exists()


def test_consolidate_writes_one_file_that_torch_loads(tmp_path):
    model, _, checkpointer = make(tmp_path / "checkpoints")
    checkpointer.save("model_0000000", iteration=1)
    module.main([str(tmp_path / "checkpoints" / "model_0000000"), "--out", str(tmp_path / "one.pth")])
    loaded = torch.load(tmp_path / "one.pth", weights_only=True)
    assert torch.equal(loaded["model"]["0.weight"], model[0].weight)
    with pytest.raises(CheckpointError, match="exists"):
        module.main([str(tmp_path / "checkpoints" / "model_0000000"), "--out", str(tmp_path / "one.pth")])


def test_the_index_lists_every_file(tmp_path):
    _, _, checkpointer = make(tmp_path)
    checkpointer.save("model_0000000", iteration=1)
    index = json.loads((tmp_path / "model_0000000" / "checkpoint.json").read_text())
    on_disk = {path.name for path in (tmp_path / "model_0000000").iterdir()} - {"checkpoint.json"}
    assert set(index["files"]) == on_disk
