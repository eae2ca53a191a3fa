import os
import sys
from pathlib import Path

import pytest
import torch

from dinov2 import distributed

sys.path.insert(0, str(Path(__file__).parent))
from ranks import run_ranks, slurm_variables

BODY = """
answers["who"] = [distributed.is_enabled(), rank, world, distributed.get_local_rank(), distributed.get_local_size()]
answers["sum"] = distributed.sum_over_ranks(torch.tensor([1.0, 10.0 * (rank + 1)])).tolist()
answers["mean"] = distributed.mean_over_ranks(torch.tensor(4.0 * rank)).item()
mine = torch.full((2,), 1.0)
distributed.sum_over_ranks(mine)
answers["argument"] = mine.tolist()
rows = distributed.gather_rows(torch.full((1 + 2 * rank, 2), float(rank)))
answers["rows"] = rows.tolist()
answers["no_rows"] = distributed.gather_rows(torch.arange(3 * rank)).tolist()
answers["bools"] = distributed.gather_rows(torch.tensor([rank == 1])).tolist()
answers["any"] = [distributed.any_rank(rank == 1), distributed.any_rank(False)]
answers["objects"] = distributed.gather_objects({"rank": rank, "long": "x" * (rank * 1000)})[1]["rank"]
answers["broadcast"] = distributed.broadcast_object([rank] * (5 - rank), src=1)

x = torch.tensor([[1.0 + rank], [3.0 + rank]], requires_grad=True)
gathered = distributed.gather_rows_with_grad(x)
weights = torch.arange(4.0)[:, None] + rank
(gathered * weights).sum().backward()
answers["gathered"], answers["gradient"] = gathered.flatten().tolist(), x.grad.flatten().tolist()
try:
    distributed.gather_rows_with_grad(torch.zeros(1 + rank, 2))
except ValueError as error:
    answers["uneven"] = str(error)
try:
    distributed.enable(device="cpu")
except RuntimeError as error:
    answers["twice"] = str(error)
distributed.barrier()
"""


@pytest.fixture(scope="module", params=["torchrun", "slurm"])
def ranks(request, tmp_path_factory):
    options = {"variables": slurm_variables} if request.param == "slurm" else {}
    return run_ranks(BODY, tmp_path_factory.mktemp(request.param), **options)


def test_two_processes_agree_on_every_collective(ranks):
    for rank, answers in enumerate(ranks):
        assert answers["who"] == [True, rank, 2, rank, 2]
        assert answers["sum"] == [2.0, 30.0]
        assert answers["mean"] == 2.0
        assert answers["argument"] == [1.0, 1.0]
        assert answers["rows"] == [[0.0, 0.0]] + 3 * [[1.0, 1.0]]
        assert answers["no_rows"] == [0, 1, 2]
        assert answers["bools"] == [False, True]
        assert answers["any"] == [True, False]
        assert answers["objects"] == 1
        assert answers["broadcast"] == [1, 1, 1, 1]
        assert "[1, 2]" in answers["uneven"]
        assert "already enabled" in answers["twice"]


def test_the_gradient_of_a_gathered_row_is_the_sum_of_what_every_rank_did_with_it(ranks):
    # rank r weighs row i with i + r, so row i is weighed with 2i + 1 altogether
    assert [answers["gathered"] for answers in ranks] == [[1.0, 3.0, 2.0, 4.0]] * 2
    assert [answers["gradient"] for answers in ranks] == [[1.0, 3.0], [5.0, 7.0]]


def test_every_collective_is_the_identity_on_one_process():
    t = torch.randn(3, 2)
    assert torch.equal(distributed.sum_over_ranks(t), t)
    assert torch.equal(distributed.mean_over_ranks(t), t)
    assert torch.equal(distributed.gather_rows(t), t)
    assert distributed.gather_rows_with_grad(t) is t
    assert distributed.any_rank(True) is True
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.broadcast_object("a") == "a"
    distributed.barrier()


def test_only_the_differentiable_gather_keeps_gradients_so_that_one_process_behaves_like_many():
    t = torch.ones(2, 2, requires_grad=True)
    for collective in (distributed.sum_over_ranks, distributed.mean_over_ranks, distributed.gather_rows):
        assert not collective(t).requires_grad
    assert distributed.gather_rows_with_grad(t).requires_grad


@pytest.mark.parametrize("gather", [distributed.gather_rows, distributed.gather_rows_with_grad])
def test_a_scalar_has_no_rows(gather):
    with pytest.raises(ValueError, match="scalar"):
        gather(torch.tensor(1.0))


def test_one_process_makes_no_group_and_knows_its_place(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.enable(device="cpu").world_size == 1
    assert not distributed.is_enabled()
    assert (distributed.get_global_rank(), distributed.get_global_size()) == (0, 1)
    assert (distributed.get_local_rank(), distributed.get_local_size()) == (0, 1)
    assert distributed.is_main_process()
    distributed.disable()


def test_a_variable_that_contradicts_the_launcher_is_named_unless_overwritten(monkeypatch):
    environment = distributed.ProcessEnvironment("slurm", rank=1, world_size=2, master_addr="n1", master_port=9)
    for name, value in {**environment.as_variables(), "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="LOCAL_RANK=3"):
        distributed._export(environment, overwrite=False)
    distributed._export(environment, overwrite=True)
    assert os.environ["LOCAL_RANK"] == "0"
