import csv
import json
import shutil

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dinov2.eval import cross_validation
from dinov2.eval.cross_validation import (
    Split,
    apply_label_map,
    check_label_map,
    colour_histogram,
    copies_across,
    cross_validate,
    hold_out,
    main,
    make_folds,
    read_label_map,
)
from dinov2.eval.features import FeatureTable, concatenate
from dinov2.eval.report import Report, markdown_table, score
from dinov2.models.vision_transformer import vit_tiny
from dinov2.models.weights import save_backbone


def table(count=90, classes=3, seed=0, noise=1.0, groups=(), prefix=""):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(7).standard_normal((classes, 10))
    features = (centres[labels] + noise * rng.standard_normal((count, 10))).astype(np.float32)
    paths = [f"{prefix}{i:03}.png" for i in range(count)]
    return FeatureTable(features, labels, paths, list("abcdefgh"[:classes]), groups=groups, columns={"cls": (0, 10)})


# --------------------------------------------------------------------------- folds


def test_every_image_is_tested_once_and_every_fold_holds_every_class_alike():
    t = table()
    splits = make_folds(t, 5)
    assert sorted(np.concatenate([s.test for s in splits])) == list(range(90))
    for split in splits:
        assert not set(split.train) & set(split.test)
        assert np.bincount(t.labels[split.test]).tolist() == [6, 6, 6]


def test_folds_do_not_depend_on_the_order_of_the_rows():
    t = table()
    order = np.random.default_rng(1).permutation(len(t))
    shuffled = t.take(order)
    for straight, mixed in zip(make_folds(t, 4), make_folds(shuffled, 4), strict=True):
        assert {t.paths[i] for i in straight.test} == {shuffled.paths[i] for i in mixed.test}


def test_images_of_a_patient_are_in_one_fold_and_those_without_a_patient_anywhere():
    groups = [f"patient{i // 6 % 10}" if i < 60 else "" for i in range(90)]
    splits = make_folds(table(groups=groups), 5)
    for patient in set(groups) - {""}:
        assert sum(any(groups[i] == patient for i in s.test) for s in splits) == 1
    assert all(any(groups[i] == "" for i in s.test) for s in splits)


def test_a_class_with_fewer_images_than_folds_is_named_with_the_ways_out():
    t = table(30, classes=3)
    t = t.take(np.flatnonzero((t.labels != 1) | (np.arange(30) < 6)))  # two images of class b
    with pytest.raises(ValueError, match=r"fewer images than the 5 folds: \{'b': 2\}.*--folds.*--exclude-classes b"):
        make_folds(t, 5)


def test_one_class_is_nothing_to_tell_apart():
    t = table(10, classes=1)
    with pytest.raises(ValueError, match=r"only one class \(a\)"):
        make_folds(t, 5)


def test_fewer_patients_than_folds_are_refused():
    with pytest.raises(ValueError, match=r"2 groups .* cannot make 5 folds"):
        make_folds(table(groups=[f"p{i % 2}" for i in range(90)]), 5)


def test_settings_are_chosen_on_patients_that_the_classifier_does_not_know():
    labels = np.arange(60) % 3
    groups = np.array([f"patient{i // 5}" for i in range(60)])
    held = hold_out(labels, groups, 0.2)
    assert 0 < held.sum() < 30
    assert not set(groups[held]) & set(groups[~held])
    assert hold_out(labels, (), 0.2).sum() == 12  # four of each class


# --------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("method", "theirs"),
    [
        ("knn_5", KNeighborsClassifier(5, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))),
        ("linear", make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))),
    ],
)
def test_cross_validated_predictions_and_scores_are_those_of_scikit_learn(method, theirs):
    t = table(noise=2.0)
    splits = make_folds(t, 5)
    outcome = cross_validate(t, splits, method)
    f1 = []
    for split in splits:
        theirs.fit(t.features[split.train], t.labels[split.train])
        expected = theirs.predict(t.features[split.test])
        np.testing.assert_array_equal(outcome.probabilities[split.test].argmax(axis=1), expected)
        f1.append(f1_score(t.labels[split.test], expected, average="macro"))
    scored = score(outcome, t)
    assert scored.mean("macro_f1") == pytest.approx(np.mean(f1))
    assert scored.std("macro_f1") == pytest.approx(np.std(f1, ddof=1))
    low, high = scored.intervals["macro_f1"]
    assert low < scored.pooled["macro_f1"] < high


@pytest.mark.parametrize("method", ["knn_1", "linear", "log_regression"])
def test_calibration_never_changes_a_prediction(method):
    t = table(noise=2.0)
    outcome = cross_validate(t, make_folds(t, 3), method)
    np.testing.assert_array_equal(outcome.calibrated.argmax(axis=1), outcome.probabilities.argmax(axis=1))
    assert len(outcome.temperatures) == 3


def test_a_fixed_test_set_is_scored_whole_and_has_no_deviation():
    t = concatenate([table(60), table(30, seed=5, prefix="test")])
    outcome = cross_validate(t, [Split(np.arange(60), np.arange(60, 90))], "knn_1")
    assert outcome.rows.tolist() == list(range(60, 90))
    assert score(outcome, t).std("accuracy") is None


def test_tables_are_joined_by_class_name():
    first = table(4, classes=2)
    second = FeatureTable(
        first.features, np.array([0, 1, 0, 1]), ["w", "x", "y", "z"], ["b", "z"], columns=first.columns
    )
    joined = concatenate([first, second])
    assert joined.classes == ["a", "b", "z"]
    assert [joined.classes[i] for i in joined.labels] == ["a", "b", "a", "b", "b", "z", "b", "z"]


# --------------------------------------------------------------------------- label maps


def test_label_maps_in_yaml_and_csv_say_the_same(tmp_path):
    (tmp_path / "map.yaml").write_text("band: Neutrophil\nplatelet:\n1: one\n")
    (tmp_path / "map.csv").write_text("from,to\nband,Neutrophil\nplatelet,\n1,one\n")
    expected = {"band": "Neutrophil", "platelet": "", "1": "one"}
    assert read_label_map(tmp_path / "map.yaml") == read_label_map(tmp_path / "map.csv") == expected


def test_a_label_map_renames_merges_and_leaves_out_with_an_account():
    mapped, left_out = apply_label_map(table(9), {"a": "x", "b": "x", "c": ""})
    assert mapped.classes == ["x"]
    assert mapped.labels.tolist() == [0] * 6
    assert left_out == {"c": 3}


def test_a_label_map_with_a_typing_error_names_the_class_that_was_meant():
    lymphocytes = FeatureTable(np.zeros((1, 1), np.float32), np.zeros(1, np.int64), ["x"], ["lymphocyte"])
    with pytest.raises(ValueError, match=r"'lymfocyte'.*did you mean 'lymphocyte'"):
        check_label_map({"lymfocyte": "L"}, [lymphocytes])


def test_a_label_map_without_the_right_header_is_refused(tmp_path):
    (tmp_path / "map.csv").write_text("old,new\na,b\n")
    with pytest.raises(ValueError, match="from,to"):
        read_label_map(tmp_path / "map.csv")


# --------------------------------------------------------------------------- the command


def test_the_colour_histogram_counts_colours():
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    images[0, :, 0, 0] = torch.tensor([255, 0, 32])  # the bin (7, 0, 1)
    histogram = colour_histogram(images)["histogram"][0]
    assert histogram[0] == pytest.approx(np.sqrt(3 / 4))
    assert histogram[7 * 64 + 1] == pytest.approx(np.sqrt(1 / 4))
    assert histogram.square().sum() == pytest.approx(1)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "run" / "teacher.safetensors"
    path.parent.mkdir()
    save_backbone(vit_tiny(patch_size=28, img_size=56, depth=2, num_register_tokens=2, init_values=1.0), path)
    return str(path)


def evaluate(*words, report):
    return main([*words, "--report", str(report), "--image-size", "56", "--num-workers", "0", "--k", "1", "3"])


def test_evaluate_writes_its_report_and_extracts_features_once(tmp_path, weights, cell_folder, monkeypatch, capsys):
    broken = tmp_path / "cells"
    shutil.copytree(cell_folder, broken)
    victim = sorted(broken.rglob("*.jpg"))[3]
    victim.write_bytes(victim.read_bytes()[:200])
    (victim.parent / "empty.jpg").touch()
    words = ["--weights", weights, "--data", str(broken), "--folds", "3", "--cache-dir", str(tmp_path / "cache")]
    assert evaluate(*words, "--features", "cls", "registers", report=tmp_path / "report") == 0
    printed = capsys.readouterr().out
    assert "run/teacher" in printed
    assert "colour histogram" in printed
    assert "untrained vit_tiny" not in printed.split("classifier")[0]

    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["images"] == 31
    assert [u["path"] for u in report["unreadable"]] == [str(victim)]
    assert len(report["results"]) == (2 + 2 + 1) * 4  # model, untrained: two kinds of features; histogram: one
    folds = list(csv.DictReader((tmp_path / "report" / "folds.csv").open()))
    assert sorted({row["fold"] for row in folds}) == ["0", "1", "2"]
    assert len(folds) == 31
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Could not be read, and are not scored: 1 image(s)" in text
    assert "Files that are not scored: empty file (0 bytes) 1." in text
    assert report["skipped"] == {"empty file (0 bytes)": 1}
    for line in text.splitlines():
        if line.startswith("!["):
            assert (tmp_path / "report" / line.split("(")[1].rstrip(")")).stat().st_size > 5000

    def never(*args, **kwargs):
        raise AssertionError("features are extracted again")

    monkeypatch.setattr(cross_validation, "extract", never)
    monkeypatch.setattr(cross_validation, "extract_with", never)
    assert evaluate(*words, "--features", "patch_mean", report=tmp_path / "again") == 0


def test_cross_source_goes_through_a_label_map(tmp_path, weights, cell_folder, capsys):
    classes = sorted(p.name for p in cell_folder.iterdir())
    other = tmp_path / "other"
    for i, name in enumerate(classes):
        shutil.copytree(cell_folder / name, other / f"Class{i}")
    words = ["--weights", weights, "--data", str(cell_folder), "--test", str(other), "--no-cache", "--no-baselines"]
    with pytest.raises(ValueError, match=r"classes \['Class0'.*--label-map"):
        evaluate(*words, report=tmp_path / "report")

    lines = [f"{name}: Class{i}" for i, name in enumerate(classes)] + ["Class3:"]
    (tmp_path / "map.yaml").write_text("\n".join(lines))
    assert evaluate(*words, "--label-map", str(tmp_path / "map.yaml"), report=tmp_path / "report") == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["splits"] == [{"train": 32, "test": 24}]
    assert report["left_out"] == {"Class3": 8}
    assert report["copies"] == 24  # the other source is a copy, which no score may hide
    assert "24 test images are copies" in (tmp_path / "report" / "report.md").read_text()
    assert report["results"][0]["scores"]["accuracy"]["all_images"] == 1  # 1-NN finds the same image
    assert {"source_balanced_accuracy", "silhouette_class", "silhouette_source"} <= set(report["batch_effects"][0])


def test_one_fold_is_not_a_cross_validation(tmp_path, weights, cell_folder):
    with pytest.raises(ValueError, match="two folds"):
        evaluate("--weights", weights, "--data", str(cell_folder), "--folds", "1", report=tmp_path)


def test_a_vote_needs_a_neighbour(tmp_path, weights, cell_folder):
    with pytest.raises(ValueError, match="--k 0"):
        main(["--weights", weights, "--data", str(cell_folder), "--k", "0", "--report", str(tmp_path)])


def test_an_image_cannot_be_learned_from_and_tested(tmp_path, weights, cell_folder):
    one_class = next(iter(sorted(cell_folder.iterdir())))
    (tmp_path / "test.csv").write_text(f"path,label\n{next(iter(one_class.glob('*.jpg')))},{one_class.name}\n")
    with pytest.raises(ValueError, match=r"1 images are both in --data and in --test, such as .*\.jpg"):
        evaluate(
            "--weights", weights, "--data", str(cell_folder), "--test", str(tmp_path / "test.csv"), report=tmp_path
        )


def test_a_copy_in_another_fold_is_found_and_one_in_the_same_fold_is_no_harm():
    splits = [Split(np.array([2, 3]), np.array([0, 1])), Split(np.array([0, 1]), np.array([2, 3]))]
    assert copies_across(splits, np.array([7, 7, 8, 9], np.uint64)).tolist() == []
    assert copies_across(splits, np.array([7, 8, 9, 7], np.uint64)).tolist() == [0, 3]


def test_the_main_table_is_the_readmes():
    t = table()
    report = Report(t, [], [cross_validate(t, make_folds(t, 3), "knn_1", model="m", features="cls")], {"knn_1": "1-NN"})
    header, _, row = report.main_table().splitlines()
    assert [c.strip() for c in header.strip("|").split("|")][3:] == [
        "F1 (weighted)",
        "F1 (macro)",
        "recall",
        "precision",
        "balanced accuracy",
    ]
    assert " ± " in row


def test_a_markdown_table_lines_up():
    assert markdown_table(["a", "bb"], [["1", "2"], ["333", "4"]]).splitlines() == [
        "| a   | bb |",
        "| --- | -- |",
        "| 1   | 2  |",
        "| 333 | 4  |",
    ]
