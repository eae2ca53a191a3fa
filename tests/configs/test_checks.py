import pytest
from omegaconf import OmegaConf

from dinov2.configs import (
    ConfigError,
    check,
    dinov2_default_config,
    find_advice,
    find_problems,
    merge_strictly,
    read_overrides,
)


def merged(*overrides, text=None):
    layers = [("c.yaml", OmegaConf.create(text))] if text is not None else []
    return merge_strictly(dinov2_default_config, *layers, ("command line", read_overrides(overrides)))[0]


def problems(*overrides, for_training=False):
    return list(find_problems(merged(*overrides), for_training=for_training))


@pytest.fixture
def folders(tmp_path):
    for name in ("a", "b", "fit", "score"):
        (tmp_path / name).mkdir()
    return tmp_path


# ------------------------------------------------------------------------------------------------ unknown keys, types


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("optim.epoch=3", "optim.epochs"),
        ("train.epochs=3", "optim.epochs"),
        ("train.batch_size=3", "train.batch_size_per_gpu"),
        ("student.patchsize=14", "student.patch_size"),
        ("epochs=3", "optim.epochs"),
        ("optimizer.weight_decay=3", "optim.weight_decay"),
        ("train.official_epoch_length=3", "train.OFFICIAL_EPOCH_LENGTH"),
        ("model.weights=x", "MODEL.WEIGHTS"),
        ("train.local_crops_size=98", "crops.local_crops_size"),
        ("compute_precision.student.backbone.mixed_precision.param_type=fp16", "mixed_precision.param_dtype"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_one(given, nearest):
    with pytest.raises(ConfigError) as error:
        merged(given)
    assert given.split("=")[0] in str(error.value)
    assert nearest in str(error.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("optim.epochs=ten", "optim.epochs='ten' (command line): expected a whole number"),
        ("optim.epochs=1.5", "optim.epochs=1.5 (command line): expected a whole number"),
        ("optim.epochs=true", "expected a whole number"),
        ("optim.epochs=null", "optim.epochs=null (command line): expected a whole number"),
        ("optim.clip_grad=[3]", "optim.clip_grad=[3] (command line): expected a number"),
        ("train.compile=2", "expected true or false"),
        ("train.num_workers=[2]", "expected a whole number or a text"),
        ("train.dataset_path=[1,2]", "expected a text or a list of texts"),
        ("crops.global_crops_scale=[0.3]", "expected two numbers [low, high]"),
        ("crops.global_crops_scale=0.3", "expected two numbers [low, high]"),
        ("augmentations.mean=[a,b,c]", "expected a list of numbers"),
        ("student.arch=14", "expected a text"),
        ("train=3", "train=3 (command line): expected a section"),
        ("train.seed={a: 1}", "expected a whole number"),
        ("train.output_dir=???", "no value yet"),
    ],
)
def test_a_wrong_type_is_refused_with_key_value_and_expected_type(given, expected):
    with pytest.raises(ConfigError) as error:
        merged(given)
    assert expected in str(error.value)


def test_every_problem_of_every_layer_is_named_at_once_with_its_source():
    with pytest.raises(ConfigError) as error:
        merged("optim.epoch=3", "train.seed=x", text={"crop": {"size": 3}, "student": {"arch": 5}})
    assert len(error.value.problems) == 4
    assert str(error.value).startswith("4 problems")
    assert "c.yaml" in str(error.value)
    assert "command line" in str(error.value)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("optim.epochs", "'optim.epochs' is not an override: write section.key=value"),
        ("optim.epoch", "did you mean optim.epochs?"),
        ("=3", "is not an override"),
        ("--output-dir", "put the options first"),
    ],
)
def test_a_word_that_is_no_override_is_named(word, expected):
    with pytest.raises(ConfigError) as error:
        read_overrides(["train.seed=1", word])
    assert expected in str(error.value)


def test_whole_numbers_pass_for_numbers_and_lists_come_from_the_command_line():
    cfg = merged("optim.clip_grad=3", "train.dataset_path=[/a,/b=c]", "crops.local_crops_scale=[0,1]")
    assert cfg.optim.clip_grad == 3
    assert list(cfg.train.dataset_path) == ["/a", "/b=c"]


def test_later_layers_win_over_earlier_ones_and_over_the_defaults():
    cfg = merged("train.seed=2", text={"train": {"seed": 1, "frac": 0.5}})
    assert (cfg.train.seed, cfg.train.frac, cfg.optim.epochs) == (2, 0.5, 100)


def test_an_empty_section_and_a_null_text_or_list_mean_nothing_given():
    cfg = merged(text={"train": None, "optim": {}, "evaluation": {"fit_dataset_path": None}})
    assert cfg.train.seed == 0
    assert cfg.evaluation.fit_dataset_path == ""
    assert merged(text={"train": {"path_preserved": None}}).train.path_preserved == []


def test_references_to_other_keys_are_resolved_and_a_broken_one_is_named():
    assert merged("evaluation.batch_size=${train.batch_size_per_gpu}").evaluation.batch_size == 64
    with pytest.raises(ConfigError, match="nowhere"):
        merged("evaluation.batch_size=${train.nowhere}")


def test_one_preserved_folder_may_be_given_without_brackets():
    assert merged("train.path_preserved=/data/cells").train.path_preserved == ["/data/cells"]


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    cfg = merged("train.dataset_path=[~/a]", "train.output_dir=~/out")
    assert list(cfg.train.dataset_path) == ["/home/ada/a"]
    assert cfg.train.output_dir == "/home/ada/out"


def test_keys_of_relatives_that_nothing_reads_load_and_are_reported():
    text = {"daino": {"loss_weight": 1.0}, "student": {"channel_adaptive": False}, "train": {"saveckp_freq": 5}}
    cfg, unread = merge_strictly(dinov2_default_config, ("old.yaml", OmegaConf.create(text)))
    assert cfg.train.saveckp_freq == 5
    assert "daino" not in cfg
    assert [sentence.split(" ")[0] for sentence in unread] == ["daino.loss_weight", "student.channel_adaptive"]


def test_a_buffer_format_loads_and_is_said_to_have_no_effect():
    key = "compute_precision.student.backbone.mixed_precision.buffer_dtype"
    for value, count in (("fp32", 0), ("fp16", 1)):
        layer = ("command line", read_overrides([f"{key}={value}"]))
        assert len(merge_strictly(dinov2_default_config, layer)[1]) == count


def test_the_written_config_of_an_earlier_run_loads_unchanged():
    cfg = merged("optim.epochs=3", "train.dataset_path=/x")
    assert merged(text=OmegaConf.to_container(cfg)) == cfg


# ------------------------------------------------------------------------------------------- impossible combinations


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["student.patch_size=14"], ["crops.local_crops_size=96", "student.patch_size=14", "84 or 98"]),
        (["crops.global_crops_size=8", "crops.local_crops_number=0"], ["crops.global_crops_size=8", "16"]),
        (["evaluation.image_size=100"], ["evaluation.image_size=100", "96 or 112"]),
        (["dino.head_n_prototypes=0"], ["dino.head_n_prototypes=0", "at least 1"]),
        (["ibot.head_hidden_dim=0"], ["ibot.head_hidden_dim=0"]),
        (["student.arch=vit_larg"], ["student.arch=vit_larg", "did you mean vit_large?", "vit_tiny"]),
        (["student.ffn_layer=swiglu2"], ["student.ffn_layer=swiglu2", "swiglufused"]),
        (["student.attention_backend=flash"], ["student.attention_backend=flash", "sdpa"]),
        (["train.centering=sinkhorn"], ["train.centering=sinkhorn", "sinkhorn_knopp"]),
        (["optim.scaling_rule=linear"], ["optim.scaling_rule=linear", "linear_wrt_256"]),
        (["compute_precision.dtype=float16"], ["compute_precision.dtype=float16", "fp16"]),
        (
            ["compute_precision.student.backbone.sharding_strategy=ZERO2"],
            ["compute_precision.student.backbone.sharding_strategy=ZERO2", "SHARD_GRAD_OP"],
        ),
        (
            ["compute_precision.teacher.dino_head.mixed_precision.param_dtype=half"],
            ["compute_precision.teacher.dino_head.mixed_precision.param_dtype=half", "fp16"],
        ),
        (["ibot.mask_sample_probability=0"], ["ibot.mask_sample_probability=0", "ibot.loss_weight=0"]),
        (["ibot.mask_ratio_min_max=[0,0]"], ["ibot.mask_ratio_min_max=[0, 0]", "ibot.loss_weight=0"]),
        (["train.batch_size_per_gpu=1"], ["train.batch_size_per_gpu=1", "dino.koleo_loss_weight=0"]),
        (["student.block_chunks=5"], ["student.block_chunks=5", "24 blocks of vit_large", "1, 2, 3, 4, 6, 8, 12, 24"]),
        (["optim.warmup_epochs=101"], ["optim.warmup_epochs=101", "optim.epochs=100"]),
        (["optim.epochs=0", "optim.warmup_epochs=0"], ["optim.epochs=0", "at least 1"]),
        (["teacher.teacher_temp=0"], ["teacher.teacher_temp=0", "greater than 0"]),
        (["teacher.momentum_teacher=1.2"], ["teacher.momentum_teacher=1.2", "between 0 and 1"]),
        (["augmentations.blur_local=1.5"], ["augmentations.blur_local=1.5", "between 0 and 1"]),
        (["crops.global_crops_scale=[0.9,0.3]"], ["crops.global_crops_scale=[0.9, 0.3]", "ordered"]),
        (["crops.local_crops_scale=[0,0.3]"], ["crops.local_crops_scale[0]=0"]),
        (["augmentations.blur_sigma=[2,1]"], ["augmentations.blur_sigma=[2, 1]"]),
        (["student.in_chans=4"], ["augmentations.mean has 3 values", "student.in_chans=4"]),
        (["augmentations.std=[0.2,0,0.2]"], ["augmentations.std=[0.2, 0, 0.2]"]),
        (["student.drop_path_rate=1"], ["student.drop_path_rate=1", "below 1"]),
        (["train.device=gpu"], ["train.device=gpu", "cuda:N"]),
        (["train.num_workers=-1"], ["train.num_workers=-1", "auto"]),
        (["train.num_workers=many"], ["train.num_workers=many", "auto"]),
        (["student.pretrained_weights=/no/such.pth"], ["student.pretrained_weights=/no/such.pth", "no such file"]),
        (["MODEL.WEIGHTS=dinov2_vits14_reg4"], ["MODEL.WEIGHTS=dinov2_vits14_reg4", "did you mean dinov2_vits14_reg?"]),
        (["train.augment_on=gpu"], ["train.augment_on=gpu", "device"]),
        (["train.activation_checkpointing=some"], ["train.activation_checkpointing=some", "selective"]),
        (
            ["dino.loss_weight=0", "ibot.loss_weight=0", "dino.koleo_loss_weight=0"],
            ["dino.loss_weight", "nothing would be learnt"],
        ),
        (["train.frac=10"], ["train.frac=10", "between 0 and 1"]),
    ],
)
def test_what_cannot_run_is_said_with_key_value_and_fix(overrides, parts):
    found = problems(*overrides)
    assert any(all(part in problem for part in parts) for problem in found), found


@pytest.mark.parametrize(
    "overrides",
    [
        ["crops.local_crops_number=0", "crops.local_crops_size=97"],
        ["train.batch_size_per_gpu=1", "dino.koleo_loss_weight=0"],
        ["train.batch_size_per_gpu=1", "dino.koleo_distributed=true"],
        ["ibot.loss_weight=0", "ibot.mask_sample_probability=0"],
        ["student.pretrained_weights=dinov2_vits14_reg"],
        ["MODEL.WEIGHTS=hf:facebook/dinov2-small"],
        ["train.device=cuda:1"],
        ["train.num_workers=auto"],
        ["teacher.warmup_teacher_temp_epochs=200"],
        ["optim.clip_grad=0"],
    ],
)
def test_unusual_settings_that_can_run_pass(overrides):
    assert problems(*overrides) == []


def test_a_small_batch_whose_masks_round_down_to_none_is_refused():
    found = problems("train.batch_size_per_gpu=2", "ibot.mask_sample_probability=0.2")
    assert any("none of the 4 global crops" in problem for problem in found)


def test_check_raises_with_all_problems_and_returns_a_good_config(folders):
    cfg = merged("student.patch_size=14", "dino.head_n_prototypes=0")
    with pytest.raises(ConfigError, match="3 problems") as error:
        check(cfg)
    assert len(error.value.problems) == 3
    good = merged(f"train.dataset_path={folders}/a")
    assert check(good) is good


# ------------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ([], "still the default: set train.dataset_path to a folder"),
        (["train.dataset_path="], "still the default"),
        (["train.dataset_path={0}/none"], "{0}/none does not exist"),
        (["train.dataset_path=[{0}/a,{0}/none]"], "{0}/none does not exist"),
        (["train.dataset_path={0}/file.txt"], "file.txt is neither a folder nor a manifest or shard"),
        (["train.dataset_path=ImageNet:split=VAL"], "no :root="),
        (["train.dataset_path=ImageNet:split=VAL:root={0}/none"], "no such folder"),
        (["train.dataset_path={0}/a", "train.path_preserved={0}/b"], "{0}/b is not among train.dataset_path"),
        (["train.dataset_path={0}/a", "train.exclude={0}/none.txt"], "train.exclude={0}/none.txt: no such file"),
        (["train.dataset_path={0}/a", "evaluation.fit_dataset_path={0}/fit"], "evaluation.eval_dataset_path is not"),
        (
            [
                "train.dataset_path={0}/a",
                "evaluation.fit_dataset_path={0}/no",
                "evaluation.eval_dataset_path={0}/score",
            ],
            "evaluation.fit_dataset_path={0}/no does not exist",
        ),
    ],
)
def test_folders_that_are_not_there_are_named_before_training(template, part, folders):
    (folders / "file.txt").touch()
    found = problems(*(word.format(folders) for word in template), for_training=True)
    assert len(found) == 1
    assert part.format(folders) in found[0]


def test_folders_that_are_there_pass(folders):
    given = [
        f"train.dataset_path=[{folders}/a,{folders}/b/]",
        f"train.path_preserved={folders}/b",
        f"evaluation.fit_dataset_path={folders}/fit",
        f"evaluation.eval_dataset_path={folders}/score",
    ]
    assert problems(*given, for_training=True) == []
    dataset_string = f"train.dataset_path='ImageNet:split=TRAIN:root={folders}/a:extra={folders}/b'"
    assert problems(dataset_string, for_training=True) == []


def test_the_placeholders_of_the_cell_preset_are_named():
    from dinov2.configs import load_and_merge_config

    found = list(find_problems(load_and_merge_config("train/vitl_cellsim_register")))
    assert len(found) == 2
    assert all("/path/to/" in problem and "set train.dataset_path" in problem for problem in found)


def test_small_batches_with_large_batch_settings_are_advised_against():
    assert len(list(find_advice(merged(), effective_batch=64))) == 1
    assert list(find_advice(merged(), effective_batch=1024)) == []
    small = merged("train.centering=sinkhorn_knopp", "dino.head_n_prototypes=4096")
    assert list(find_advice(small, effective_batch=64)) == []


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "train.loggers: comet is unknown: choose from wandb, mlflow" in problems("train.loggers=[comet]")
    (problem,) = problems("train.loggers=[mlflow]")
    assert "pip install 'dinov2[mlflow]'" in problem


def test_a_network_to_learn_from_must_be_there_and_stochastic_depth_is_advised_against(tmp_path):
    words = "distillation.enabled=true", f"distillation.config_file={tmp_path}/c.yaml"
    said = problems(*words, for_training=True)
    assert any(f"distillation.config_file={tmp_path}/c.yaml: no such file" in problem for problem in said)
    assert any("distillation.checkpoint='': no such file" in problem for problem in said)
    assert problems(*words) == []  # to score what has been distilled, nobody needs the network it learned from
    advice = list(find_advice(merged("distillation.enabled=true"), effective_batch=1024))
    assert any("student.drop_path_rate=0.3" in sentence for sentence in advice)


def test_asynchronous_checkpoints_are_on_off_or_up_to_the_device():
    for value in ("true", "false", "auto"):
        assert not problems(f"checkpoint.asynchronous={value}")
    (problem,) = problems("checkpoint.asynchronous=maybe")
    assert "choose true, false or auto" in problem
