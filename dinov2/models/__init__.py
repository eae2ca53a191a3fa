"""Student and teacher backbones from a configuration."""

from __future__ import annotations

import logging
from typing import Any

from .vision_transformer import ARCHITECTURES, DinoVisionTransformer

logger = logging.getLogger("dinov2")


def build_model(
    args: Any, only_teacher: bool = False, img_size: int = 224
) -> tuple[DinoVisionTransformer, int] | tuple[DinoVisionTransformer, DinoVisionTransformer, int]:
    """Build a teacher, or a student (with stochastic depth) and a teacher, with their width.

    Args:
        args: the `student` section of a config; a `_memeff` ending of `arch` is ignored.
        only_teacher: return `(teacher, embed_dim)` rather than `(student, teacher, embed_dim)`.
        img_size: side of the images that positions are sized for, pixels.

    Raises:
        ValueError: unknown arch.
    """
    arch = args.arch.removesuffix("_memeff")
    if arch not in ARCHITECTURES:
        raise ValueError(f"student.arch={args.arch!r} is unknown; choose one of {', '.join(ARCHITECTURES)}")
    options = {
        "img_size": img_size,
        "patch_size": args.patch_size,
        "init_values": args.layerscale,
        "ffn_layer": args.ffn_layer,
        "block_chunks": args.block_chunks,
        "qkv_bias": args.qkv_bias,
        "proj_bias": args.proj_bias,
        "ffn_bias": args.ffn_bias,
        "num_register_tokens": args.num_register_tokens,
        "interpolate_offset": args.interpolate_offset,
        "interpolate_antialias": args.interpolate_antialias,
        "in_chans": getattr(args, "in_chans", 3),
        "attention_backend": getattr(args, "attention_backend", "auto"),
    }
    build = ARCHITECTURES[arch]
    teacher = build(**options)
    if only_teacher:
        return teacher, teacher.embed_dim
    student = build(**options, drop_path_rate=args.drop_path_rate, drop_path_uniform=args.drop_path_uniform)
    return student, teacher, student.embed_dim


def build_model_from_cfg(
    cfg: Any, only_teacher: bool = False
) -> tuple[DinoVisionTransformer, int] | tuple[DinoVisionTransformer, DinoVisionTransformer, int]:
    """`build_model` from a whole config: positions are sized for `crops.global_crops_size`."""
    return build_model(cfg.student, only_teacher=only_teacher, img_size=cfg.crops.global_crops_size)
