import numpy as np
import pytest

from dinov2.data.splits import make_folds, read_folds, write_folds

NAMES = [f"slide{i % 12}/cell{i}.png" for i in range(240)]
LABELS = np.array([("blast", "platelet", "monocyte")[i % 3] for i in range(240)])
GROUPS = [f"patient{i % 24}" for i in range(240)]


def test_every_class_is_spread_evenly_over_the_folds():
    folds = make_folds(NAMES, LABELS)
    for label in set(LABELS):
        assert np.bincount(folds[label == LABELS], minlength=5).tolist() == [16] * 5


def test_a_patient_is_in_one_fold_only():
    folds = make_folds(NAMES, LABELS, GROUPS)
    for group in set(GROUPS):
        assert len(set(folds[np.array(GROUPS) == group])) == 1
    assert set(folds) == set(range(5))


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_folds_do_not_depend_on_the_order_of_the_rows(groups):
    order = np.random.default_rng(0).permutation(240)
    shuffled = [groups[i] for i in order] if groups else None
    folds = make_folds(NAMES, LABELS, groups)
    np.testing.assert_array_equal(make_folds([NAMES[i] for i in order], LABELS[order], shuffled), folds[order])


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_the_seed_changes_the_folds(groups):
    assert (make_folds(NAMES, LABELS, groups, seed=1) != make_folds(NAMES, LABELS, groups, seed=2)).any()


def test_rows_without_a_group_stand_alone():
    folds = make_folds(NAMES, LABELS, [""] * 240)
    assert min(np.bincount(folds)) >= 45


def test_folds_are_written_as_a_manifest_and_read_again(tmp_path):
    folds = make_folds(NAMES, LABELS, GROUPS)
    write_folds(tmp_path / "folds.csv", NAMES, LABELS, folds, GROUPS)
    assert (tmp_path / "folds.csv").read_text().splitlines()[:2] == [
        "path,label,group,fold",
        f"slide0/cell0.png,blast,patient0,{folds[0]}",
    ]
    assert read_folds(tmp_path / "folds.csv") == dict(zip(NAMES, folds))


def test_a_class_that_is_too_small_is_named():
    with pytest.raises(ValueError, match="class blast has 3 images, too few for 5 folds"):
        make_folds([f"{i}" for i in range(23)], ["blast"] * 3 + ["platelet"] * 20)
    with pytest.raises(ValueError, match="class a has 2 groups, too few for 3 folds"):
        make_folds(list("123456"), ["a"] * 6, list("xxxyyy"), n_folds=3)


def test_names_must_be_unique_and_columns_of_one_length():
    with pytest.raises(ValueError, match="unique"):
        make_folds(["a", "a"], [0, 1], n_folds=2)
    with pytest.raises(ValueError, match="2 names, 3 labels"):
        make_folds(["a", "b"], [0, 1, 1], n_folds=2)
