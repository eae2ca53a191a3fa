from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dinov2.configs import (
    ConfigError,
    changes,
    dinov2_default_config,
    find_problems,
    load_and_merge_config,
    load_config,
    shipped_configs,
)
from dinov2.configs.checks import CHOICES, DEPTHS, PAIRS, RANGES, RELEASED, UNREAD
from dinov2.configs.schema import walk
from dinov2.models import released, vision_transformer

PRESETS = [name for name in shipped_configs() if name != "ssl_default_config"]


def flat(node, prefix=""):
    for name, value in node.items():
        if OmegaConf.is_dict(value):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_the_schema_has_every_key_of_the_defaults_and_no_other():
    assert sorted(key for key, _ in walk()) == sorted(key for key, _ in flat(dinov2_default_config))


def test_the_defaults_pass_the_checks_but_for_the_images_that_only_a_user_has():
    assert list(find_problems(dinov2_default_config, for_training=False)) == []
    problems = list(find_problems(dinov2_default_config))
    assert len(problems) == 1
    assert "train.dataset_path" in problems[0]


def test_the_checks_speak_of_existing_keys_only():
    known = {key for key, _ in walk()}
    assert set(CHOICES) | set(RANGES) | set(PAIRS) <= known
    assert not known & set(UNREAD)


def test_all_presets_of_the_plan_are_shipped():
    evaluations = [f"eval/vit{size}14{reg}_pretrain" for size in "sblg" for reg in ("", "_reg4")]
    runs = [
        f"train/{name}"
        for name in (
            "vitl_cellsim_register",
            "vitl14",
            "vitl16_short",
            "vitg14",
            "vitl14_highres",
            "vits_cells",
            "vitl_continue",
            "demo",
        )
    ]
    assert set(evaluations + runs) <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_shipped_preset_can_run(name):
    assert list(find_problems(load_and_merge_config(name), for_training=False)) == []


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [  # compatibility.md, section 3
        ("train/vitl_cellsim_register", "train.centering", "sinkhorn_knopp"),
        ("train/vitl_cellsim_register", "train.frac", 0.1),
        ("train/vitl_cellsim_register", "dino.head_n_prototypes", 131072),
        ("train/vitl_cellsim_register", "student.num_register_tokens", 4),
        ("train/vitl_cellsim_register", "student.block_chunks", 4),
        ("train/vitl_cellsim_register", "optim.warmup_epochs", 80),
        ("train/vitl_cellsim_register", "crops.local_crops_size", 98),
        ("train/vitg14", "student.arch", "vit_giant2"),
        ("train/vitg14", "train.batch_size_per_gpu", 12),
        ("train/vitl14", "train.batch_size_per_gpu", 32),
        ("train/vitl16_short", "student.patch_size", 16),
        ("eval/vitb14_reg4_pretrain", "student.interpolate_antialias", True),
        ("eval/vitb14_reg4_pretrain", "student.interpolate_offset", 0.0),
        ("eval/vitg14_pretrain", "student.ffn_layer", "swiglufused"),
        ("eval/vits14_pretrain", "crops.global_crops_size", 518),
        ("train/vits_cells", "augmentations.rotate90", True),
        ("train/vits_cells", "compute_precision.dtype", "bf16"),
        ("train/demo", "train.device", "cpu"),
    ],
)
def test_presets_hold_the_documented_numbers(name, key, value):
    assert OmegaConf.select(load_and_merge_config(name), key) == value


@pytest.mark.parametrize("suffix", ["", ".yaml"])
def test_a_config_is_found_by_name_and_by_path_with_and_without_its_ending(suffix, tmp_path):
    (tmp_path / "mine.v2.yaml").write_text("train:\n  seed: 7\n")
    assert load_config(f"train/vitl14{suffix}").student.arch == "vit_large"
    assert load_config(f"{tmp_path}/mine.v2{suffix}").train.seed == 7


def test_a_config_that_is_not_there_is_named_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"no such config file: train/vitl_cellsim.yaml; did you mean .*vitl_cells"):
        load_config("train/vitl_cellsim.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "train: [1,\n"])
def test_a_file_that_is_no_config_is_refused_by_name(text, tmp_path):
    path = Path(tmp_path, "c.yaml")
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        load_config(path)


def test_merging_leaves_the_defaults_as_they_are():
    load_and_merge_config("train/vitl14", ["train.seed=3"])
    assert dinov2_default_config.train.seed == 0


def test_the_changes_are_what_a_file_and_overrides_said():
    assert changes(dinov2_default_config) == {}
    assert changes(load_and_merge_config("train/vitl16_short", ["train.seed=3", "train.frac=0.1"])) == {
        "student.block_chunks": 4,
        "train.seed": 3,
    }


def test_the_depths_in_the_checks_are_those_of_the_models():
    with torch.device("meta"):
        assert {name: getattr(vision_transformer, name)(patch_size=14).n_blocks for name in DEPTHS} == DEPTHS


def test_the_released_names_in_the_checks_are_those_of_the_models():

    assert set(released.RELEASED) == set(RELEASED)
