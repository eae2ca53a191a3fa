"""Arithmetic of one optimizer step, for model-FLOP utilisation (MFU) and time estimates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dinov2.layers import NestedTensorBlock

# Dense peak of the matrix units in floating-point operations per second, by a part of the device's name and dtype.
# Source: NVIDIA's data sheets, without structured sparsity.
PEAK_FLOPS = {
    ("H200", torch.bfloat16): 989e12,
    ("H100 PCIe", torch.bfloat16): 756e12,
    ("H100", torch.bfloat16): 989e12,
    ("A100", torch.bfloat16): 312e12,
    ("L40S", torch.bfloat16): 362e12,
    ("RTX 4090", torch.bfloat16): 165e12,
    ("RTX 3090", torch.bfloat16): 71e12,
    ("A10", torch.bfloat16): 125e12,
    ("V100", torch.float16): 125e12,
    ("T4", torch.float16): 65e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak of the device in operations per second, None where we do not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    dtype = torch.bfloat16 if dtype == torch.float16 and not name.endswith(("V100", "T4")) else dtype
    return next((peak for (part, kind), peak in PEAK_FLOPS.items() if part in name and kind == dtype), None)


def backbone_flops(backbone: nn.Module, side: int) -> float:
    """Operations of one forward pass of one image of `side` x `side` pixels; a multiply and an add are two.

    Counts the matrix products: patch embedding, projections, attention scores and values, feed-forward network.
    """
    patches = (side // backbone.patch_size) ** 2
    tokens = patches + 1 + backbone.num_register_tokens
    flops = 2.0 * patches * backbone.patch_embed.proj.weight.numel()
    for block in backbone.modules():
        if isinstance(block, NestedTensorBlock):
            linear = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
            flops += 2.0 * tokens * linear + 4.0 * tokens**2 * backbone.embed_dim
    return flops


def head_flops(head: nn.Module) -> float:
    """Operations of one forward pass of one row through a projection head."""
    return 2.0 * sum(parameter.numel() for parameter in head.parameters() if parameter.ndim == 2)


def step_flops(model: nn.Module, cfg: Any, images: int) -> float:
    """Operations of one optimizer step over `images` images: teacher forward, student forward and backward.

    A backward pass costs two forward passes. Stochastic depth is counted at what it saves: above a rate of 0.1 a block
    computes a subset of the images (`dinov2.layers.block`). Recomputation by activation checkpointing does not count.
    """
    student, teacher = model.student, model.teacher
    global_side, local_side, n_local = (
        cfg.crops.global_crops_size,
        cfg.crops.local_crops_size,
        cfg.crops.local_crops_number,
    )
    patches = (global_side // cfg.student.patch_size) ** 2
    low, high = cfg.ibot.mask_ratio_min_max
    masked = 2 * patches * cfg.ibot.mask_sample_probability * (low + high) / 2 if model.do_ibot else 0.0
    patch_head = "ibot_head" if model.ibot_separate_head else "dino_head"

    kept = 1 - cfg.student.drop_path_rate if cfg.student.drop_path_rate > 0.1 else 1.0
    student_forward = kept * (
        2 * backbone_flops(student["backbone"], global_side) + n_local * backbone_flops(student["backbone"], local_side)
    )
    student_forward += (2 + n_local) * head_flops(student["dino_head"]) + masked * head_flops(student[patch_head])
    teacher_forward = 2 * backbone_flops(teacher["backbone"], global_side)
    teacher_forward += 2 * head_flops(teacher["dino_head"]) + masked * head_flops(teacher[patch_head])
    return images * (3 * student_forward + teacher_forward)
