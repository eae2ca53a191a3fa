"""Who am I among the processes of a run, and what do they tell each other.

Only this room and `fsdp` use `torch.distributed`. On one process no group is made and every question has an answer.
"""

import datetime
import logging
import os
import time

import torch
import torch.distributed as dist

from dinov2.distributed.collectives import (
    any_rank,
    barrier,
    broadcast_object,
    gather_objects,
    gather_rows,
    gather_rows_with_grad,
    mean_over_ranks,
    sum_over_ranks,
)
from dinov2.distributed.environment import ProcessEnvironment, _parse_slurm_node_list, detect

__all__ = [
    "ProcessEnvironment",
    "_parse_slurm_node_list",
    "any_rank",
    "barrier",
    "broadcast_object",
    "detect",
    "disable",
    "enable",
    "gather_objects",
    "gather_rows",
    "gather_rows_with_grad",
    "get_global_rank",
    "get_global_size",
    "get_local_rank",
    "get_local_size",
    "is_enabled",
    "is_main_process",
    "mean_over_ranks",
    "sum_over_ranks",
]

logger = logging.getLogger("dinov2")

GRACE_SECONDS = 0.2  # between the end of the group and whatever comes next

_environment: ProcessEnvironment | None = None  # of the group that `enable` made


def is_enabled() -> bool:
    """Return whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def get_global_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if is_enabled() else 1


def get_global_rank() -> int:
    """Return this process's number among all processes of the run, from 0."""
    return dist.get_rank() if is_enabled() else 0


def get_local_rank() -> int:
    """Return this process's number among the processes of this machine, from 0."""
    return _local_environment().local_rank if is_enabled() else 0


def get_local_size() -> int:
    """Return the number of processes of the run on this machine."""
    return _local_environment().local_world_size if is_enabled() else 1


def is_main_process() -> bool:
    """Return whether this is the process that writes files and speaks to the user (rank 0)."""
    return get_global_rank() == 0


def _local_environment() -> ProcessEnvironment:
    return _environment or detect(os.environ)  # the group may have been made by someone else


def enable(
    *,
    set_cuda_current_device: bool = True,
    overwrite: bool = False,
    allow_nccl_timeout: bool = False,
    device: torch.device | str | None = None,
) -> ProcessEnvironment:
    """Join the other processes that torchrun or SLURM started; on one process, do nothing but answer.

    Args:
        set_cuda_current_device: make the GPU of the local rank the current one.
        overwrite: replace MASTER_ADDR, RANK and the like where the environment holds other values.
        allow_nccl_timeout: let a collective that waits too long end the process instead of waiting for ever.
        device: where the run computes; by default a GPU if there is one. Decides between gloo and nccl.

    Raises:
        RuntimeError: already enabled, or an environment variable contradicts the launcher.
        ValueError: the launcher's variables make no sense, or the GPU asked for is not there, or there are fewer GPUs
            than processes.
    """
    global _environment
    if is_enabled():
        raise RuntimeError("torch.distributed is already enabled in this process")
    environment = detect(os.environ)
    use_cuda = torch.device(device).type == "cuda" if device is not None else torch.cuda.is_available()
    if use_cuda and set_cuda_current_device:
        torch.cuda.set_device(_gpu_index(environment, device))
    if environment.world_size == 1:
        return environment

    _export(environment, overwrite=overwrite)
    if allow_nccl_timeout:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    # gloo beside nccl, so that counts, flags and Python objects need no GPU.
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    dist.init_process_group(backend, init_method="env://", timeout=datetime.timedelta(minutes=30))
    _environment = environment
    barrier()
    logger.info(
        "process %d of %d (%s, %s, local rank %d of %d)",
        environment.rank,
        environment.world_size,
        environment.launcher,
        backend,
        environment.local_rank,
        environment.local_world_size,
    )
    return environment


def disable() -> None:
    """Leave the process group, if there is one.

    PyTorch's caches of sharded operations keep the group, and so gloo's threads, past its end. One that has yet to let
    go of the tensors of the last collective while the interpreter is torn down aborts the process
    (https://github.com/pytorch/pytorch/pull/179291): they get a moment.
    """
    global _environment
    _environment = None
    if is_enabled():
        dist.destroy_process_group()
        time.sleep(GRACE_SECONDS)


def _gpu_index(environment: ProcessEnvironment, device: torch.device | str | None) -> int:
    count = torch.cuda.device_count()
    asked = torch.device(device).index if device is not None else None
    if count == 0:
        raise ValueError(f"device {device}: PyTorch {torch.__version__} sees no GPU here; use cpu or auto")
    if asked is not None and asked >= count:
        raise ValueError(f"device {device}: this machine shows {count} GPU(s), cuda:0 to cuda:{count - 1}")
    if environment.world_size == 1:
        return asked or 0
    if asked is not None:
        raise ValueError(
            f"device {device}: {environment.world_size} processes cannot share one GPU; with cuda each takes its own"
        )
    if count == 1:  # SLURM can show each process its own GPU only
        return 0
    if environment.local_rank >= count:
        raise ValueError(
            f"local rank {environment.local_rank} has no GPU: this machine shows {count}, so start {count} processes"
        )
    return environment.local_rank


def _export(environment: ProcessEnvironment, *, overwrite: bool) -> None:
    for name, value in environment.as_variables().items():
        present = os.environ.get(name)
        if present not in (None, value) and not overwrite:
            raise RuntimeError(f"{name}={present} is set, but {environment.launcher} says {value}: unset it")
        os.environ[name] = value
