"""What processes tell each other. Every function is the identity on one process, so callers need no special case.

All ranks must call the same function in the same order. Tensors on the CPU go through gloo, tensors on a GPU through
nccl. No gradient flows through any of them but `gather_rows_with_grad`: results are detached on one process too, so
that a run on one process and a run on several differ in nothing.
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _control_device() -> torch.device:
    """The device for small bookkeeping tensors: the CPU wherever the group can use it, which spares a GPU sync."""
    on_cpu = "cpu:" in dist.get_backend_config()
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the element-wise sum over all ranks, as a new tensor where there are several."""
    tensor = tensor.detach()
    if _world_size() == 1:
        return tensor
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the element-wise mean over all ranks of a floating-point tensor."""
    return sum_over_ranks(tensor) / _world_size() if _world_size() > 1 else tensor.detach()


def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate the rows (first dimension) of every rank, in rank order; row counts may differ, and may be 0.

    Raises:
        ValueError: the tensor has no rows because it is a scalar.
    """
    _refuse_scalar(tensor)
    tensor = tensor.detach()
    if _world_size() == 1:
        return tensor
    if tensor.dtype == torch.bool:  # not every backend moves booleans
        return gather_rows(tensor.to(torch.uint8)).to(torch.bool)
    counts = _gather_counts(len(tensor))
    padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def gather_rows_with_grad(tensor: Tensor) -> Tensor:
    """Concatenate the rows of every rank, in rank order, and let gradients flow back to the rank a row came from.

    A row's gradient is the sum over the ranks of what each did with it. Every rank must have the same number of rows
    and must run the backward pass.

    Raises:
        ValueError: a scalar, or ranks with different row counts.
    """
    _refuse_scalar(tensor)
    if _world_size() == 1:
        return tensor
    counts = _gather_counts(len(tensor))
    if len(set(counts)) > 1:
        raise ValueError(f"gather_rows_with_grad needs as many rows on every rank, got {counts}")
    return _GatherRows.apply(tensor)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        start = dist.get_rank() * ctx.rows
        return sum_over_ranks(gradient)[start : start + ctx.rows]


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is true on at least one rank; the answer is the same on all."""
    if _world_size() == 1:
        return bool(flag)
    return bool(sum_over_ranks(torch.tensor(int(flag), device=_control_device())).item())


def gather_objects(value: T) -> list[T]:
    """Return every rank's value (anything that pickles, of any size), in rank order."""
    if _world_size() == 1:
        return [value]
    values: list[Any] = [None] * _world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T, src: int = 0) -> T:
    """Return the value that rank `src` passed."""
    if _world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=src, device=_control_device())
    return box[0]


def barrier() -> None:
    """Wait until every rank is here. GPUs may still be busy: it is the processes that meet."""
    any_rank(False)


def _gather_counts(count: int) -> list[int]:
    mine = torch.tensor([count], device=_control_device())
    counts = [torch.empty_like(mine) for _ in range(_world_size())]
    dist.all_gather(counts, mine)
    return [int(each) for each in counts]


def _refuse_scalar(tensor: Tensor) -> None:
    if tensor.ndim == 0:
        raise ValueError("a scalar has no rows to gather; pass tensor[None]")
