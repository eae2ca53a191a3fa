import csv
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from dinov2.data import LabelledDataset
from dinov2.eval import embed
from dinov2.eval.embed import load_embeddings, main
from dinov2.eval.features import extract
from dinov2.eval.setup import load_model
from dinov2.models.vision_transformer import vit_tiny
from dinov2.models.weights import save_backbone


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_backbone(vit_tiny(patch_size=28, img_size=56, depth=2, num_register_tokens=2, init_values=1.0), path)
    return str(path)


def run(*words, weights, data, out):
    fixed = ["--image-size", "56", "--num-workers", "0", "--batch-size", "8"]
    return main(["--weights", weights, "--data", str(data), "--out", str(out), *fixed, *words])


def test_embeddings_are_the_features_with_what_is_known_of_each_image(tmp_path, weights, cell_folder):
    out = tmp_path / "cells.parquet"
    assert run("--features", "cls", "registers", "patches", weights=weights, data=cell_folder, out=out) == 0
    data = LabelledDataset(cell_folder)
    expected = extract(load_model(weights).backbone, data, image_size=56, batch_size=8, num_workers=0, features="cls")

    file = pq.read_table(out)
    assert file.column_names == ["path", "source", "label", "group", "height", "width", "cls", "registers", "patches"]
    assert file.column("path").to_pylist() == list(data.paths)
    assert file.column("label").to_pylist() == [data.classes[i] for i in data.labels]
    assert set(file.column("source").to_pylist()) == {cell_folder.name}
    assert file.column("height")[0].as_py() == 64
    assert file.schema.field("patches").type.list_size == 2 * 2 * 192
    about = json.loads(file.schema.metadata[b"dinov2"])
    assert (about["image_size"], about["features"]) == (56, "cls+registers+patches")

    table = load_embeddings(out, "cls")
    np.testing.assert_allclose(table.features, expected.features, atol=1e-5)
    assert table.labels.tolist() == data.labels.tolist()
    assert not out.with_name("cells.parquet.parts").exists()


def test_a_stopped_run_goes_on_with_the_first_missing_chunk(tmp_path, weights, cell_folder, monkeypatch):
    monkeypatch.setattr(embed, "MAX_CHUNK_ROWS", 8)
    whole, parts = tmp_path / "whole.parquet", tmp_path / "parts.parquet"
    run(weights=weights, data=cell_folder, out=whole)
    assert pq.read_metadata(whole).num_row_groups == 4

    extract_with, calls = embed.extract_with, []

    def stop_at_third(*args, **kwargs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return extract_with(*args, **kwargs)

    monkeypatch.setattr(embed, "extract_with", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(weights=weights, data=cell_folder, out=parts)
    assert not parts.exists()

    again = []
    monkeypatch.setattr(embed, "extract_with", lambda *a, **k: again.append(1) or extract_with(*a, **k))
    run(weights=weights, data=cell_folder, out=parts)
    assert len(again) == 2
    assert pq.read_table(parts).equals(pq.read_table(whole))


def test_chunks_of_another_run_are_not_mixed_in(tmp_path, weights, cell_folder, monkeypatch, caplog):
    out = tmp_path / "cells.parquet"
    stale = embed.ChunkStore(tmp_path / "cells.parquet.parts", {"image_size": 224})
    stale.open()
    (stale.folder / "chunk_000000.parquet").write_text("stale")
    run(weights=weights, data=cell_folder, out=out)
    assert "starting anew" in caplog.text
    assert pq.read_metadata(out).num_rows == 32


def test_numpy_and_parquet_files_hold_the_same(tmp_path, weights, cell_folder, monkeypatch):
    monkeypatch.setattr(embed, "MAX_CHUNK_ROWS", 16)
    for name in ("cells.parquet", "cells.npz"):
        run(weights=weights, data=cell_folder, out=tmp_path / name)
    a, b = (load_embeddings(tmp_path / name) for name in ("cells.parquet", "cells.npz"))
    np.testing.assert_array_equal(a.features, b.features)
    assert (a.paths, a.sources, a.classes, a.columns) == (b.paths, b.sources, b.classes, b.columns)
    assert a.labels.tolist() == b.labels.tolist()
    assert a.columns == {"cls": (0, 192), "patch_mean": (192, 384)}


def test_half_precision_halves_the_numbers(tmp_path, weights, cell_folder):
    run("--half", weights=weights, data=cell_folder, out=tmp_path / "cells.parquet")
    assert str(pq.read_schema(tmp_path / "cells.parquet").field("cls").type.value_type) == "halffloat"
    assert load_embeddings(tmp_path / "cells.parquet").features.dtype == np.float32


def test_anndata_holds_embeddings_and_columns(tmp_path, weights, cell_folder):
    anndata = pytest.importorskip("anndata")
    run(weights=weights, data=cell_folder, out=tmp_path / "cells.h5ad")
    cells = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert cells.X.shape == (32, 192)
    assert set(cells.obsm) == {"X_cls", "X_patch_mean"}
    assert {"label", "source"} <= set(cells.obs)


def test_unreadable_images_are_listed_and_images_without_a_label_count(tmp_path, weights, cell_folder):
    images = tmp_path / "images"
    images.mkdir()
    for i, path in enumerate(sorted(cell_folder.rglob("*.jpg"))[:5]):
        shutil.copy(path, images / f"{i}.jpg")
    (images / "2.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    run(weights=weights, data=images, out=tmp_path / "cells.parquet")
    table = load_embeddings(tmp_path / "cells.parquet")
    assert [path[-5] for path in table.paths] == ["0", "1", "3", "4"]
    assert table.labels.tolist() == [-1] * 4
    listed = list(csv.DictReader((tmp_path / "cells.unreadable.csv").open()))
    assert [row["path"] for row in listed] == [str(images / "2.jpg")]
    assert listed[0]["row"] == "2"


def test_a_file_that_exists_is_kept_unless_told_otherwise(tmp_path, weights, cell_folder):
    out = tmp_path / "cells.parquet"
    out.write_text("precious")
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(weights=weights, data=cell_folder, out=out)
    run("--overwrite", weights=weights, data=cell_folder, out=out)
    assert pq.read_metadata(out).num_rows == 32


def test_files_of_other_kinds_are_refused_before_any_work(tmp_path, cell_folder):
    with pytest.raises(ValueError, match=r"must end in \.parquet, \.npz, \.h5ad"):
        run(weights="nowhere", data=cell_folder, out=tmp_path / "cells.csv")


def test_features_that_a_file_does_not_hold_are_named(tmp_path, weights, cell_folder):
    run("--features", "cls", weights=weights, data=cell_folder, out=tmp_path / "cells.parquet")
    with pytest.raises(ValueError, match="holds cls, not registers"):
        load_embeddings(tmp_path / "cells.parquet", "registers")
