import csv
import json
import os
import re
import shutil
import struct
import time
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinov2.data import audit as audit_module
from dinov2.data.audit import check, main
from dinov2.data.datasets import ImageDataset
from dinov2.data.report import make_augmentation


@pytest.fixture
def cells(cell_folder, tmp_path):
    """Drawn cells, 32 in four classes, to be damaged."""
    return shutil.copytree(cell_folder, tmp_path / "cells")


def files(cells):
    return sorted(cells.glob("*/*.jpg"))


def names(audit, code):
    return [os.path.basename(audit.catalog.path(int(row))) for row in audit.findings.get(code, ())]


def folders_of(audit, code):
    return {os.path.basename(os.path.dirname(audit.catalog.path(int(row)))) for row in audit.findings[code]}


def bomb():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 90_000, 90_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_clean_cells_have_no_findings_and_exit_code_0(cells, capsys):
    audit = check([str(cells)])
    assert len(audit.records) == 32
    assert audit.counts == {}
    assert main([str(cells), "--workers", "0"]) == 0
    assert "nothing is wrong with them" in capsys.readouterr().out


def test_files_without_pixels_are_told_apart(cells):
    paths = files(cells)
    paths[0].write_bytes(paths[0].read_bytes()[:900])
    paths[1].write_bytes(b"rubbish")
    (cells / "bomb.png").write_bytes(bomb())
    (cells / "lost.tif").touch()
    image = Image.open(paths[2])
    for format, keep in (("png", 0.7), ("bmp", 0.7), ("webp", 0.7), ("tiff", 0.7)):
        image.save(cells / f"cut.{format}")
        data = (cells / f"cut.{format}").read_bytes()
        (cells / f"cut.{format}").write_bytes(data[: int(len(data) * keep)])
    audit = check([str(cells)])
    assert names(audit, "truncated") == ["cut.bmp", "cut.png", "cut.tiff", "cut.webp", paths[0].name]
    assert names(audit, "unreadable") == [paths[1].name]
    assert names(audit, "bomb") == ["bomb.png"]
    assert audit.empty == [str(cells / "lost.tif")]
    assert audit.hurts
    row = int(audit.findings["unreadable"][0])
    assert audit.detail("unreadable", row) == "not an image of a known format (starts with b'rubbish')"


def test_odd_files_are_noted_but_do_not_fail_the_check(cells):
    image = Image.open(files(cells)[0])
    deep = np.asarray(image.convert("L")).astype(np.uint16) * 9
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = image.copy()
    rgba.putalpha(200)
    odd = {
        "wrong_extension": lambda path: image.save(path / "png.jpg", "PNG"),
        "no_end": lambda path: (path / "cut.jpg").write_bytes(files(cells)[5].read_bytes()[:-2]),
        "deep": lambda path: Image.fromarray(deep).save(path / "16.png"),
        "cmyk": lambda path: image.convert("CMYK").save(path / "cmyk.jpg"),
        "alpha": lambda path: rgba.save(path / "alpha.png"),
        "frames": lambda path: image.save(path / "s.tif", save_all=True, append_images=[image.rotate(90)]),
        "rotated": lambda path: image.save(path / "exif.jpg", exif=exif),
        "small": lambda path: image.resize((16, 16)).save(path / "icon.png"),
        "large": lambda path: image.resize((600, 600)).save(path / "big.jpg"),
        "elongated": lambda path: image.crop((0, 10, 64, 30)).save(path / "strip.png"),
    }
    for code, save in odd.items():
        (cells / code).mkdir()
        save(cells / code)
    audit = check([str(cells)])
    found = {code: folders_of(audit, code) for code in odd}
    assert all(code in found[code] for code in odd)
    assert {code: folders - {code} for code, folders in found.items() if folders != {code}} == {"small": {"elongated"}}
    assert not audit.hurts


def test_blank_images_hurt_and_do_not_count_as_duplicates_of_each_other(cells):
    Image.new("RGB", (64, 64), "white").save(cells / "white.png")
    Image.new("RGB", (64, 64), (10, 10, 11)).save(cells / "black.png")
    audit = check([str(cells)])
    assert names(audit, "blank") == ["black.png", "white.png"]
    assert set(audit.counts) == {"blank"}


def test_files_without_pixels_are_no_duplicates(cells):
    for path in files(cells)[:3]:
        path.write_bytes(b"<html>404 Not Found</html>")
    assert check([str(cells)]).counts == {"unreadable": 3}


def test_copies_are_found_exact_and_near(cells):
    first, second = files(cells)[3], files(cells)[20]
    shutil.copy(first, cells / "z_copy.jpg")
    shutil.copy(first, cells / "z_copy2.jpg")
    Image.open(second).resize((57, 57)).save(cells / "z_small.png")
    audit = check([str(cells)])
    paths = {
        code: [[os.path.basename(audit.catalog.path(int(row))) for row in group] for group in groups]
        for code, groups in audit.groups.items()
    }
    assert paths["duplicate"] == [["z_copy.jpg", "z_copy2.jpg", first.name]]
    assert paths["near_duplicate"] == [["z_small.png", second.name]]
    excluded = [os.path.basename(audit.catalog.path(int(row))) for row in audit.excluded()["duplicate"]]
    assert excluded == ["z_copy2.jpg", first.name]


@pytest.mark.parametrize("how", ["folder", "inner folder", "list"])
def test_images_that_are_also_held_out_are_leaks_and_leave_the_training_side(cells, tmp_path, how):
    held = (cells if how == "inner folder" else tmp_path) / "held"
    held.mkdir()
    for path in files(cells)[:2]:
        shutil.copy(path, held / path.name)
    Image.open(files(cells)[9]).resize((60, 60)).save(held / "rescaled.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(held / "other.png")
    data, held_out = [str(cells)], str(held)
    if how == "list":
        (tmp_path / "held.txt").write_text("\n".join(str(path) for path in held.iterdir()))
        data, held_out = [str(cells), str(held)], str(tmp_path / "held.txt")
    audit = check(data, held_out=[held_out])
    assert len(audit.findings["leak"]) == 6
    assert len(audit.held_out) == 4
    leaving = {audit.catalog.path(int(row)) for row in audit.excluded()["leak"]}
    assert leaving == {str(files(cells)[place]) for place in (0, 1, 9)}


def test_the_command_writes_what_it_found_and_training_takes_its_list(cells, tmp_path, capsys):
    files(cells)[0].write_bytes(b"rubbish")
    shutil.copy(files(cells)[1], cells / "again.jpg")
    page, found, table, bad = (tmp_path / name for name in ("r.html", "r.json", "r.csv", "bad.txt"))
    arguments = f"--report {page} --json {found} --csv {table} --exclude-list {bad}".split()
    assert main([str(cells), *arguments, "--workers", "0", "--show-crops", "2"]) == 1
    printed = capsys.readouterr().out
    assert "33 images" in printed
    assert "would hurt training:\n         1  unreadable" in printed
    assert f"2 images to leave out: train.exclude={bad}" in printed
    report = json.loads(found.read_text())
    assert (report["images"], report["hurts"]) == (33, True)
    assert report["problems"]["unreadable"]["images"][0]["path"] == str(files(cells)[0])
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert sorted(row["problem"] for row in rows) == ["duplicate", "duplicate", "unreadable"]
    html, pictures = re.subn("data:image/jpeg;base64,[^']*", "", page.read_text())
    assert pictures == 2 + 2 * 11
    assert "http" not in html
    assert "$" not in html
    dataset = ImageDataset(cells, exclude=bad)
    assert (dataset.summary.excluded, len(dataset)) == (2, 31)


def test_a_name_that_is_not_utf8_or_looks_like_html_is_reported_all_the_same(cells, tmp_path, capsys):
    for name in (b"caf\xe9.jpg", b"<script>.jpg"):
        with open(os.path.join(os.fsencode(cells), name), "wb") as file:
            file.write(b"rubbish")
    out = [str(tmp_path / name) for name in ("r.html", "r.json", "r.csv", "bad.txt")]
    options = ("--report", "--json", "--csv", "--exclude-list")
    arguments = [word for pair in zip(options, out) for word in pair]
    assert main([str(cells), *arguments, "--workers", "0"]) == 1
    assert "unreadable" in capsys.readouterr().out
    assert "<script>" not in (tmp_path / "r.html").read_text()
    assert ImageDataset(cells, exclude=tmp_path / "bad.txt").summary.excluded == 2


def test_statistics_are_those_of_the_images(cells):
    audit = check([str(cells)])
    pixels = np.stack([np.asarray(Image.open(path)) for path in files(cells)]).reshape(-1, 3) / 255
    np.testing.assert_allclose(audit.statistics.mean, pixels.mean(0), atol=1e-5)
    np.testing.assert_allclose(audit.statistics.std, pixels.std(0), atol=1e-5)
    assert [folder.images for folder in audit.folders] == [8] * 4
    assert audit.folders[0].median_size == (64, 64)


def test_an_interrupted_check_goes_on_where_it_stopped(cells, monkeypatch):
    settle(cells)
    monkeypatch.setattr(audit_module, "_CHUNK", 4)
    want = check([str(cells)]).records.copy()
    examine, calls = audit_module.examine, []

    def stops(data, path, channels):
        if len(calls) == 10:
            raise KeyboardInterrupt
        calls.append(path)
        return examine(data, path, channels)

    monkeypatch.setattr(audit_module, "examine", stops)
    with pytest.raises(KeyboardInterrupt):
        check([str(cells)])
    monkeypatch.setattr(audit_module, "examine", lambda *arguments: calls.append(arguments) or examine(*arguments))
    audit = check([str(cells)], resume=True)
    assert len(calls) == 10 + 32 - 8  # two chunks of four were kept
    np.testing.assert_array_equal(audit.records, want)
    calls.clear()
    check([str(cells)], resume=True)
    assert calls == []


def settle(root):
    """Make all folders an hour old, so that their index is final."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (time.time() - 3600,) * 2)


def test_processes_give_what_one_process_gives(cells):
    files(cells)[4].write_bytes(b"rubbish")
    np.testing.assert_array_equal(check([str(cells)], workers=2).records, check([str(cells)]).records)


def test_a_file_that_kills_its_process_is_named_and_the_others_are_examined(cells, monkeypatch):
    examine, victim = audit_module.examine, str(files(cells)[6])

    def dies(data, path, channels):
        return os._exit(1) if path == victim else examine(data, path, channels)

    monkeypatch.setattr(audit_module, "examine", dies)
    monkeypatch.setattr(audit_module, "_CHUNK", 8)
    audit = check([str(cells)], workers=1)
    assert len(audit.records) == 32
    assert names(audit, "unreadable") == [os.path.basename(victim)]
    assert "ends the process" in next(iter(audit.reasons.values()))


def test_many_channel_images_are_checked_with_their_channels(tmp_path):
    for i in range(3):
        planes = np.random.default_rng(i).integers(0, 60_000, (5, 40, 40), dtype=np.uint16)
        tifffile.imwrite(tmp_path / f"{i}.tif", planes, photometric="minisblack", metadata={"axes": "CYX"})
    audit = check([str(tmp_path)], channels=5)
    assert set(audit.counts) == {"deep"}
    assert len(audit.statistics.mean) == 5
    np.testing.assert_allclose(audit.statistics.mean, 0.5 * 60_000 / 65_535, atol=0.02)


def test_a_missing_folder_ends_with_exit_code_2_and_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "nothing")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("dinov2 check: no such file or folder")


def test_crops_follow_the_sections_of_the_config(tmp_path):
    (tmp_path / "cells.yaml").write_text(
        "crops: {local_crops_number: 3, global_crops_size: 56}\naugmentations: {rotate90: true}\ntrain: {seed: 1}\n"
    )
    augmentation = make_augmentation(str(tmp_path / "cells.yaml"))
    sizes = (augmentation.global_crops_size, augmentation.local_crops_size)
    assert (augmentation.local_crops_number, sizes) == (3, (56, 96))
    assert make_augmentation(None).local_crops_number == 8


@pytest.mark.parametrize("content", [None, "augmentations: {horizontal_flap: 0.5}", "augmentations: {hue: 9}"])
def test_a_config_that_cannot_be_drawn_is_refused_before_the_images_are_read(tmp_path, capsys, content):
    config = tmp_path / "c.yaml"
    if content:
        config.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "not-looked-at"), "--show-crops", "1", "--config-file", str(config)])
    assert "c.yaml: " in capsys.readouterr().err


def test_the_real_cells_hold_no_exact_copies(shared_data):
    audit = check([str(shared_data / "raabin")])
    assert len(audit.records) == 320
    assert not audit.hurts
