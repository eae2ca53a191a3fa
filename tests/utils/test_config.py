import logging
from argparse import Namespace

import pytest
from omegaconf import OmegaConf

from dinov2 import distributed
from dinov2.configs import ConfigError, dinov2_default_config
from dinov2.utils import config


@pytest.fixture
def quiet_root():
    """Undo what `setup` does to the root logger."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)


def arguments(tmp_path, *opts, text="", **others):
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "c.yaml").write_text(text or f"train:\n  dataset_path: {tmp_path}/images\n")
    given = {"config_file": str(tmp_path / "c.yaml"), "output_dir": str(tmp_path / "out"), "opts": list(opts)}
    return Namespace(**given | others)


def with_batch(batch, rule="sqrt_wrt_1024", steps=1):
    cfg = OmegaConf.create(dinov2_default_config)
    cfg.train.batch_size_per_gpu, cfg.train.gradient_accumulation_steps = batch, steps
    cfg.optim.scaling_rule = rule
    return cfg


@pytest.mark.parametrize(
    ("world", "batch", "steps", "rule", "expected"),
    [
        (1, 1024, 1, "sqrt_wrt_1024", 0.004),
        (4, 64, 1, "sqrt_wrt_1024", 0.002),
        (2, 64, 2, "sqrt_wrt_1024", 0.002),
        (1, 64, 1, "linear_wrt_256", 0.001),
        (8, 64, 2, "linear_wrt_256", 0.016),
    ],
)
def test_the_learning_rate_follows_the_batch_of_all_processes_and_accumulated_passes(
    monkeypatch, world, batch, steps, rule, expected
):
    monkeypatch.setattr(distributed, "get_global_size", lambda: world)
    cfg = with_batch(batch, rule, steps)
    assert config.apply_scaling_rules_to_cfg(cfg) is cfg
    assert cfg.optim.lr == pytest.approx(expected, rel=1e-12)


def test_an_unknown_scaling_rule_is_refused():
    with pytest.raises(ValueError, match=r"optim\.scaling_rule=cubic"):
        config.apply_scaling_rules_to_cfg(with_batch(8, "cubic"))


def test_file_then_overrides_then_output_dir_win_over_the_defaults(tmp_path):
    args = arguments(
        tmp_path, "optim.epochs=7", text="optim:\n  epochs: 3\ntrain:\n  seed: 5\n  output_dir: /elsewhere\n"
    )
    cfg = config.get_cfg_from_args(args)
    assert (cfg.optim.epochs, cfg.train.seed, cfg.train.frac) == (7, 5, 0.1)
    assert cfg.train.output_dir == str(tmp_path / "out")


def test_without_an_output_dir_argument_that_of_the_config_counts_and_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = arguments(tmp_path, text="train:\n  output_dir: runs/a\n", output_dir="")
    assert config.get_cfg_from_args(args).train.output_dir == str(tmp_path / "runs" / "a")


def test_a_command_without_a_config_file_uses_the_defaults(tmp_path):
    args = arguments(tmp_path, config_file="", opts=None)
    assert config.get_cfg_from_args(args).optim.epochs == 100


def test_the_written_config_reads_back_equal(tmp_path):
    cfg = with_batch(8)
    path = config.write_config(cfg, tmp_path)
    assert path == str(tmp_path / "config.yaml")
    assert OmegaConf.load(path) == cfg


def test_setup_writes_config_and_log_and_sets_the_learning_rate(tmp_path, quiet_root):
    import torch

    args = arguments(tmp_path, "train.seed=11", "train.device=cpu", "train.batch_size_per_gpu=256")
    cfg = config.setup(args)
    first = torch.rand(1)
    assert cfg.optim.lr == pytest.approx(0.002)
    assert args.output_dir == cfg.train.output_dir == str(tmp_path / "out")
    assert OmegaConf.load(tmp_path / "out" / "config.yaml") == cfg
    log = (tmp_path / "out" / "logs" / "log.txt").read_text()
    assert "\n  train.seed=11\n" in log
    assert "\n  optim.lr=0.002" in log
    assert "optim.epochs" not in log
    torch.manual_seed(11)
    assert torch.equal(torch.rand(1), first)


def test_setup_refuses_before_a_folder_or_a_process_group_exists(tmp_path, monkeypatch, quiet_root):
    monkeypatch.setattr(distributed, "enable", lambda **_: pytest.fail("joined a process group"))
    with pytest.raises(ConfigError, match=r"student\.patch_size=14"):
        config.setup(arguments(tmp_path, "student.patch_size=14"))
    assert not (tmp_path / "out").exists()


def test_an_evaluation_needs_no_training_images(tmp_path, quiet_root):
    args = arguments(tmp_path, text="student:\n  arch: vit_small\n")
    with pytest.raises(ConfigError, match=r"train\.dataset_path"):
        config.setup(args)
    assert config.setup(args, for_training=False).student.arch == "vit_small"


def test_setup_warns_once_about_keys_that_nothing_reads_and_small_batches(tmp_path, quiet_root, caplog):
    text = f"train:\n  dataset_path: {tmp_path}/images\n  cell_augmentation: false\n"
    with caplog.at_level(logging.WARNING):
        config.setup(arguments(tmp_path, text=text))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("train.cell_augmentation" in line for line in warnings) == 1
    assert sum("effective batch of 64" in line for line in warnings) == 1
