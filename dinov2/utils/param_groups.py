"""Which learning rate and weight decay each parameter gets."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

logger = logging.getLogger("dinov2")

_EMBEDDINGS = ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")


def get_vit_lr_decay_rate(
    name: str,
    lr_decay_rate: float = 1.0,
    num_layers: int = 12,
    force_is_backbone: bool = False,
    chunked_blocks: bool = False,
) -> float:
    """Return the factor on the learning rate for one parameter of a vision transformer.

    Layer 0 is everything before the blocks, layer i + 1 is block i, and layer `num_layers + 1` is the rest (the last
    norm, the heads), which learns at the full rate: `lr_decay_rate ** (num_layers + 1 - layer)`.

    Args:
        name: the parameter's name.
        lr_decay_rate: factor from one layer to the one below.
        num_layers: number of blocks.
        force_is_backbone: the name belongs to a backbone although nothing in it says so.
        chunked_blocks: blocks are named `blocks.{chunk}.{index}`.
    """
    layer = num_layers + 1
    if name.startswith("backbone") or force_is_backbone:
        if any(part in name for part in _EMBEDDINGS):
            layer = 0
        elif "blocks." in name and "residual." not in name:
            numbers = name[name.index("blocks.") :].split(".")
            layer = int(numbers[2 if chunked_blocks else 1]) + 1
    return lr_decay_rate ** (num_layers + 1 - layer)


def get_params_groups_with_decay(
    model: nn.Module, lr_decay_rate: float = 1.0, patch_embed_lr_mult: float = 1.0
) -> list[dict[str, Any]]:
    """Return one optimizer group per trainable parameter, in the order of `named_parameters`.

    Each group holds `params` (the parameter), `name`, `lr_multiplier`, `wd_multiplier` (0 for biases, norms and
    LayerScale) and `is_last_layer` (the prototypes of a head, which stay frozen at first).
    """
    backbone = getattr(model, "backbone", None)
    if backbone is None and isinstance(model, nn.ModuleDict) and "backbone" in model:
        backbone = model["backbone"]
    blocks_owner = model if hasattr(model, "n_blocks") else backbone
    n_blocks = getattr(blocks_owner, "n_blocks", 0)
    chunked = getattr(blocks_owner, "chunked_blocks", False)

    groups = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = name.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")
        group = {
            "params": parameter,
            "name": name,
            "is_last_layer": "last_layer" in name,
            "lr_multiplier": get_vit_lr_decay_rate(
                name,
                lr_decay_rate,
                num_layers=n_blocks,
                force_is_backbone=blocks_owner is model,
                chunked_blocks=chunked,
            ),
            "wd_multiplier": 0.0 if name.endswith(".bias") or "norm" in name or "gamma" in name else 1.0,
        }
        if "patch_embed" in name:
            group["lr_multiplier"] *= patch_embed_lr_mult
        logger.debug("%s: lr x %g, weight decay x %g", name, group["lr_multiplier"], group["wd_multiplier"])
        groups.append(group)
    return groups


def fuse_params_groups(
    all_params_groups: Iterable[dict[str, Any]],
    keys: Sequence[str] = ("lr_multiplier", "wd_multiplier", "is_last_layer"),
) -> list[dict[str, Any]]:
    """Merge groups that agree in every one of `keys`, so that the optimizer steps through few, large groups."""
    parameters: dict[tuple, list] = defaultdict(list)
    for group in all_params_groups:
        held = group["params"]
        parameters[tuple(group[key] for key in keys)] += list(held) if isinstance(held, (list, tuple)) else [held]
    return [{"params": params, **dict(zip(keys, values))} for values, params in parameters.items()]
