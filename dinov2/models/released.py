"""Where weights are: files, folders, and DINOv2's released models by name. Nothing is downloaded unless named."""

from __future__ import annotations

import contextlib
import logging
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

logger = logging.getLogger("dinov2")

BASE_URL = "https://dl.fbaipublicfiles.com/dinov2"


class Released(NamedTuple):
    """A released model: 14-pixel patches, built at 518 pixels."""

    arch: str
    registers: int
    ffn_layer: str


RELEASED: dict[str, Released] = {
    f"dinov2_vit{letter}14{suffix}": Released(arch, registers, ffn_layer)
    for letter, arch, ffn_layer in (
        ("s", "vit_small", "mlp"),
        ("b", "vit_base", "mlp"),
        ("l", "vit_large", "mlp"),
        ("g", "vit_giant2", "swiglufused"),
    )
    for suffix, registers in (("", 0), ("_reg", 4))
}


def model_name(arch: str, patch_size: int, num_register_tokens: int = 0) -> str:
    """DINOv2's name of a model: `("vit_small", 14, 4)` is `dinov2_vits14_reg4`."""
    registers = f"_reg{num_register_tokens}" if num_register_tokens else ""
    return f"dinov2_{arch.replace('_', '')[:4]}{patch_size}{registers}"


def backbone_url(arch: str, patch_size: int, num_register_tokens: int = 0) -> str:
    """Address of a released backbone."""
    return f"{BASE_URL}/{model_name(arch, patch_size)}/{model_name(arch, patch_size, num_register_tokens)}_pretrain.pth"


def load_url(url: str) -> dict[str, Any]:
    """Read a file by its address, from torch.hub's cache (`$TORCH_HOME/hub/checkpoints`) or the network.

    Raises:
        ConnectionError: it is in neither; the message says where to put it by hand.
    """
    cached = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    try:
        with unreadable_is_value_error(cached) if cached.is_file() else contextlib.nullcontext():
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConnectionError(
            f"cannot download {url} ({error}). Without a network, fetch it elsewhere and place it at {cached}, "
            "or give the path of the file in place of the name"
        ) from error


def load_released(name: str) -> dict[str, Any]:
    """The state dict of a released backbone, such as `dinov2_vits14_reg`."""
    released = RELEASED[name]
    return load_url(backbone_url(released.arch, 14, released.registers))


def fetch_huggingface(repository: str) -> Path:
    """Folder of a model on the Hugging Face hub, from its cache (`HF_HOME`) or the network."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f"hf:{repository} needs huggingface_hub: pip install 'dinov2[export]'") from error
    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.safetensors"]))
    except OSError as error:
        raise ConnectionError(
            f"cannot fetch hf:{repository} ({error}). Without a network, copy its folder (config.json, "
            "model.safetensors) to this machine and give its path"
        ) from error


@contextlib.contextmanager
def unreadable_is_value_error(path: Path) -> Iterator[None]:
    """Turn what a damaged or unsafe weights file raises into a ValueError that names it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # damaged files raise almost anything: EOFError, KeyError, UnicodeDecodeError, ...
        raise ValueError(
            f"{path}: not a readable weights file (damaged, truncated, or with more in it than tensors; "
            f"code in files is never run): {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """One line; torch's advice to load unsafely is left out."""
    if isinstance(error, pickle.UnpicklingError):
        refused = re.search(r"Unsupported \w+: GLOBAL (\S+)", str(error))
        return f"it holds {refused[1]}" if refused else "not a pickle of tensors"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
