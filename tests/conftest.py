"""What every test shares: one thread, one seed, a tiny model, drawn cells, and the way to the real ones."""

# ruff: noqa: E402 (the environment comes first: torch reads it when it is imported)

import os
from pathlib import Path

# Inherited by the processes that tests start: the workers of pytest share the cores.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Tests that need a GPU say so instead of failing where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Indexes and decoded images of tests stay out of the user's cache folder."""
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def tiny_vit():
    """A vision transformer in eval mode: two blocks, 32 wide, patch 14, four registers, position grid of 56 pixels."""
    from dinov2.models.vision_transformer import DinoVisionTransformer

    return DinoVisionTransformer(
        img_size=56,
        patch_size=14,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_register_tokens=4,
        init_values=1.0,
        block_chunks=0,
    ).eval()


@pytest.fixture(scope="session")
def cell_folder(tmp_path_factory):
    """A folder per class with eight drawn cells each, 64 pixels wide; made once, to be read only."""
    from dinov2.data import synthetic

    folder = tmp_path_factory.mktemp("cells")
    synthetic.generate(folder, classes=list(synthetic.CLASSES)[:4], per_class=8, size=64, progress=False)
    return folder


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real cell images beside the checkout; they are not part of the project."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no real cell images: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def shared_reference():
    """The folder of numbers computed with the reference implementation, beside the checkout."""
    folder = SHARED / "reference"
    if not folder.is_dir():
        pytest.skip(f"no numbers of the reference: {folder} does not exist")
    return folder
