import pytest

from dinov2.run.sweep import expand


def test_every_combination_of_the_values_is_a_run_with_a_folder_of_its_own():
    runs = expand(["optim.base_lr=1e-4,2e-4", "teacher.momentum_teacher=0.99,0.994"])
    assert list(runs) == [
        "0_optim.base_lr=1e-4,teacher.momentum_teacher=0.99",
        "1_optim.base_lr=1e-4,teacher.momentum_teacher=0.994",
        "2_optim.base_lr=2e-4,teacher.momentum_teacher=0.99",
        "3_optim.base_lr=2e-4,teacher.momentum_teacher=0.994",
    ]
    assert runs["2_optim.base_lr=2e-4,teacher.momentum_teacher=0.99"] == [
        "optim.base_lr=2e-4",
        "teacher.momentum_teacher=0.99",
    ]


def test_a_comma_inside_brackets_belongs_to_the_value():
    runs = expand(["crops.local_crops_scale=[0.05,0.3],[0.1,0.32]"])
    assert list(runs.values()) == [["crops.local_crops_scale=[0.05,0.3]"], ["crops.local_crops_scale=[0.1,0.32]"]]


def test_a_value_that_is_a_path_gives_a_plain_folder_name():
    assert list(expand(["train.dataset_path=/data/a b,/data/c"])) == [
        "0_train.dataset_path=-data-a-b",
        "1_train.dataset_path=-data-c",
    ]


def test_the_numbers_of_many_runs_sort_as_text():
    assert list(expand([f"train.seed={','.join(map(str, range(11)))}"]))[:2] == ["00_train.seed=0", "01_train.seed=1"]


def test_no_sweep_is_no_runs():
    assert expand([]) == {}


@pytest.mark.parametrize("sweep", ["optim.base_lr", "optim.base_lr=", "=1,2"])
def test_a_sweep_without_key_or_values_is_refused(sweep):
    with pytest.raises(ValueError, match="is not of the form key=value,value"):
        expand([sweep])


def test_one_key_in_two_sweeps_is_refused():
    with pytest.raises(ValueError, match="names the key twice"):
        expand(["train.seed=1", "train.seed=2"])
