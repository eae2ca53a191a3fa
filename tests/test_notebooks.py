"""The notebooks run from top to bottom, on drawn cells and on one's own, and are committed with what they show."""

import os
from pathlib import Path

import pytest

from dinov2.data import synthetic
from dinov2.models.weights import save_backbone

nbformat = pytest.importorskip("nbformat")

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = ["attention_maps", "dinov2_embedding_visualisation", "embedding_testing"]


def code_cells(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(notebook, cache, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("DINOV2_CACHE", str(cache))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]))
    nbclient.NotebookClient(notebook, timeout=550, resources={"metadata": {"path": str(FOLDER)}}).execute()


def test_there_are_no_other_notebooks():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_begins_with_the_two_lines_to_change(name):
    assert [line.split("=")[0].strip() for line in code_cells(name)[0].source.splitlines()] == ["WEIGHTS", "DATA"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_with_pictures_and_without_errors_or_paths_of_a_machine(name):
    outputs = [output for cell in code_cells(name) for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"display_data", "execute_result", "stream"}
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) >= 3
    text = "".join(map(str, outputs))
    assert not [root for root in ("/root/", "/home/", "/tmp/", "/opt/") if root in text]
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 1.5e6


# UMAP takes half a minute to compile; `make notebooks` runs it too
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "visualisation" in name else ()) for name in NAMES]
)
def test_a_notebook_runs_on_a_model_and_folders_of_ones_own(name, tiny_vit, tmp_path, monkeypatch):
    save_backbone(tiny_vit, tmp_path / "model.safetensors")
    classes = ("neutrophil", "lymphocyte", "platelet")
    synthetic.generate(tmp_path / "cells", classes, 10, sources=2, size=64, progress=False)
    folders = [str(folder) for folder in sorted((tmp_path / "cells").iterdir())]
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    lines = next(cell for cell in notebook.cells if cell.cell_type == "code")
    lines.source = f"WEIGHTS = {str(tmp_path / 'model.safetensors')!r}\nDATA = {folders!r}"
    execute(notebook, tmp_path / "cache", monkeypatch)
    assert not (tmp_path / "cache" / "notebooks").exists()  # where the example's own model and cells would be


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    """As on a user's machine: the first notebook trains the model."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_as_it_is(name, shared_cache, monkeypatch):
    execute(nbformat.read(FOLDER / f"{name}.ipynb", as_version=4), shared_cache, monkeypatch)
