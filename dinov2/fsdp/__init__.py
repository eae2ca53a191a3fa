"""Several processes, one model: what is sharded, in which precision, and how it is saved."""

from dinov2.fsdp.checkpointer import CheckpointError, FSDPCheckpointer, first_free
from dinov2.fsdp.grad_scaler import ShardedGradScaler
from dinov2.fsdp.wrap import (
    Precision,
    clip_gradients,
    full_state_dict,
    get_fsdp_wrapper,
    is_fsdp,
    local_tensors,
    resolve_precision,
    set_gradient_sync,
)

__all__ = [
    "CheckpointError",
    "FSDPCheckpointer",
    "Precision",
    "ShardedGradScaler",
    "clip_gradients",
    "first_free",
    "full_state_dict",
    "get_fsdp_wrapper",
    "is_fsdp",
    "local_tensors",
    "resolve_precision",
    "set_gradient_sync",
]
