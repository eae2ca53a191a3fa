import hashlib
import re
import time

import cv2
import numpy as np
import pytest

from dinov2.data import synthetic
from dinov2.data.synthetic import CLASSES, draw_cell, generate


def rng(*seed):
    return np.random.default_rng([0, *seed])


def digest(paths):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


@pytest.mark.parametrize("cell_class", CLASSES)
def test_every_class_is_an_rgb_picture_with_something_darker_than_its_background_in_the_middle(cell_class):
    for index in range(4):
        image = draw_cell(rng(index), cell_class, source=0, size=96)
        assert image.shape == (96, 96, 3)
        assert image.dtype == np.uint8
        background = np.percentile(image[..., 1], 90)
        assert image[36:60, 36:60, 1].min() < 0.75 * background


@pytest.mark.parametrize("size", [32, 65, 128, 300])
def test_a_picture_has_the_size_that_was_asked_for(size):
    assert draw_cell(rng(), "monocyte", size=size).shape == (size, size, 3)


def test_equal_random_states_draw_equal_pictures_and_others_do_not():
    first, again, other = (draw_cell(rng(seed), "neutrophil", size=64) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 5


def test_sources_differ_in_their_background_far_more_than_pictures_of_one_source():
    def background(source, index):
        return np.percentile(draw_cell(rng(index), "platelet", source, 64).reshape(-1, 3), 85, axis=0)

    colours = np.array([[background(source, index) for index in range(8)] for source in range(6)])
    within = colours.std(axis=1).mean()
    between = colours.mean(axis=1).std(axis=0).mean()
    assert between > 2 * within


def test_lymphocyte_nuclei_fill_their_cell_and_platelets_are_small():
    def dark_area(cell_class):
        images = [draw_cell(rng(index), cell_class, size=96)[..., 1] for index in range(12)]
        return np.mean([(image < 90).mean() for image in images])

    assert dark_area("platelet") < 0.01 < dark_area("lymphocyte") < dark_area("blast")


def test_colour_alone_does_not_tell_the_classes_apart():
    def histograms(start, count):
        rows = []
        for cell_class in CLASSES:
            for index in range(start, start + count):
                image = draw_cell(rng(index), cell_class, size=48)
                counts = cv2.calcHist([image], [0, 1, 2], None, [8, 8, 8], [0, 256] * 3).ravel()
                rows.append(np.sqrt(counts / counts.sum()))
        return np.array(rows), np.repeat(np.arange(len(CLASSES)), count)

    train, train_labels = histograms(0, 20)
    test, test_labels = histograms(100, 8)
    nearest = (test @ train.T).argmax(axis=1)
    accuracy = (train_labels[nearest] == test_labels).mean()
    assert 1.5 / len(CLASSES) < accuracy < 0.65


def test_one_source_is_a_folder_per_class_and_a_labelled_dataset_reads_it(tmp_path):
    from dinov2.data.datasets.custom_image_datasets import LabelledDataset

    paths = generate(tmp_path / "cells", ["platelet", "basophil"], per_class=3, size=40, progress=False)
    assert len(paths) == 6
    assert sorted(path.name for path in (tmp_path / "cells").iterdir()) == ["basophil", "platelet"]
    dataset = LabelledDataset(tmp_path / "cells")
    assert len(dataset) == 6
    assert list(dataset.classes) == ["basophil", "platelet"]


def test_several_sources_are_a_folder_each(tmp_path):
    paths = generate(tmp_path, ["platelet"], per_class=2, sources=2, size=40, progress=False)
    assert [path.relative_to(tmp_path).parts[:2] for path in paths[::2]] == [
        ("source_0", "platelet"),
        ("source_1", "platelet"),
    ]


def test_files_depend_neither_on_the_number_of_workers_nor_on_the_other_classes(tmp_path):
    options = {"per_class": 20, "size": 40, "seed": 3, "progress": False}
    alone = generate(tmp_path / "a", ["neutrophil"], **options)
    together = generate(tmp_path / "b", ["blast", "neutrophil"], num_workers=2, **options)
    assert digest(alone) == digest(together[20:])
    other_seed = generate(tmp_path / "c", ["neutrophil"], **options | {"seed": 4})
    assert not set(digest(alone)) & set(digest(other_seed))


def test_a_folder_with_something_in_it_is_left_alone_unless_overwriting_is_asked_for(tmp_path):
    precious = tmp_path / "notes.txt"
    precious.write_text("mine")
    with pytest.raises(ValueError, match=r"not empty.*--overwrite"):
        generate(tmp_path, ["blast"], per_class=1, progress=False)
    assert precious.read_text() == "mine"
    generate(tmp_path, ["blast"], per_class=1, size=40, progress=False, overwrite=True)
    assert not precious.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ["neutrofil"]}, "unknown cell classes neutrofil; known: neutrophil, "),
        ({"classes": []}, "classes must be at least 1, got 0"),
        ({"per_class": 0}, "per_class must be at least 1, got 0"),
        ({"sources": -1}, "sources must be at least 1, got -1"),
        ({"size": 8}, "size must be at least 32 pixels, got 8"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(tmp_path / "cells", progress=False, **arguments)
    assert not (tmp_path / "cells").exists()


def test_an_unknown_class_and_a_negative_source_are_refused_by_draw_cell():
    with pytest.raises(ValueError, match="unknown cell class 'x'"):
        draw_cell(rng(), "x")
    with pytest.raises(ValueError, match="source must be 0 or more, got -1"):
        draw_cell(rng(), "blast", source=-1)


def test_a_thousand_pictures_a_minute_are_drawn_on_one_core():
    start = time.process_time()
    for index in range(24):
        draw_cell(rng(index), CLASSES[index % len(CLASSES)])
    assert 24 / (time.process_time() - start) * 60 > 1000


def test_the_command_line_writes_pictures_and_explains_mistakes(tmp_path, capsys):
    out = tmp_path / "cells"
    options = ["--classes", "platelet", "--per-class", "2", "--size", "40", "--seed", "1"]
    assert synthetic.main(["--out", str(out), *options]) == 0
    assert len(list(out.rglob("*.jpg"))) == 2
    assert "2 pictures in 1 folders" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        synthetic.main(["--out", str(out), *options])
    assert stop.value.code == 2
    assert "not empty" in capsys.readouterr().err
