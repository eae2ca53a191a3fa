import json
import logging
import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from dinov2.train.health import HealthMonitor, append_reading, feature_std, rank_me, read_history


def config(fit="", evaluation="", weights=""):
    return OmegaConf.create(
        {
            "student": {"in_chans": 3, "patch_size": 14, "pretrained_weights": weights},
            "train": {"cache_dir": ""},
            "crops": {"global_crops_size": 56},
            "augmentations": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
            "evaluation": {
                "fit_dataset_path": str(fit),
                "eval_dataset_path": str(evaluation),
                "batch_size": 8,
                "linear_probe": True,
                "image_size": 0,
            },
        }
    )


@pytest.fixture
def image_paths(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for i in range(12):
        paths.append(str(tmp_path / f"{i:02}.png"))
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def test_the_rank_of_orthogonal_features_is_their_number():
    assert rank_me(torch.eye(7)) == pytest.approx(7, rel=1e-4)


def test_the_rank_of_features_along_one_line_is_one():
    assert rank_me(np.outer(np.arange(1, 9), np.ones(5))) == pytest.approx(1, rel=1e-4)


def test_the_rank_is_the_exponential_of_the_entropy_of_singular_values():
    p = np.array([0.5, 0.25, 0.25])
    assert rank_me(np.diag([2.0, 1.0, 1.0])) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_the_spread_is_one_for_random_directions_and_zero_for_equal_features():
    assert feature_std(torch.randn(4000, 32)) == pytest.approx(1, abs=0.02)
    assert feature_std(np.ones((10, 4))) == pytest.approx(0, abs=1e-6)


def test_held_out_images_give_rank_and_spread_without_labels(tiny_vit, image_paths):
    signs = HealthMonitor(config(), device=torch.device("cpu"), held_out=image_paths).measure(tiny_vit)
    assert set(signs) == {"rankme", "feature_std"}
    assert 1 <= signs["rankme"] <= 12


def test_labelled_folders_give_every_probe_and_score(tiny_vit, cell_folder):
    signs = HealthMonitor(config(cell_folder, cell_folder), device=torch.device("cpu")).measure(tiny_vit)
    assert set(signs) == {"rankme", "feature_std"} | {
        f"{probe}_{score}"
        for probe in ("knn_1", "knn_20", "linear")
        for score in ("accuracy", "macro_f1", "balanced_accuracy")
    }
    assert signs["knn_1_accuracy"] == 1  # scored on what it has learned


def test_collapse_is_an_alarm_but_not_before_the_first_step(tiny_vit, image_paths, caplog):
    monitor = HealthMonitor(config(), device=torch.device("cpu"), held_out=image_paths)
    torch.nn.init.zeros_(tiny_vit.norm.weight)
    torch.nn.init.ones_(tiny_vit.norm.bias)  # every image gets the same features
    monitor.measure(tiny_vit, alarm=False)
    assert "ALARM" not in caplog.text
    signs = monitor.measure(tiny_vit)
    assert signs["feature_std"] == pytest.approx(0, abs=1e-3)
    assert caplog.text.count("ALARM: the features collapse") == 2  # spread and rank
    assert all(record.levelno == logging.ERROR for record in caplog.records if "ALARM" in record.message)


def test_a_rank_that_halves_is_an_alarm(caplog):
    monitor = HealthMonitor(config(), device=torch.device("cpu"), held_out=None)
    monitor.spread(np.eye(40, dtype=np.float32))
    monitor.spread(np.concatenate([np.eye(10)] * 4).astype(np.float32))
    assert "fallen below half of its best value 40.0" in caplog.text


def test_a_run_that_goes_on_remembers_its_best_rank(tmp_path, caplog):
    rows = [{"iteration": 0, "rankme": 9.0}, {"iteration": 4, "rankme": 30.0}, {"iteration": 8, "rankme": 50.0}]
    (tmp_path / "eval_metrics.json").write_text("".join(json.dumps(row) + "\n" for row in [rows[1], *rows]))
    history = read_history(tmp_path, before=4)
    assert history == rows[:2]
    monitor = HealthMonitor(config(), device=torch.device("cpu"), history=history)
    monitor.spread(np.concatenate([np.eye(10)] * 4).astype(np.float32))
    assert "fallen below half of its best value 30.0" in caplog.text


@pytest.mark.parametrize("weights", ["", "released.pth"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_from_weights_that_falls_below_them_is_an_alarm(weights, resumed, tiny_vit, cell_folder, caplog):
    folders = (cell_folder, cell_folder, weights)
    history = [{"iteration": 0, "knn_20_accuracy": 0.9}, {"iteration": 4, "knn_20_accuracy": 0.1}] if resumed else []
    monitor = HealthMonitor(config(*folders), device=torch.device("cpu"), history=history)
    monitor.linear_probe = False
    if not resumed:
        monitor.measure(tiny_vit, alarm=False)
    start = monitor.start_score
    monitor.measure(tiny_vit)  # equal where it is the same network
    assert ("below the 90.0% before the first step" in caplog.text) == bool(resumed and weights)

    torch.nn.init.zeros_(tiny_vit.norm.weight)
    score = monitor.measure(tiny_vit)["knn_20_accuracy"]
    assert score < start
    said = f"ALARM: 20-NN accuracy is {score:.1%}, below the {start:.1%} before the first step"
    assert (said in caplog.text) == bool(weights)


def test_a_reading_that_a_crash_cut_off_costs_that_reading_only(tmp_path, caplog):
    (tmp_path / "eval_metrics.json").write_text('{"iteration": 0, "rankme": 9.0}\n{"iteration": 4, "ran')
    append_reading(tmp_path, 4, {"rankme": 8.0})
    assert read_history(tmp_path) == [{"iteration": 0, "rankme": 9.0}, {"iteration": 4, "rankme": 8.0}]
    assert "line 2 is cut off" in caplog.text


def test_features_that_are_not_finite_are_said_so(tiny_vit, image_paths, caplog):
    monitor = HealthMonitor(config(), device=torch.device("cpu"), held_out=image_paths)
    torch.nn.init.constant_(tiny_vit.norm.weight, math.nan)
    assert math.isnan(monitor.measure(tiny_vit)["rankme"])
    assert "not finite" in caplog.text


def test_nothing_to_look_at_is_said_once_and_measures_nothing(tiny_vit, caplog):
    monitor = HealthMonitor(config(), device=torch.device("cpu"), held_out=None)
    assert monitor.measure(tiny_vit) == {}
    assert "cannot be measured" in caplog.text


def test_one_labelled_folder_without_the_other_is_refused(cell_folder):
    with pytest.raises(ValueError, match="go together"):
        HealthMonitor(config(cell_folder, ""), device=torch.device("cpu"))
