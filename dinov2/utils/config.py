"""From a command line to a checked configuration, a process group, a log and seeds."""

import argparse
import logging
import math
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dinov2 import distributed
from dinov2.configs import (
    changes,
    check,
    dinov2_default_config,
    find_advice,
    load_config,
    merge_strictly,
    read_overrides,
)
from dinov2.logging import setup_logging
from dinov2.utils.utils import fix_random_seeds, get_sha

logger = logging.getLogger("dinov2")


def get_effective_batch_size(cfg: DictConfig) -> int:
    """Return the images per optimizer step, over all processes and accumulated passes."""
    train = cfg.train
    return train.batch_size_per_gpu * distributed.get_global_size() * train.gradient_accumulation_steps


def apply_scaling_rules_to_cfg(cfg: DictConfig) -> DictConfig:
    """Set `optim.lr` from `optim.base_lr` and the effective batch, in place, and return the configuration.

    Raises:
        ValueError: an unknown `optim.scaling_rule`.
    """
    batch, base = get_effective_batch_size(cfg), cfg.optim.base_lr
    if cfg.optim.scaling_rule == "sqrt_wrt_1024":
        cfg.optim.lr = base * math.sqrt(batch / 1024)
    elif cfg.optim.scaling_rule == "linear_wrt_256":
        cfg.optim.lr = base * batch / 256
    else:
        raise ValueError(f"optim.scaling_rule={cfg.optim.scaling_rule} is unknown: sqrt_wrt_1024 or linear_wrt_256")
    logger.info("learning rate %g (%s of base_lr %g, batch %d)", cfg.optim.lr, cfg.optim.scaling_rule, base, batch)
    return cfg


def write_config(cfg: DictConfig, output_dir: str | Path, name: str = "config.yaml") -> str:
    """Write the configuration to a file, log what differs from the defaults, and return that file's path."""
    path = Path(output_dir) / name
    path.write_text(OmegaConf.to_yaml(cfg))
    differing = "".join(f"\n  {key}={value}" for key, value in changes(cfg).items())
    logger.info("wrote %s: the defaults, but for%s", path, differing or " nothing")
    return str(path)


def get_cfg_from_args(args: argparse.Namespace) -> DictConfig:
    """Return the defaults, overlaid with `args.config_file`, `args.opts` and `args.output_dir`, in that order.

    `train.output_dir` comes out absolute; an empty `args.output_dir` leaves the configuration's.

    Raises:
        ConfigError: no such file, unknown keys, wrong types, words that are no override.
    """
    return _merged(args)[0]


def _merged(args: argparse.Namespace) -> tuple[DictConfig, list[str]]:
    layers = []
    if args.config_file:
        layers.append((str(args.config_file), load_config(args.config_file)))
    layers.append(("command line", read_overrides(getattr(args, "opts", None) or ())))
    cfg, unread = merge_strictly(dinov2_default_config, *layers)
    cfg.train.output_dir = str(Path(args.output_dir or cfg.train.output_dir).expanduser().resolve())
    return cfg, unread


def default_setup(args: argparse.Namespace, *, seed: int | None = None, device: str | None = None) -> None:
    """Join the other processes, open the log in `args.output_dir`, and seed every random generator.

    Args:
        args: with `output_dir`, and `seed` if the command has one.
        seed: in place of `args.seed`; rank r uses seed + r.
        device: where the run computes; by default the best there is.
    """
    if not distributed.is_enabled():
        distributed.enable(overwrite=True, device=device)
    rank = distributed.get_global_rank()
    setup_logging(output=args.output_dir, level=logging.INFO)
    fix_random_seeds((getattr(args, "seed", 0) if seed is None else seed) + rank)
    logger.info("git: %s", get_sha())
    logger.info("arguments: %s", " ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))


def setup(args: argparse.Namespace, *, for_training: bool = True, write: bool = True) -> DictConfig:
    """Turn a command line into a configuration that can run, with processes, log and seeds in place.

    Everything is checked before a process group or an output folder exists. Afterwards `args.output_dir` is absolute.

    Args:
        args: `config_file`, `output_dir`, `opts` (`section.key=value` words).
        for_training: false where no training images are needed, as in an evaluation.
        write: leave the configuration as `config.yaml` in the output folder.

    Raises:
        ConfigError: everything that is wrong with the configuration, at once.
    """
    cfg, unread = _merged(args)
    check(cfg, for_training=for_training)
    args.output_dir = cfg.train.output_dir
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    default_setup(args, seed=cfg.train.seed, device=None if cfg.train.device == "auto" else cfg.train.device)
    if distributed.is_main_process():
        for sentence in unread:
            logger.warning("%s", sentence)
        if for_training:
            for sentence in find_advice(cfg, effective_batch=get_effective_batch_size(cfg)):
                logger.warning("%s", sentence)
    apply_scaling_rules_to_cfg(cfg)
    if write and distributed.is_main_process():
        write_config(cfg, args.output_dir)
    return cfg
