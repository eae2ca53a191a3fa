"""What makes the same step faster or smaller: compilation and activation checkpointing of the blocks."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dinov2.layers import NestedTensorBlock


def prepare_backbone(backbone: nn.Module, activation_checkpointing: str, *, compiled: bool) -> None:
    """Prepare every block in place; parameter names stay as they are.

    Args:
        backbone: a vision transformer.
        activation_checkpointing: `none`; `full`: recompute each block in the backward pass; `selective`: keep the
            outputs of attention and of matrix products, recompute the rest.
        compiled: compile each block with `torch.compile`.
    """
    for block in backbone.modules():
        if not isinstance(block, NestedTensorBlock):
            continue
        if activation_checkpointing != "none":
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, **_recompute_options(activation_checkpointing)
            )
        if compiled:
            block.compile()


def _recompute_options(kind: str) -> dict[str, Any]:
    if kind == "full":
        return {}
    return {"context_fn": functools.partial(create_selective_checkpoint_contexts, _keep_expensive)}


def _keep_expensive(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    aten = torch.ops.aten
    expensive = {
        aten.mm.default,
        aten.addmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
    return CheckpointPolicy.MUST_SAVE if op in expensive else CheckpointPolicy.PREFER_RECOMPUTE
