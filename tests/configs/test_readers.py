"""A key that exists is a key that is read."""

import re
from pathlib import Path

import pytest

from dinov2.configs.schema import walk

PACKAGE = Path(__file__).parents[2] / "dinov2"
# What checks a key does not use it.
SOURCES = {
    str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py") if "configs" not in path.parts
}

# Sections that reach their reader under another name: the file that takes them apart.
READERS = {
    "augmentations": "data/augmentations.py",
    "student": "models/__init__.py",
    "dino": "train/ssl_meta_arch.py",
    "ibot": "train/ssl_meta_arch.py",
    "compute_precision": "fsdp/wrap.py",
    "distillation": "train/ssl_meta_arch.py",
}
NO_EFFECT = {"buffer_dtype"}  # said so in the schema, and to who sets it


def is_read(key: str) -> bool:
    *_, section, name = key.split(".")
    if any(re.search(rf"""\b{section}(\.|\[["']){name}\b""", text) for text in SOURCES.values()):
        return True
    reader = READERS.get(key.split(".")[0])
    return reader is not None and re.search(rf"\b{name}\b", SOURCES[reader]) is not None


@pytest.mark.parametrize("key", [key for key, _ in walk() if key.rpartition(".")[2] not in NO_EFFECT])
def test_every_key_has_a_reader(key):
    assert is_read(key), f"nothing in dinov2/ reads {key}"


def test_a_key_without_a_reader_would_be_found():
    assert not is_read("train.no_such_key")
    assert not is_read("optim.patch_size")  # another section's
