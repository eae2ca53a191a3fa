"""Names of the same tensors in other libraries, as data that is read in both directions.

A map gives, for each of our names, the names elsewhere; several names stand for tensors joined along their first
dimension. `{i}` is the number of a block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def plain_name(name: str) -> str:
    """Name without wrappers (`module.`, `_orig_mod.`, ...), with unchunked blocks and DINOv2's weight-norm names."""
    name = _WRAPPERS.sub("", name)
    name = re.sub(r"(^|\.)blocks\.\d+\.(\d+)\.", r"\1blocks.\2.", name)
    for new, old in (("weight.original0", "weight_g"), ("weight.original1", "weight_v")):
        name = name.replace(f"parametrizations.{new}", old)
    return name


def _both(ours: str, *theirs: str) -> dict[str, tuple[str, ...]]:
    return {f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs) for kind in ("weight", "bias")}


@dataclass(frozen=True)
class KeyMap:
    """Renaming between our plain names and those of another library."""

    library: str
    names: Mapping[str, tuple[str, ...]]

    def from_ours(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename tensors of ours; ValueError for one that the other library has no place for."""
        renamed = {}
        for name, tensor in state_dict.items():
            template, number = _template(name)
            if template not in self.names:
                raise ValueError(f"{self.library} has no place for {name}")
            theirs = self.names[template]
            for their_name, part in zip(theirs, tensor.chunk(len(theirs))):
                renamed[their_name.replace("{i}", number)] = part.contiguous()
        return renamed

    def to_ours(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename tensors of the other library; those without a name here (classifiers) are left out."""
        numbers = {number for name in state_dict if (number := _template(name)[1])}
        renamed = {}
        for ours, theirs in self.names.items():
            for number in numbers if "{i}" in ours else {""}:
                parts = [state_dict.get(name.replace("{i}", number)) for name in theirs]
                if all(part is not None for part in parts):
                    renamed[ours.replace("{i}", number)] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return renamed


def _template(name: str) -> tuple[str, str]:
    """`blocks.11.norm1.bias` to `blocks.{i}.norm1.bias` and `11`; a name outside the blocks to itself and nothing."""
    match = re.match(r"((?:encoder\.layer|blocks)\.)(\d+)(\..+)", name)
    return (f"{match[1]}{{i}}{match[3]}", match[2]) if match else (name, "")


def _blocks(prefix: str, *entries: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {
        f"blocks.{{i}}.{ours}": tuple(f"{prefix}.{{i}}.{name}" for name in theirs)
        for entry in entries
        for ours, theirs in entry.items()
    }


_HUGGINGFACE_REST = {
    "cls_token": ("embeddings.cls_token",),
    "mask_token": ("embeddings.mask_token",),
    "register_tokens": ("embeddings.register_tokens",),
    "pos_embed": ("embeddings.position_embeddings",),
    **_both("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    **_both("norm", "layernorm"),
}
_HUGGINGFACE_BLOCK = {
    **_both("norm1", "norm1"),
    **_both("norm2", "norm2"),
    **_both("mlp.fc1", "mlp.fc1"),
    **_both("mlp.fc2", "mlp.fc2"),
    "ls1.gamma": ("layer_scale1.lambda1",),
    "ls2.gamma": ("layer_scale2.lambda1",),
}

# Names in published files; every version of transformers reads them.
HUGGINGFACE = KeyMap(
    "Hugging Face",
    _HUGGINGFACE_REST
    | _blocks(
        "encoder.layer",
        _HUGGINGFACE_BLOCK,
        _both("attn.qkv", *(f"attention.attention.{name}" for name in ("query", "key", "value"))),
        _both("attn.proj", "attention.output.dense"),
        _both("mlp.w12", "mlp.weights_in"),
        _both("mlp.w3", "mlp.weights_out"),
    ),
)
# Names inside the modules of transformers 5.
HUGGINGFACE_MODULES = KeyMap(
    "Hugging Face (transformers 5)",
    _HUGGINGFACE_REST
    | _blocks(
        "encoder.layer",
        _HUGGINGFACE_BLOCK,
        _both("attn.qkv", *(f"attention.{name}_proj" for name in "qkv")),
        _both("attn.proj", "attention.o_proj"),
        _both("mlp.w12", "mlp.gate_proj", "mlp.up_proj"),
        _both("mlp.w3", "mlp.down_proj"),
    ),
)

_TIMM_REST = {
    "cls_token": ("cls_token",),
    "register_tokens": ("reg_token",),
    "pos_embed": ("pos_embed",),
    **_both("patch_embed.proj", "patch_embed.proj"),
    **_both("norm", "norm"),
}
_TIMM_BLOCK = {
    **_both("norm1", "norm1"),
    **_both("attn.qkv", "attn.qkv"),
    **_both("attn.proj", "attn.proj"),
    **_both("norm2", "norm2"),
    "ls1.gamma": ("ls1.gamma",),
    "ls2.gamma": ("ls2.gamma",),
}
TIMM = KeyMap(
    "timm",
    _TIMM_REST | _blocks("blocks", _TIMM_BLOCK, _both("mlp.fc1", "mlp.fc1"), _both("mlp.fc2", "mlp.fc2")),
)
TIMM_SWIGLU = KeyMap(
    "timm (SwiGLU)",
    _TIMM_REST | _blocks("blocks", _TIMM_BLOCK, _both("mlp.w12", "mlp.fc1"), _both("mlp.w3", "mlp.fc2")),
)


def to_plain_names(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str | None]:
    """Rename a state dict of Hugging Face or timm to our names; anything else passes through.

    Returns:
        The tensors, and the library that was recognised or None.
    """
    if (prefix := _prefix_of("embeddings.cls_token", state_dict)) is not None:
        theirs = _without(prefix, state_dict)
        old_names = any(".attention.attention." in name for name in theirs)
        key_map = HUGGINGFACE if old_names else HUGGINGFACE_MODULES
        return key_map.to_ours(theirs), key_map.library
    if (prefix := _prefix_of("cls_token", state_dict)) is None:
        return dict(state_dict), None
    theirs = _without(prefix, state_dict)
    swiglu = _has_packed_gate(theirs)
    if "reg_token" not in theirs and not swiglu:
        return dict(state_dict), None
    key_map = TIMM_SWIGLU if swiglu else TIMM
    ours = key_map.to_ours(theirs)
    if "register_tokens" in ours:
        ours["pos_embed"] = torch.cat((torch.zeros_like(ours["cls_token"]), ours["pos_embed"]), dim=1)
    return ours, key_map.library


def to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename plain names to timm's; with registers, timm adds the class token's position to the token itself."""
    state_dict = {name: tensor for name, tensor in state_dict.items() if name != "mask_token"}
    if "register_tokens" in state_dict:
        positions = state_dict["pos_embed"]
        state_dict |= {"cls_token": state_dict["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    return (TIMM_SWIGLU if "blocks.0.mlp.w12.weight" in state_dict else TIMM).from_ours(state_dict)


def to_huggingface(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename plain names to those of the `Dinov2Model` and `Dinov2WithRegistersModel` files."""
    return HUGGINGFACE.from_ours(state_dict)


def _prefix_of(marker: str, state_dict: Mapping[str, Tensor]) -> str | None:
    prefixes = [name[: -len(marker)] for name in state_dict if name == marker or name.endswith(f".{marker}")]
    return min(prefixes, key=len, default=None)


def _without(prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def _has_packed_gate(state_dict: Mapping[str, Tensor]) -> bool:
    first, second = state_dict.get("blocks.0.mlp.fc1.weight"), state_dict.get("blocks.0.mlp.fc2.weight")
    return first is not None and second is not None and first.shape[0] == 2 * second.shape[1]
