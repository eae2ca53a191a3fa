"""Configurations: the defaults, the shipped presets, and the checks that refuse an impossible one.

A configuration is an OmegaConf `DictConfig` everywhere; the schema and the checks work on the merged result.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from dinov2.configs.checks import ConfigError, check, find_advice, find_problems, merge_strictly, read_overrides
from dinov2.configs.schema import walk

__all__ = [
    "ConfigError",
    "changes",
    "check",
    "dinov2_default_config",
    "find_advice",
    "find_problems",
    "load_and_merge_config",
    "load_config",
    "merge_strictly",
    "read_overrides",
    "shipped_configs",
]

_FOLDER = Path(__file__).parent


def shipped_configs() -> list[str]:
    """Return the names of the configurations that come with the package, as `load_config` takes them."""
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.rglob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """Return the file of a configuration: a path, or the name of a shipped one, with or without `.yaml`.

    Raises:
        ConfigError: there is no such file.
    """
    for stem in (Path(name).expanduser(), _FOLDER / name):
        for candidate in (stem, stem.with_name(f"{stem.name}.yaml")):
            if candidate.is_file():
                return candidate
    known = shipped_configs()
    near = difflib.get_close_matches(str(name).removesuffix(".yaml"), known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"shipped ones: {', '.join(known)}"
    raise ConfigError([f"no such config file: {name}; {hint}"], "the arguments")


def load_config(config_name: str | Path) -> DictConfig:
    """Return one configuration file as it is written.

    Raises:
        ConfigError: there is no such file, or it is not a YAML mapping.
    """
    path = find_config(config_name)
    try:
        loaded = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ConfigError([f"not readable as YAML: {error}"], str(path)) from error
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(["expected `section:` lines with `key: value` lines below"], str(path))
    return loaded


dinov2_default_config = load_config("ssl_default_config")


def load_and_merge_config(config_name: str | Path, overrides: Iterable[str] = ()) -> DictConfig:
    """Return the defaults, overlaid with a configuration file and then with `section.key=value` overrides.

    Unknown keys and wrong types are refused; whether the result can run is for `check` to say.

    Raises:
        ConfigError: no such file, unknown keys, wrong types.
    """
    layers = ((str(config_name), load_config(config_name)), ("command line", read_overrides(overrides)))
    return merge_strictly(dinov2_default_config, *layers)[0]


def changes(cfg: DictConfig) -> dict[str, Any]:
    """Return the keys, in dotted form, and values in which a configuration differs from the defaults."""
    values = ((key, OmegaConf.select(cfg, key)) for key, _ in walk())
    return {key: value for key, value in values if value != OmegaConf.select(dinov2_default_config, key)}
