"""Arithmetic of one optimizer step, for model-FLOP utilisation (MFU) and time estimates."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from dinov2.layers import NestedTensorBlock

# Dense peak of the matrix units in bf16 (fp16 where there is no bf16), in TFLOP/s, by words of the device's name;
# the first that fits counts. Source: NVIDIA's data sheets, without structured sparsity; SXM modules where not said.
PEAK_TFLOPS = {
    "B200": 2250,
    "GH200": 990,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "RTX A6000": 155,
    "A40": 150,
    "A30": 165,
    "A10G": 70,
    "A10": 125,
    "V100": 125,
    "T4": 65,
}


def peak_flops(device: torch.device, dtype: torch.dtype, tflops: float = 0.0) -> float | None:
    """Peak of the device in operations per second; None where we do not know it: CPUs, float32, other GPUs.

    Args:
        device: where the arithmetic is done.
        dtype: that of the arithmetic.
        tflops: what the user knows better, in TFLOP/s; 0: look it up.
    """
    if tflops > 0:
        return tflops * 1e12
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    words = set(re.split(r"[\s-]+", torch.cuda.get_device_name(device)))
    return next((peak * 1e12 for name, peak in PEAK_TFLOPS.items() if words.issuperset(name.split())), None)


def ideal_step_time(model: nn.Module, cfg: Any) -> float | None:
    """Seconds that one optimizer step's arithmetic on this process takes at the device's peak; None if that is unknown.

    Divided by the time a step does take, it is the model-FLOP utilisation.
    """
    peak = peak_flops(model.device, model.precision["student"]["backbone"].compute, cfg.train.peak_tflops)
    images = cfg.train.batch_size_per_gpu * cfg.train.gradient_accumulation_steps
    return step_flops(model, cfg, images) / peak if peak else None


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

    A backward pass costs two forward passes; blocks that do not learn (`optim.freeze_layers`) have none. Stochastic
    depth is counted at what it saves: above a rate of 0.1 a block computes a subset of the images
    (`dinov2.layers.block`). Recomputation by activation checkpointing does not count.
    """
    student, teacher = model.student, getattr(model, model.target_role)
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
    backbone = student["backbone"]
    backbone_forward = kept * (
        2 * backbone_flops(backbone, global_side) + n_local * backbone_flops(backbone, local_side)
    )
    learning = [any(p.requires_grad for p in block.parameters()) for block in backbone.iterate_blocks()]
    backbone_both = backbone_forward * (1 + 2 * sum(learning) / len(learning))
    heads_forward = (2 + n_local) * head_flops(student["dino_head"]) + masked * head_flops(student[patch_head])
    teacher_forward = 2 * backbone_flops(teacher["backbone"], global_side)
    teacher_forward += 2 * backbone_flops(backbone, global_side) if model.do_gram else 0.0  # the Gram teacher
    teacher_forward += 2 * head_flops(teacher["dino_head"]) + masked * head_flops(teacher[patch_head])
    return images * (backbone_both + 3 * heads_forward + teacher_forward)
