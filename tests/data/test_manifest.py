import io
import multiprocessing
import os
import pickle
import tarfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from dinov2.data import manifest
from dinov2.data.decode import UnreadableImage
from dinov2.data.manifest import Catalog, DatasetNotFound, PathList, find_sources, open_index

LONG_AGO = time.time() - 3600


def fill(root, names, content=b"x"):
    """Make files, in folders whose modification times are an hour old."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    settle(root)
    return root


def settle(root):
    for folder, _, _ in os.walk(root):
        os.utime(folder, (LONG_AGO, LONG_AGO))


def index_of(path, **options):
    return open_index(find_sources(path)[0], **options)


def test_a_folder_is_read_recursively_in_sorted_order_with_extensions_in_any_case(tmp_path):
    names = ["b/2.PNG", "b/10.jpg", "a.jpeg", "b-c/x.TIFF", "b/deep/1.webp", "c.bmp", "z.Tif"]
    index = index_of(fill(tmp_path, names))
    want = ["a.jpeg", "c.bmp", "z.Tif", "b/10.jpg", "b/2.PNG", "b/deep/1.webp", "b-c/x.TIFF"]
    assert sorted(index.relative_paths()) == sorted(want)
    assert list(index.relative_paths()) == want
    assert [index.path(i) for i in range(len(index))] == [str(tmp_path / name) for name in want]


def test_what_is_no_image_is_counted_by_reason(tmp_path):
    fill(tmp_path, ["a.jpg", "b.txt", "c.TXT", "noext", ".hidden.jpg", ".cache/d.jpg", "scan.0001"])
    (tmp_path / "empty.png").touch()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    index = index_of(tmp_path)
    assert list(index.relative_paths()) == ["a.jpg"]
    assert index.skipped == {
        ".txt": 2,
        "hidden": 2,
        "no extension": 1,
        "other": 1,
        "empty file (0 bytes)": 1,
        "broken link": 1,
    }


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path):
    fill(tmp_path / "data", ["a/1.jpg", "b/2.jpg"])
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "data" / "b")
    fill(tmp_path / "elsewhere", ["3.jpg"])
    (tmp_path / "data" / "d").symlink_to(tmp_path / "elsewhere")
    assert list(index_of(tmp_path / "data").relative_paths()) == ["a/1.jpg", "b/2.jpg", "d/3.jpg"]


def test_names_that_are_not_utf8_survive(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    with open(name, "wb") as file:
        file.write(b"x")
    assert index_of(tmp_path).read(0) == b"x"
    assert os.fsencode(index_of(tmp_path).path(0)) == name


def test_an_unchanged_folder_is_not_scanned_again(tmp_path, monkeypatch):
    fill(tmp_path, ["a/1.jpg", "b/2.jpg"])
    first = index_of(tmp_path)
    monkeypatch.setattr(manifest, "_list_folder", lambda *_: pytest.fail("listed again"))
    assert index_of(tmp_path).folder == first.folder


def test_of_a_changed_tree_only_the_changed_folders_are_listed_again(tmp_path, monkeypatch):
    fill(tmp_path, ["a/1.jpg", "a/note.txt", "b/2.jpg", "b/c/3.jpg"])
    index_of(tmp_path)
    (tmp_path / "b" / "4.jpg").write_bytes(b"x")
    listed = []
    original = manifest._list_folder
    monkeypatch.setattr(manifest, "_list_folder", lambda path, *rest: (listed.append(path), original(path, *rest))[1])
    index = index_of(tmp_path)
    assert list(index.relative_paths()) == ["a/1.jpg", "b/2.jpg", "b/4.jpg", "b/c/3.jpg"]
    assert index.skipped == {".txt": 1}
    assert listed == [os.fsencode(tmp_path / "b")]


def test_a_folder_that_changed_just_before_the_scan_is_looked_at_again(tmp_path):
    fill(tmp_path, ["1.jpg"])
    os.utime(tmp_path)
    now = os.stat(tmp_path).st_mtime_ns
    index_of(tmp_path)
    (tmp_path / "2.jpg").write_bytes(b"x")
    os.utime(tmp_path, ns=(now, now))  # within one tick of the clock of a coarse file system
    assert len(index_of(tmp_path)) == 2


def test_a_removed_folder_leaves_the_index(tmp_path):
    fill(tmp_path, ["a/1.jpg", "b/2.jpg"])
    index_of(tmp_path)
    (tmp_path / "b" / "2.jpg").unlink()
    (tmp_path / "b").rmdir()
    assert list(index_of(tmp_path).relative_paths()) == ["a/1.jpg"]


def test_a_damaged_index_is_built_again(tmp_path):
    fill(tmp_path, ["1.jpg"])
    first = index_of(tmp_path)
    with open(os.path.join(first.folder, "files.arrow"), "r+b") as file:
        file.truncate(40)
    assert len(index_of(tmp_path)) == 1


def test_processes_that_scan_at_once_do_not_disturb_each_other(tmp_path):
    fill(tmp_path, [f"{folder}/{i}.jpg" for folder in range(20) for i in range(20)])
    with multiprocessing.get_context("fork").Pool(4) as pool:
        indexes = pool.map(index_of, [tmp_path] * 8, chunksize=1)
    assert {tuple(index.relative_paths()) for index in indexes} == {tuple(index_of(tmp_path).relative_paths())}


def test_an_index_that_was_replaced_long_ago_is_removed_and_a_recent_one_is_kept(tmp_path):
    fill(tmp_path, ["1.jpg"])
    old = index_of(tmp_path).folder
    (tmp_path / "2.jpg").write_bytes(b"x")
    recent = index_of(tmp_path).folder
    os.utime(old, (LONG_AGO - 8 * 24 * 3600,) * 2)
    (tmp_path / "3.jpg").write_bytes(b"x")
    index_of(tmp_path)
    assert (os.path.exists(old), os.path.exists(recent)) == (False, True)


def test_rows_beyond_one_batch_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_ROWS_PER_BATCH", 4)
    names = [f"{folder}/{i}.jpg" for folder in "abc" for i in range(7)]
    index = index_of(fill(tmp_path, names))
    assert [index.relative_path(i) for i in range(21)] == names == list(index.relative_paths())
    assert list(index.relative_paths(np.array([0, 3, 4, 19]))) == [names[i] for i in (0, 3, 4, 19)]
    assert index.rows_below(str(tmp_path / "b")).tolist() == list(range(7, 14))
    assert index.rows_named([str(tmp_path / names[5]), str(tmp_path / names[20]), "/else/0.jpg"]).tolist() == [5, 20]
    with pytest.raises(IndexError):
        index.path(21)


def test_an_index_pickles_as_its_folder(tmp_path):
    index = index_of(fill(tmp_path, [f"{i}.jpg" for i in range(2000)]))
    assert len(pickle.dumps(index)) < 500
    assert pickle.loads(pickle.dumps(index)).path(1999) == index.path(1999)


def test_a_missing_folder_says_which_part_of_its_path_exists(tmp_path):
    with pytest.raises(DatasetNotFound, match=rf"no such file or folder: {tmp_path}/a/b.*exists is {tmp_path}\)"):
        find_sources(str(tmp_path / "a" / "b"))


def test_a_folder_without_images_says_what_is_in_it(tmp_path):
    with pytest.raises(ValueError, match="it is empty"):
        index_of(tmp_path)
    fill(tmp_path, ["a.dcm", "b.dcm", "c.tar"])
    with pytest.raises(ValueError, match=r"found \.dcm 2, \.tar 1; for shards give .*/\*\.tar"):
        index_of(tmp_path)


def test_a_cache_folder_that_cannot_be_written_names_the_variable_to_set(tmp_path):
    fill(tmp_path / "data", ["1.jpg"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"set \$DINOV2_CACHE"):
        index_of(tmp_path / "data", cache_dir=tmp_path / "file")


def test_sources_may_be_lists_mappings_with_weights_and_globs(tmp_path):
    fill(tmp_path, ["x1/a.jpg", "x2/b.jpg", "y/c.jpg"])
    sources = find_sources([str(tmp_path / "x*"), {"path": str(tmp_path / "y"), "weight": 2}])
    assert [(source.kind, str(source), source.weight) for source in sources] == [
        ("folder", str(tmp_path / "x1"), 1),
        ("folder", str(tmp_path / "x2"), 1),
        ("folder", str(tmp_path / "y"), 2),
    ]


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ([], "empty list"),
        ({"weight": 1}, "names no data set"),
        ({"path": "/", "weight": 0}, "weight 0 of / is not positive"),
    ],
)
def test_what_is_no_data_set_is_refused(root, message):
    with pytest.raises(ValueError, match=message):
        find_sources(root)


def test_other_files_are_refused_with_the_reason(tmp_path):
    fill(tmp_path, ["a.jpg", "shard.tar.gz"])
    with pytest.raises(ValueError, match="neither a folder, nor a"):
        find_sources(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="no random access"):
        find_sources(tmp_path / "shard.tar.gz")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_csv_gives_its_rows_in_its_order_with_label_source_and_group(tmp_path, delimiter):
    rows = [
        ("Label", "PATH", "patient", "source", "remark"),
        ("b", "x/2.JPG", "p2", "hospital", "a"),
        ("a", "x/1.jpg", "p1", "hospital", "b"),
        ("c", "notes.txt", "p1", "hospital", "c"),
    ]
    (tmp_path / "cells.csv").write_text("\ufeff" + "\n".join(delimiter.join(row) for row in rows), encoding="utf-8")
    index = index_of(tmp_path / "cells.csv")
    assert [index.path(i) for i in range(2)] == [str(tmp_path / "x/2.JPG"), str(tmp_path / "x/1.jpg")]
    assert index.column("label").to_pylist() == ["b", "a"]
    assert index.column("group").to_pylist() == ["p2", "p1"]
    assert index.column("source").to_pylist() == ["hospital"] * 2
    assert index.skipped == {".txt": 1}


def test_a_parquet_manifest_may_point_anywhere(tmp_path):
    fill(tmp_path / "images", ["1.jpg"], b"one")
    fill(tmp_path / "far", ["2.jpg"], b"two")
    table = pa.table({"path": ["1.jpg", str(tmp_path / "far" / "2.jpg")], "label": [3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "cells.parquet")
    index = index_of(tmp_path / "cells.parquet", root=str(tmp_path / "images"))
    assert [index.read(i) for i in range(2)] == [b"one", b"two"]
    assert index.column("label").to_pylist() == ["3", "4"]
    assert index.rows_named([str(tmp_path / "far" / "2.jpg"), str(tmp_path / "images" / "1.jpg")]).tolist() == [0, 1]
    assert index.rows_below(str(tmp_path / "cells.parquet")).tolist() == [0, 1]


def test_a_folder_is_found_in_a_manifest_however_its_paths_are_written(tmp_path):
    paths = [f"{tmp_path}/a/0.jpg", "a/1.jpg", "./a/b/2.jpg", f"../{tmp_path.name}/a/3.jpg", "ab/4.jpg", "5.jpg"]
    (tmp_path / "cells.csv").write_text("path\n" + "\n".join(paths) + "\n")
    (index,) = Catalog.open(tmp_path / "cells.csv", cache_dir=tmp_path / "cache").indexes
    assert index.rows_below(str(tmp_path / "a")).tolist() == [0, 1, 2, 3]
    assert index.rows_below(str(tmp_path / "a" / "b")).tolist() == [2]
    assert index.rows_below(str(tmp_path)).tolist() == [0, 1, 2, 3, 4, 5]
    assert index.rows_below(str(tmp_path / "c")).tolist() == []


def test_a_changed_csv_is_read_again(tmp_path):
    csv = tmp_path / "cells.csv"
    csv.write_text("path\na.jpg\n")
    assert len(index_of(csv)) == 1
    csv.write_text("path\na.jpg\nb.jpg\n")
    assert len(index_of(csv)) == 2


def test_a_manifest_without_paths_names_its_columns(tmp_path):
    (tmp_path / "cells.csv").write_text("file,label\na.jpg,x\n")
    with pytest.raises(ValueError, match=r"no column `path`; its columns are file, label"):
        index_of(tmp_path / "cells.csv")


def test_a_ragged_csv_is_refused_with_its_name(tmp_path):
    (tmp_path / "cells.csv").write_text("path,label\na.jpg,x,y\n")
    with pytest.raises(ValueError, match=r"cells\.csv: .*Expected 2 columns"):
        index_of(tmp_path / "cells.csv")


def write_shard(path, members):
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))


def test_shards_give_random_access_to_their_members(tmp_path):
    write_shard(tmp_path / "s-1.tar", [("k1.jpg", b"first"), ("k1.cls", b"7\n"), ("d/k2.v.png", b"second" * 500)])
    write_shard(tmp_path / "s-0.tar", [("k0.JPG", b"zero"), ("k0.json", b"{}"), ("k3.jpg", b"")])
    sources = find_sources(str(tmp_path / "*.tar"))
    assert len(sources) == 1
    index = open_index(sources[0])
    assert [index.relative_path(i) for i in range(3)] == ["s-0.tar/k0.JPG", "s-1.tar/k1.jpg", "s-1.tar/d/k2.v.png"]
    assert [index.read(i) for i in (2, 0, 1)] == [b"second" * 500, b"zero", b"first"]
    assert index.column("label").to_pylist() == ["", "7", ""]
    assert index.skipped == {".json": 1, "empty file (0 bytes)": 1}
    assert index.rows_below(str(tmp_path / "s-1.tar")).tolist() == [1, 2]


def test_a_shard_that_is_cut_off_keeps_its_good_members(tmp_path):
    write_shard(tmp_path / "s.tar", [("a.jpg", b"a" * 600), ("b.jpg", b"b" * 5000)])
    whole = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[: 512 + 1024 + 512 + 100])
    index = index_of(tmp_path / "s.tar")
    assert index.read(0) == b"a" * 600
    with pytest.raises(UnreadableImage, match=r"s\.tar/b\.jpg: the shard ends 4900 bytes too early"):
        index.read(1)
    assert index.skipped == {"damaged shard": 1}


def test_a_catalog_numbers_its_sources_through(tmp_path):
    fill(tmp_path, ["a/1.jpg", "a/2.jpg", "b/3.jpg"])
    catalog = Catalog.open([tmp_path / "a", tmp_path / "b"])
    paths = PathList(catalog)
    assert list(paths) == [str(tmp_path / name) for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg")]
    assert paths[-1] == paths[2]
    assert list(paths[1:]) == list(paths)[1:]
    assert list(paths[::-1][:2]) == [paths[2], paths[1]]
    assert catalog.rows_below(str(tmp_path / "b")).tolist() == [2]
    with pytest.raises(IndexError):
        paths[3]
    assert "3 paths" in repr(paths)
