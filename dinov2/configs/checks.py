"""A configuration is refused before any work starts, with every problem named at once and a fix for each."""

import difflib
import glob
import importlib.util
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov2.configs.schema import Pair, section_names, walk

TYPES = dict(walk())
SECTIONS = frozenset(section_names())

DEPTHS = {"vit_tiny": 12, "vit_small": 12, "vit_base": 12, "vit_large": 24, "vit_giant2": 40}  # blocks
RELEASED = tuple(f"dinov2_vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg"))
CHOICES = {
    "student.arch": tuple(DEPTHS),
    "student.ffn_layer": ("mlp", "swiglu", "swiglufused", "identity"),
    "student.attention_backend": ("auto", "sdpa", "flex", "varlen", "xformers"),
    "train.centering": ("centering", "sinkhorn_knopp"),
    "train.augment_on": ("cpu", "device"),
    "train.activation_checkpointing": ("none", "selective", "full"),
    "optim.scaling_rule": ("sqrt_wrt_1024", "linear_wrt_256"),
    "compute_precision.dtype": ("auto", "config", "fp32", "bf16", "fp16"),
}
for _key in TYPES:
    if _key.endswith("sharding_strategy"):
        CHOICES[_key] = ("NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD")
    elif _key.endswith(("param_dtype", "reduce_dtype", "buffer_dtype")):
        CHOICES[_key] = ("fp32", "bf16", "fp16")

TRACKERS = ("wandb", "mlflow")  # extras of the same names

INFINITY = float("inf")

# key: lowest and highest value allowed
RANGES: dict[str, tuple[float, float]] = {
    **{
        f"{head}.head_{key}": (1, INFINITY)
        for head in ("dino", "ibot")
        for key in ("n_prototypes", "bottleneck_dim", "nlayers", "hidden_dim")
    },
    "dino.koleo_loss_weight": (0, INFINITY),
    "dino.loss_weight": (0, INFINITY),
    "ibot.loss_weight": (0, INFINITY),
    "ibot.mask_sample_probability": (0, 1),
    "train.batch_size_per_gpu": (1, INFINITY),
    "train.frac": (0, 1),
    "train.saveckp_freq": (1, INFINITY),
    "train.seed": (0, 2**63 - 1),
    "train.OFFICIAL_EPOCH_LENGTH": (1, INFINITY),
    "train.cache_max_gb": (0, INFINITY),
    "train.max_unreadable_share": (0, 1),
    "train.gradient_accumulation_steps": (1, INFINITY),
    "train.log_period": (1, INFINITY),
    "train.peak_tflops": (0, INFINITY),
    "train.profile_steps": (0, INFINITY),
    "student.patch_size": (1, INFINITY),
    "student.layerscale": (0, INFINITY),
    "student.block_chunks": (0, INFINITY),
    "student.num_register_tokens": (0, INFINITY),
    "student.interpolate_offset": (0, INFINITY),
    "student.in_chans": (1, INFINITY),
    "teacher.momentum_teacher": (0, 1),
    "teacher.final_momentum_teacher": (0, 1),
    "teacher.warmup_teacher_temp_epochs": (0, INFINITY),
    "gram.loss_weight": (0, INFINITY),
    "gram.start_iteration": (0, INFINITY),
    "gram.update_every": (0, INFINITY),
    "optim.epochs": (1, INFINITY),
    "optim.weight_decay": (0, INFINITY),
    "optim.weight_decay_end": (0, INFINITY),
    "optim.min_lr": (0, INFINITY),
    "optim.warmup_epochs": (0, INFINITY),
    "optim.clip_grad": (0, INFINITY),
    "optim.freeze_last_layer_epochs": (0, INFINITY),
    "optim.freeze_backbone_epochs": (0, INFINITY),
    "optim.freeze_layers": (0, INFINITY),
    "optim.backbone_lr_mult": (0, INFINITY),
    "optim.patch_embed_lr_mult": (0, INFINITY),
    "optim.layerwise_decay": (0, 1),
    "crops.local_crops_number": (0, INFINITY),
    "crops.global_crops_size": (1, INFINITY),
    "crops.local_crops_size": (1, INFINITY),
    **{
        f"augmentations.{key}": (0, 1)
        for key in (
            *("horizontal_flip", "vertical_flip", "color_jitter", "grayscale"),
            *("blur_global_1", "blur_global_2", "blur_local", "solarize_global_2"),
        )
    },
    **{f"augmentations.{key}": (0, INFINITY) for key in ("brightness", "contrast", "saturation", "hed_jitter")},
    "augmentations.hue": (0, 0.5),
    "evaluation.eval_period_iterations": (0, INFINITY),
    "evaluation.batch_size": (1, INFINITY),
    "evaluation.image_size": (0, INFINITY),
    "checkpoint.period_iterations": (0, INFINITY),
    "checkpoint.keep_last": (1, INFINITY),
    "checkpoint.keep_every_iterations": (0, INFINITY),
}
POSITIVE = ("teacher.warmup_teacher_temp", "teacher.teacher_temp", "optim.base_lr")
BELOW_ONE = ("student.drop_path_rate", "optim.adamw_beta1", "optim.adamw_beta2")
PAIRS = {  # key: lowest and highest value allowed
    "ibot.mask_ratio_min_max": (0.0, 1.0),
    "crops.global_crops_scale": (0.0, 1.0),
    "crops.local_crops_scale": (0.0, 1.0),
    "augmentations.blur_sigma": (0.0, INFINITY),
}

# Keys of DINOv2's relatives that load without being read: why they have no effect here.
UNREAD = {
    "daino": "the cell fork's labelled loss is not part of this project",
    "data_transform": "DinoBloom's switch; see the section augmentations",
    "student.channel_adaptive": "see student.in_chans",
    "train.cell_augmentation": "see the section augmentations",
    "train.cell_augmentation_type": "see the section augmentations",
}
BUFFERS = "buffers (centres, sums) stay in fp32"  # whatever a buffer_dtype says


class ConfigError(ValueError):
    """A configuration that cannot run. `problems` holds one sentence per problem, with its fix."""

    def __init__(self, problems: Sequence[str], source: str = "the configuration"):
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n".join([f"{count} in {source}:", *(f"  - {problem}" for problem in self.problems)]))


# ---------------------------------------------------------------------------------------------------------- merging


def read_overrides(overrides: Iterable[str]) -> DictConfig:
    """Turn `section.key=value` words of a command line into a configuration.

    Raises:
        ConfigError: a word has no `=`, comes from the options, or is not readable as YAML.
    """
    problems, words = [], []
    for word in overrides:
        if word.startswith("-"):
            problems.append(f"{word} comes after a key=value override: put the options first")
        elif "=" not in word or word.startswith("="):
            problems.append(f"{word!r} is not an override: write section.key=value{_suggest(word)}")
        else:
            words.append(word)
    if problems:
        raise ConfigError(problems, "the overrides")
    try:
        return OmegaConf.from_dotlist(words)
    except Exception as error:  # YAML and OmegaConf raise kinds without a common ancestor
        raise ConfigError([f"cannot read {' '.join(words)}: {error}"], "the overrides") from error


def merge_strictly(default: DictConfig, *layers: tuple[str, DictConfig]) -> tuple[DictConfig, list[str]]:
    """Merge layers over the defaults, later ones winning, and refuse unknown keys and wrong types.

    Args:
        default: every key there is.
        layers: (name for messages, configuration) pairs.

    Returns:
        The merged configuration, and a sentence for each key that was given but is read by no code.

    Raises:
        ConfigError: every unknown key and wrong type of every layer.
    """
    problems, unread, merged = [], [], default
    for source, layer in layers:
        known: dict[str, Any] = {}
        for key, value in _leaves(layer):
            if reason := _why_unread(key):
                unread.append(f"{key} ({source}) has no effect: {reason}")
            elif key in SECTIONS:
                problems.append(f"{key}={value!r} ({source}): expected a section, `{key}:` with keys below it")
            elif key not in TYPES:
                problems.append(f"unknown key {key} ({source}){_suggest(key)}")
            elif value == "???":
                problems.append(f"{key} ({source}) has no value yet: replace the ???")
            else:
                known[key] = value
                if key.endswith(".buffer_dtype") and value != "fp32":
                    unread.append(f"{key} ({source}) has no effect: {BUFFERS}")
        clean = OmegaConf.create()
        for key, value in known.items():
            OmegaConf.update(clean, key, _empty_for_null(key, value))
        try:
            merged = OmegaConf.merge(merged, clean)
            values = {key: OmegaConf.select(merged, key) for key in known}
        except OmegaConfBaseException as error:
            problems.append(f"{source}: {error}")
            continue
        problems += [message for key, value in values.items() if (message := _type_problem(key, value, source))]
    if problems:
        raise ConfigError(problems)
    return _normalised(merged), sorted(set(unread))


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, raw value) of everything below known and unknown sections; an empty section has none."""
    for name, value in OmegaConf.to_container(node, resolve=False).items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in TYPES:
            yield from _leaves(OmegaConf.create(value), f"{key}.")
        elif value is not None or key not in SECTIONS:
            yield key, value


def _why_unread(key: str) -> str | None:
    return next((reason for name, reason in UNREAD.items() if key == name or key.startswith(f"{name}.")), None)


def _empty_for_null(key: str, value: Any) -> Any:
    """Null means empty where there is an empty value: a text or a list."""
    if value is not None:
        return value
    kinds = typing.get_args(TYPES[key]) or (TYPES[key],)
    return [] if key == "train.path_preserved" else "" if str in kinds and int not in kinds else None


def _normalised(cfg: DictConfig) -> DictConfig:
    """Accept one folder where a list is meant, `~`, and null section values; the rest stays as it is."""
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    train = cfg.train
    train.path_preserved = [_expanded(path) for path in _as_list(train.path_preserved)]
    if isinstance(train.dataset_path, str):
        train.dataset_path = _expanded(train.dataset_path)
    else:
        train.dataset_path = [_expanded(path) for path in train.dataset_path]
    for section, key in (
        *((cfg.train, key) for key in ("exclude", "output_dir", "cache_dir")),
        *((cfg.evaluation, key) for key in ("fit_dataset_path", "eval_dataset_path")),
        (cfg.student, "pretrained_weights"),
        *((cfg.distillation, key) for key in ("config_file", "checkpoint")),
        (cfg.MODEL, "WEIGHTS"),
    ):
        section[key] = _expanded(section[key])
    return cfg


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) and value else list(value)


def _expanded(path: str) -> str:
    return os.path.expanduser(path) if path.startswith("~") else path


# ------------------------------------------------------------------------------------------------- keys and types


def _suggest(key: str) -> str:
    """Return `: did you mean …?` with the nearest valid keys, or nothing where none is near."""
    section, _, name = key.partition("=")[0].rpartition(".")
    siblings = {known.lower(): known for known in TYPES if section and known.startswith(f"{section}.")}
    near = [
        siblings[match] for match in difflib.get_close_matches(f"{section}.{name}".lower(), siblings, n=1, cutoff=0.75)
    ]
    elsewhere: dict[str, list[str]] = {}
    for known in TYPES:
        if known.lower() not in siblings:
            elsewhere.setdefault(known.rpartition(".")[2].lower(), []).append(known)
    for leaf in difflib.get_close_matches(name.lower(), elsewhere, n=1, cutoff=0.75):
        near += elsewhere[leaf][:2]
    if near:
        return f": did you mean {' or '.join(near)}?"
    sections = difflib.get_close_matches(key.partition(".")[0], {known.partition(".")[0] for known in TYPES}, n=1)
    return f": did you mean the section {sections[0]}?" if sections and sections[0] != key.partition(".")[0] else ""


_SAID = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Pair: "two numbers [low, high]",
}


def _type_problem(key: str, value: Any, source: str) -> str | None:
    kind = TYPES[key]
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if any(_is_a(value, each) for each in kinds):
        return None
    expected = " or ".join(_SAID.get(each) or f"a list of {_LIST_OF[each]}" for each in kinds)
    shown = "null" if value is None else repr(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)
    return f"{key}={shown} ({source}): expected {expected}"


_LIST_OF = {list[str]: "texts", list[float]: "numbers"}


def _is_a(value: Any, kind: Any) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if typing.get_origin(kind) in (list, tuple):
        items = list(value) if OmegaConf.is_list(value) or isinstance(value, (list, tuple)) else None
        if items is None or (typing.get_origin(kind) is tuple and len(items) != 2):
            return False
        return all(_is_a(item, typing.get_args(kind)[0]) for item in items)
    return isinstance(value, kind)


# ------------------------------------------------------------------------------- what types cannot say: find_problems


def find_problems(cfg: DictConfig, *, for_training: bool = True) -> Iterator[str]:
    """Yield one sentence per reason why a complete configuration cannot run, with its fix.

    Args:
        cfg: a merged configuration: every key is there, with the right type.
        for_training: look for the folders of images too; an evaluation needs none of them.
    """
    yield from _choice_problems(cfg)
    yield from _range_problems(cfg)
    yield from _crop_problems(cfg)
    yield from _architecture_problems(cfg)
    yield from _loss_problems(cfg)
    yield from _schedule_problems(cfg)
    yield from _device_problems(cfg)
    yield from _weights_problems(cfg)
    if for_training:
        yield from _distillation_problems(cfg)
        yield from _data_problems(cfg)
        yield from _evaluation_problems(cfg)


def check(cfg: DictConfig, *, for_training: bool = True) -> DictConfig:
    """Return `cfg`, or raise a ConfigError with every problem that `find_problems` finds."""
    if problems := list(find_problems(cfg, for_training=for_training)):
        raise ConfigError(problems)
    return cfg


def _choice_problems(cfg: DictConfig) -> Iterator[str]:
    for key, choices in CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"{key}={value} is unknown: choose from {', '.join(choices)}{hint}"


def _range_problems(cfg: DictConfig) -> Iterator[str]:
    for key, (low, high) in RANGES.items():
        value = OmegaConf.select(cfg, key)
        if not low <= value <= high:
            yield f"{key}={value} is out of range: {_interval(low, high)}"
    for key in POSITIVE:
        if not (value := OmegaConf.select(cfg, key)) > 0:
            yield f"{key}={value} must be greater than 0"
    for key in BELOW_ONE:
        if not 0 <= (value := OmegaConf.select(cfg, key)) < 1:
            yield f"{key}={value} is out of range: at least 0, below 1"
    for key, (low, high) in PAIRS.items():
        first, last = OmegaConf.select(cfg, key)
        if not low <= first <= last <= high:
            yield f"{key}=[{first}, {last}] must be ordered [low, high], {_interval(low, high)}"


def _interval(low: float, high: float) -> str:
    return f"at least {low:g}" if high == INFINITY else f"between {low:g} and {high:g}"


def _crop_problems(cfg: DictConfig) -> Iterator[str]:
    patch = cfg.student.patch_size
    sizes = {"crops.global_crops_size": cfg.crops.global_crops_size, "evaluation.image_size": cfg.evaluation.image_size}
    if cfg.crops.local_crops_number > 0:
        sizes["crops.local_crops_size"] = cfg.crops.local_crops_size
    for key, size in sizes.items():
        if patch > 0 and size > 0 and size % patch:
            below, above = size // patch * patch, (size // patch + 1) * patch
            nearest = f"{below} or {above}" if below else f"{above}"
            yield f"{key}={size} is not a multiple of student.patch_size={patch}: set it to {nearest}"
    for key in ("crops.global_crops_scale", "crops.local_crops_scale", "augmentations.blur_sigma"):
        if OmegaConf.select(cfg, key)[0] == 0:
            yield f"{key}[0]=0 must be greater than 0"
    channels = cfg.student.in_chans
    for name in ("mean", "std"):
        values = cfg.augmentations[name]
        if len(values) != channels:
            yield (
                f"augmentations.{name} has {len(values)} values for student.in_chans={channels} channels: "
                f"give one per channel"
            )
    if any(value <= 0 for value in cfg.augmentations.std):
        yield f"augmentations.std={list(cfg.augmentations.std)} must be greater than 0 in every channel"


def _architecture_problems(cfg: DictConfig) -> Iterator[str]:
    depth, chunks = DEPTHS.get(cfg.student.arch), cfg.student.block_chunks
    if depth and chunks > 0 and depth % chunks:
        divisors = ", ".join(str(n) for n in range(1, depth + 1) if depth % n == 0)
        yield (
            f"student.block_chunks={chunks} does not divide the {depth} blocks of {cfg.student.arch}: "
            f"choose 0 (no chunks) or one of {divisors}"
        )
    if depth and cfg.optim.freeze_layers > depth:
        yield f"optim.freeze_layers={cfg.optim.freeze_layers} is more than the {depth} blocks of {cfg.student.arch}"


def _loss_problems(cfg: DictConfig) -> Iterator[str]:
    batch, koleo = cfg.train.batch_size_per_gpu, cfg.dino.koleo_loss_weight
    if cfg.dino.loss_weight == cfg.ibot.loss_weight == koleo == 0:
        yield "dino.loss_weight, ibot.loss_weight and dino.koleo_loss_weight are all 0: nothing would be learnt"
    if batch == 1 and koleo > 0 and not cfg.dino.koleo_distributed:
        yield (
            f"train.batch_size_per_gpu=1 leaves KoLeo (dino.koleo_loss_weight={koleo}) without a nearest neighbour: "
            "set dino.koleo_loss_weight=0 or a batch of at least 2"
        )
    if cfg.ibot.loss_weight > 0:
        yield from _mask_problems(cfg)


def _mask_problems(cfg: DictConfig) -> Iterator[str]:
    ibot, fix = cfg.ibot, "raise it, or set ibot.loss_weight=0"
    crops = 2 * cfg.train.batch_size_per_gpu
    patches = (cfg.crops.global_crops_size // max(cfg.student.patch_size, 1)) ** 2
    highest = ibot.mask_ratio_min_max[1]
    if int(crops * ibot.mask_sample_probability) < 1:
        yield (
            f"ibot.mask_sample_probability={ibot.mask_sample_probability} masks none of the {crops} global crops of a "
            f"batch while ibot.loss_weight={ibot.loss_weight}: {fix}"
        )
    if patches > 0 and int(patches * highest) < 1:
        yield (
            f"ibot.mask_ratio_min_max={list(ibot.mask_ratio_min_max)} masks none of the {patches} patches of a crop "
            f"while ibot.loss_weight={ibot.loss_weight}: {fix}"
        )


def _schedule_problems(cfg: DictConfig) -> Iterator[str]:
    iterations = cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH
    if cfg.gram.loss_weight > 0 and cfg.gram.start_iteration >= iterations > 0:
        yield (
            f"gram.start_iteration={cfg.gram.start_iteration} is not reached in a run of {iterations} iterations: "
            "lower it, or set gram.loss_weight=0"
        )
    for key in ("warmup_epochs", "freeze_last_layer_epochs", "freeze_backbone_epochs"):
        if cfg.optim[key] > max(cfg.optim.epochs, 0):
            yield f"optim.{key}={cfg.optim[key]} is longer than the run, optim.epochs={cfg.optim.epochs}: shorten it"


def _device_problems(cfg: DictConfig) -> Iterator[str]:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", cfg.train.device):
        yield f"train.device={cfg.train.device} is unknown: choose auto, cpu, cuda or cuda:N"
    workers = cfg.train.num_workers
    if cfg.checkpoint.asynchronous not in (True, False, "auto"):
        yield f"checkpoint.asynchronous={cfg.checkpoint.asynchronous} is unknown: choose true, false or auto"
    for name in cfg.train.loggers:
        if name not in TRACKERS:
            yield f"train.loggers: {name} is unknown: choose from {', '.join(TRACKERS)}"
        elif importlib.util.find_spec(name) is None:
            yield f"train.loggers: {name} is not installed: pip install 'dinov2[{name}]', or leave it out"
    if (isinstance(workers, str) and workers != "auto") or (isinstance(workers, int) and workers < 0):
        yield f"train.num_workers={workers} must be auto or a whole number from 0 (load in the main process)"


def _weights_problems(cfg: DictConfig) -> Iterator[str]:
    if cfg.student.pretrained_heads and cfg.student.pretrained_weights in RELEASED:
        yield (
            f"student.pretrained_heads=true: {cfg.student.pretrained_weights} was released without heads; "
            "set it to false, or give the teacher_checkpoint.pth of a run"
        )
    for key in ("student.pretrained_weights", "MODEL.WEIGHTS"):
        source = OmegaConf.select(cfg, key)
        named = source in ("", *RELEASED) or source.startswith("hf:")
        if not named and not Path(source).exists():
            near = difflib.get_close_matches(source, RELEASED, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            names = ", ".join(RELEASED)
            yield f"{key}={source}: no such file; give a weights file, hf:owner/model or one of {names}{hint}"


def _distillation_problems(cfg: DictConfig) -> Iterator[str]:
    if not cfg.distillation.enabled:
        return
    for key, what in (("config_file", "RUN/config.yaml"), ("checkpoint", "RUN/eval/training_N/teacher_checkpoint.pth")):
        path = cfg.distillation[key]
        if not Path(path).is_file():
            yield f"distillation.{key}={path or repr('')}: no such file; give that of the run to learn from, {what}"


DATA_FILES = (".csv", ".tsv", ".parquet", ".tar")  # what train.dataset_path takes beside folders


def _is_dataset_string(dataset_path: Any) -> bool:
    """Return whether a dataset path is upstream's `Name:key=value:…` rather than a folder."""
    return isinstance(dataset_path, str) and re.match(r"[A-Za-z]\w*:\w+=", dataset_path) is not None


def _data_problems(cfg: DictConfig) -> Iterator[str]:
    train = cfg.train
    how = "set train.dataset_path to a folder of images or a list of such folders, as train.dataset_path=[dirA,dirB]"
    if not train.dataset_path or train.dataset_path == "ImageNet:split=TRAIN":
        yield f"train.dataset_path={train.dataset_path!r} is still the default: {how}"
        return
    if _is_dataset_string(train.dataset_path):
        yield from _dataset_string_problems(train.dataset_path, how)
    else:
        for folder in _as_list(train.dataset_path):
            path = str(folder.get("path", "") if isinstance(folder, Mapping) else folder)
            matches = [path] if Path(path).exists() else glob.glob(path)
            if matches and all(Path(m).is_dir() or m.lower().endswith(DATA_FILES) for m in matches):
                continue
            said = "is neither a folder nor a manifest or shard" if matches else "does not exist"
            yield f"train.dataset_path: {path} {said}; {how}"
    given = [
        os.path.realpath(folder.get("path", "") if isinstance(folder, Mapping) else folder)
        for folder in _as_list(train.dataset_path)
    ]
    for folder in train.path_preserved:
        inside = os.path.realpath(folder)
        if not any(inside == path or inside.startswith(path + os.sep) for path in given):
            yield (
                f"train.path_preserved: {folder} is not among train.dataset_path, nor in one of its folders: "
                "add it there, or leave it out here"
            )
    if train.exclude and not Path(train.exclude).is_file():
        yield f"train.exclude={train.exclude}: no such file; give a text file with one image path a line, or nothing"


def _dataset_string_problems(dataset: str, how: str) -> Iterator[str]:
    root = re.search(r":root=([^:]+)", dataset)
    if root is None:
        yield f"train.dataset_path={dataset!r} names no :root=FOLDER: add one, or {how}"
    elif not Path(root[1]).is_dir():
        yield f"train.dataset_path={dataset!r}: no such folder {root[1]}"


def _evaluation_problems(cfg: DictConfig) -> Iterator[str]:
    paths = {key: cfg.evaluation[key] for key in ("fit_dataset_path", "eval_dataset_path")}
    for key, path in paths.items():
        other = next(name for name in paths if name != key)
        if path and not paths[other]:
            yield f"evaluation.{key} is given but evaluation.{other} is not: give both, or neither"
        if path and not Path(path).exists():
            yield f"evaluation.{key}={path} does not exist: give a folder with one folder per class, or a CSV file"


# ----------------------------------------------------------------------------------------------------------- advice


def find_advice(cfg: DictConfig, *, effective_batch: int) -> Iterator[str]:
    """Yield warnings about settings that run but rarely learn. `effective_batch`: images per optimizer step."""
    if cfg.distillation.enabled and cfg.student.drop_path_rate > 0:
        yield (
            f"student.drop_path_rate={cfg.student.drop_path_rate}: DINOv2 distils without stochastic depth (paper, "
            "section 5); set it to 0"
        )
    prototypes = max(cfg.dino.head_n_prototypes, cfg.ibot.head_n_prototypes if cfg.ibot.separate_head else 0)
    if effective_batch < 256 and (cfg.train.centering == "centering" or prototypes >= 65536):
        yield (
            f"effective batch of {effective_batch}: the defaults (centering, 65536 prototypes and more) were tuned for "
            "1024 to 3072 and often collapse below 256; train/vits_cells.yaml shows settings for small batches"
        )
