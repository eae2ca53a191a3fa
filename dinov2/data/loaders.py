"""Datasets and torch data loaders by name, as DINOv2 makes them.

Pre-training reads its batches from `multicrop.MultiCropLoader`; these loaders serve everything else.
"""

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision import transforms

from dinov2.distributed import get_global_rank, get_global_size

from .datasets.custom_image_datasets import ImageDataset, LabelledDataset
from .datasets.registry import make_registered_dataset
from .samplers import EpochSampler, InfiniteSampler, ShardedInfiniteSampler
from .transforms import make_normalize_transform

logger = logging.getLogger("dinov2")


class SamplerType(Enum):
    """How `make_data_loader` orders the samples."""

    DISTRIBUTED = 0  # torch's DistributedSampler
    EPOCH = 1
    INFINITE = 2
    SHARDED_INFINITE = 3
    SHARDED_INFINITE_NEW = 4  # the same with a faster shuffle


def make_dataset(
    *, dataset_str: str, transform: Callable | None = None, target_transform: Callable | None = None
) -> Dataset:
    """Make the dataset that a string such as `ImageNet:split=TRAIN:root=…:extra=…` describes.

    Raises:
        ValueError: an unknown name or key; the message lists the known ones.
    """
    dataset = make_registered_dataset(dataset_str, transform, target_transform)
    logger.info("data set %s: %s samples", dataset_str, f"{len(dataset):,}")
    return dataset


def make_custom_dataset(
    dataset_path: str | os.PathLike | Sequence,
    transform: Callable | None = None,
    path_preserved: str | Sequence[str] | None = None,
    frac: float = 0.1,
    is_valid: bool = True,
    **options: Any,
) -> ImageDataset:
    """Make the unlabelled dataset of one folder or a list of folders; see `ImageDataset`, also for `options`."""
    return ImageDataset(dataset_path, transform, path_preserved, frac, is_valid, **options)


def make_labelled_dataset(
    labelled_dataset_path: str | os.PathLike,
    dataset_path: str | os.PathLike | None = None,
    transform: Callable | None = None,
    **options: Any,
) -> LabelledDataset:
    """Make a labelled dataset; see `LabelledDataset`, also for `options`.

    Args:
        labelled_dataset_path: a folder with one sub-folder per class, or a table of paths and labels.
        dataset_path: folder that the paths of a table start from; the table's own by default.
        transform: applied to each image; none by default (the cell fork draws random crops here, also for scoring).
    """
    return LabelledDataset(labelled_dataset_path, dataset_path, transform, **options)


def make_eval_dataset(
    labelled_dataset_path: str | os.PathLike, resize: int, dataset_path: str | os.PathLike | None = None
) -> LabelledDataset:
    """Make a labelled dataset that gives whole pictures, resized to squares of `resize` pixels and normalised."""
    transform = transforms.Compose(
        [transforms.Resize((resize, resize)), transforms.ToTensor(), make_normalize_transform()]
    )
    return LabelledDataset(labelled_dataset_path, dataset_path, transform)


def make_data_loader(
    *,
    dataset: Dataset,
    batch_size: int,
    num_workers: int,
    shuffle: bool = True,
    seed: int = 0,
    sampler_type: SamplerType | None = SamplerType.INFINITE,
    sampler_size: int = -1,
    sampler_advance: int = 0,
    drop_last: bool = True,
    persistent_workers: bool = False,
    collate_fn: Callable[[list], Any] | None = None,
    pin_memory: bool = False,
) -> DataLoader:
    """Make a torch data loader with one of DINOv2's samplers.

    Args:
        dataset: anything with a length.
        batch_size: samples per batch and process.
        num_workers: processes that load; 0 loads in this one.
        shuffle: a random order.
        seed: of that order.
        sampler_type: order of the samples; None for one plain pass.
        sampler_size: samples per epoch over all processes (EPOCH only); the whole dataset when not positive.
        sampler_advance: samples of this process to skip (the infinite types only).
        drop_last: leave out a last batch that is not full.
        persistent_workers: keep the workers between epochs.
        collate_fn: from a list of samples to a batch.
        pin_memory: put batches in page-locked memory, for a GPU.

    Raises:
        ValueError: a sampler size or advance that the sampler type does not have.
    """
    sampler = _make_sampler(sampler_type, len(dataset), dataset, shuffle, seed, sampler_size, sampler_advance)
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=drop_last,
        persistent_workers=persistent_workers,
        collate_fn=collate_fn,
    )


def _make_sampler(
    kind: SamplerType | None, sample_count: int, dataset: Dataset, shuffle: bool, seed: int, size: int, advance: int
) -> Sampler | None:
    if size > 0 and kind is not SamplerType.EPOCH:
        raise ValueError(f"sampler_size={size} is only for SamplerType.EPOCH, not for {kind}")
    if advance > 0 and kind in (SamplerType.EPOCH, SamplerType.DISTRIBUTED, None):
        raise ValueError(f"sampler_advance={advance} is only for the infinite samplers, not for {kind}")
    order = {"shuffle": shuffle, "seed": seed}
    match kind:
        case SamplerType.EPOCH:
            return EpochSampler(size=size if size > 0 else sample_count, sample_count=sample_count, **order)
        case SamplerType.INFINITE:
            return InfiniteSampler(sample_count=sample_count, advance=advance, **order)
        case SamplerType.SHARDED_INFINITE | SamplerType.SHARDED_INFINITE_NEW:
            fast = kind is SamplerType.SHARDED_INFINITE_NEW
            return ShardedInfiniteSampler(
                sample_count=sample_count, advance=advance, use_new_shuffle_tensor_slice=fast, **order
            )
        case SamplerType.DISTRIBUTED:
            return DistributedSampler(dataset, num_replicas=get_global_size(), rank=get_global_rank(), **order)
    return None


# ------------------------------------------------------------------------------------------- how many workers


def resolve_num_workers(requested: int | Literal["auto"], local_world_size: int = 1) -> int:
    """Choose how many worker processes this process may start.

    Args:
        requested: an upper bound, or "auto" for as many as there are CPUs for this process.
        local_world_size: processes on this node that share its CPUs.

    Returns:
        No more than the CPUs that affinity, container quota and SLURM leave to this process.

    Raises:
        ValueError: neither "auto" nor a number from 0 up.
    """
    share = usable_cpus(local_world_size, os.environ)
    if requested == "auto":
        return share
    if not isinstance(requested, int) or requested < 0:
        raise ValueError(f"num_workers={requested!r}: give a number from 0 up, or auto")
    if requested > share:
        logger.info("%d loader workers instead of %d: this process may use no more CPUs", share, requested)
    return min(requested, share)


def usable_cpus(local_world_size: int, environ: Mapping[str, str], root: Path = Path("/")) -> int:
    """Count the CPUs for one of `local_world_size` processes, at least 1; `root` is the file system to look in."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpus = min(affinity, _cgroup_quota(root))
    per_task = environ.get("SLURM_CPUS_PER_TASK", "")
    if not per_task.isdecimal():
        return max(1, int(cpus / local_world_size))
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or "1"
    if local_world_size > 1 and re.match(r"\d+", tasks) and int(re.match(r"\d+", tasks)[0]) == local_world_size:
        return max(1, int(min(cpus, int(per_task))))  # one task per process, so the CPUs are per process already
    return max(1, int(min(cpus, int(per_task)) / local_world_size))


def _cgroup_quota(root: Path) -> float:
    """CPUs that the control groups of this process allow, version 1 or 2; infinite without a limit."""
    quota = float("inf")
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, limit_of = root / "sys/fs/cgroup", _quota_v2
        elif "cpu" in controllers.split(","):
            base, limit_of = root / "sys/fs/cgroup" / controllers, _quota_v1
        else:
            continue
        group = Path(path.strip("/"))
        for folder in {base / group, *(base / parent for parent in group.parents), base}:
            quota = min(quota, limit_of(folder))
    return quota


def _quota_v2(folder: Path) -> float:
    return _cpus(*_read(folder / "cpu.max").split()[:2])


def _quota_v1(folder: Path) -> float:
    return _cpus(_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip())


def _cpus(quota: str = "", period: str = "") -> float:
    limited = quota.isdecimal() and period.isdecimal() and int(period) > 0
    return int(quota) / int(period) if limited else float("inf")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
