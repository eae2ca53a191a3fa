"""What is sharded over the processes, and in which precision it computes (PyTorch's FSDP2, `fully_shard`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dinov2.distributed import get_global_size, get_local_size

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
METHODS_BESIDE_FORWARD = (
    "forward_features",
    "get_intermediate_layers",
    "get_last_self_attention",
    "get_self_attention",
)


class Precision(NamedTuple):
    """Of one sub-module: the dtype of its arithmetic and the dtype in which its gradients are summed over ranks."""

    compute: torch.dtype
    reduce: torch.dtype


def resolve_precision(compute_precision: Any, role: str, part: str, device: torch.device) -> Precision:
    """The precision of `role` (student or teacher) x `part` (backbone, dino_head or ibot_head) on `device`.

    `compute_precision.dtype` decides: `auto` computes in float32 on a CPU and, on a GPU, as the sub-module's own
    `mixed_precision` says, with bf16 in place of fp16 where the GPU has it; `config` takes `mixed_precision` as it
    stands; `fp32`, `bf16` or `fp16` hold for every sub-module.
    """
    choice = compute_precision.dtype
    own = compute_precision[role][part].mixed_precision
    if choice in DTYPES:
        return Precision(DTYPES[choice], DTYPES[own.reduce_dtype] if choice != "fp32" else torch.float32)
    compute, reduce = DTYPES[own.param_dtype], DTYPES[own.reduce_dtype]
    if choice == "auto":
        if device.type == "cpu":
            return Precision(torch.float32, torch.float32)
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            better = {torch.float16: torch.bfloat16}
            return Precision(better.get(compute, compute), better.get(reduce, reduce))
    return Precision(compute, reduce)


def get_fsdp_wrapper(
    model_cfg: Any, modules_to_wrap: Iterable[type[nn.Module]] = (), *, device: torch.device, precision: Precision
) -> Callable[[nn.Module], nn.Module]:
    """A function that prepares a module, in place, for training on all processes; on one process it does nothing.

    `model_cfg.sharding_strategy` is one of

    - `NO_SHARD`: every process holds the whole module; gradients are averaged (as DDP does);
    - `SHARD_GRAD_OP`: parameters, gradients and optimizer state are split over all processes; parameters stay whole
      between forward and backward (ZeRO-2);
    - `FULL_SHARD`: parameters are split again right after use (ZeRO-3);
    - `HYBRID_SHARD`: FULL_SHARD inside a node, replicas over the nodes.

    Modules of the classes `modules_to_wrap` become units of communication of their own.
    """
    if get_global_size() == 1:
        return lambda module: module
    strategy = model_cfg.sharding_strategy
    low_precision = precision.compute != torch.float32
    mesh = _device_mesh(strategy, device)
    policy = MixedPrecisionPolicy(
        param_dtype=precision.compute if low_precision else None,
        reduce_dtype=precision.reduce if low_precision else None,
    )
    # Outputs are views of the last hidden state; nothing here writes to them, which is what PyTorch warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

    def wrap(module: nn.Module) -> nn.Module:
        units = tuple(modules_to_wrap)
        # Without a backward pass nothing else would free, and so refresh, what the forward pass gathered.
        trains = any(parameter.requires_grad for parameter in module.parameters())
        reshard = strategy in ("FULL_SHARD", "HYBRID_SHARD") or not trains
        options = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": reshard}
        for child in module.modules():
            if isinstance(child, units) and child is not module:
                fully_shard(child, **options)
        fully_shard(module, **options)
        for name in METHODS_BESIDE_FORWARD:
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)
        return module

    return wrap


def _device_mesh(strategy: str, device: torch.device) -> DeviceMesh:
    """Replicas x shards; a mesh with one shard is what makes FSDP2 replicate."""
    world, node = get_global_size(), get_local_size()
    shards = {"NO_SHARD": 1, "SHARD_GRAD_OP": world, "FULL_SHARD": world, "HYBRID_SHARD": node}[strategy]
    if shards == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // shards, shards), mesh_dim_names=("replicate", "shard"))


def is_fsdp(module: nn.Module) -> bool:
    """Whether `module` was prepared for several processes."""
    return isinstance(module, FSDPModule)


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass sums gradients over the processes (off for all but the last of several)."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.set_requires_gradient_sync(enabled, recurse=False)


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The part of each tensor that this process holds (all of it unless sharded), sharing its memory."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """All of a module's tensors on the CPU, whole whatever the sharding; every rank enters, rank 0 gets them."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@torch.no_grad()
def clip_gradients(module: nn.Module, max_norm: Tensor | float | None) -> Tensor:
    """Scale the gradients of `module` in place so that their L2 norm is at most `max_norm`; None only measures.

    Returns:
        The norm before clipping, over all processes, a 0-d float tensor. Nothing waits for the device.
    """
    parameters = [p for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
