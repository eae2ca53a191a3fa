"""What can be known to go wrong before a job waits in a queue for it."""

import difflib
import os
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from dinov2.utils.cluster import Partition

# File systems of one machine only; whatever is not among them is taken to be shared by the cluster.
LOCAL_FILE_SYSTEMS = {"btrfs", "devtmpfs", "ext2", "ext3", "ext4", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}


def resource_problems(
    partitions: Mapping[str, Partition], partition: str | None, *, nodes: int, gpus: int, cpus_per_task: int | None
) -> Iterator[str]:
    """Say what no node of the partition can give, in sentences with the fix in them.

    Args:
        partitions: of the cluster, by name.
        partition: one name or several joined by commas; None: any.
        nodes: number of machines.
        gpus: GPUs on each, one process for each.
        cpus_per_task: CPUs of each process; None: not asked for.
    """
    names = partition.split(",") if partition else list(partitions)
    for name in names:
        if name not in partitions:
            nearest = difflib.get_close_matches(name, partitions, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
            yield f"--partition {name}: no such partition on this cluster; {hint}it has {', '.join(sorted(partitions))}"
    chosen = [partitions[name] for name in names if name in partitions]
    if not chosen:
        return
    where = f"partition {partition}" if partition else "this cluster"
    most = max(each.max_gpus for each in chosen)
    fitting = max(sum(node.gpus >= gpus for node in each.nodes) for each in chosen)
    if gpus > most:
        enough = -(-nodes * gpus // most) if most else 0
        hint = f"--ngpus {most} --nodes {enough} gives {most * enough}" if most else "--ngpus 0 runs on CPUs"
        yield f"--ngpus {gpus}: no node of {where} has more than {most} GPUs; {hint}"
    elif nodes > fitting:
        yield f"--nodes {nodes}: {where} has only {fitting} node(s) with {gpus} GPUs"
    if cpus_per_task:
        cpus = max(node.cpus for each in chosen for node in each.nodes)
        if cpus_per_task * max(1, gpus) > cpus:
            yield (
                f"--cpus-per-task {cpus_per_task}: {max(1, gpus)} process(es) of a node need "
                f"{cpus_per_task * max(1, gpus)} CPUs, and no node of {where} has more than {cpus}; "
                f"at most {cpus // max(1, gpus)} each"
            )


def shared_cpus(partitions: Mapping[str, Partition], partition: str | None, gpus: int) -> int | None:
    """Return how many CPUs of a node fall to each of its GPUs (to its one process without GPUs); None if unknown."""
    names = partition.split(",") if partition else list(partitions)
    nodes = [node for name in names if name in partitions for node in partitions[name].nodes if node.gpus >= gpus]
    return min((max(1, node.cpus // max(1, node.gpus)) for node in nodes), default=None)


def time_limit(partitions: Mapping[str, Partition], partition: str | None) -> int | None:
    """Return the longest time that a job may run in the partition, in minutes; None if unlimited or unknown."""
    chosen = [partitions[name] for name in (partition or "").split(",") if name in partitions]
    limits = [each.time_limit_min for each in chosen]
    return None if None in limits else max(limits, default=None)


def folder_problem(folder: Path) -> str | None:
    """Say why nothing can be written to the folder, which need not exist yet; None if it can."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        below = "" if existing == folder else f" (checked at {existing}, the part of it that exists)"
        return f"--output-dir {folder}: cannot write there: {error.strerror}{below}"


def missing_paths(paths: Mapping[str, str]) -> Iterator[str]:
    """Name what is not there, with the part of its path that is.

    Args:
        paths: what each path is, such as "train.dataset_path", by path.
    """
    for path, meaning in paths.items():
        absolute = Path(path).expanduser().absolute()
        if not absolute.exists():
            existing = next(parent for parent in absolute.parents if parent.exists())
            yield f"{meaning}: {path} is not there (of its path only {existing} is)"


def locality_warnings(paths: Iterable[str], node_names: Sequence[str]) -> Iterator[str]:
    """Name the paths that other machines of the cluster may not see."""
    others = sorted(set(node_names) - {socket.gethostname(), socket.gethostname().split(".")[0], "localhost"})
    if not others:
        return
    mounts = _mounts()
    for path in dict.fromkeys(str(Path(path).expanduser().absolute()) for path in paths):
        kind = _file_system(path, mounts)
        if kind in LOCAL_FILE_SYSTEMS:
            nodes = others[0] if len(others) == 1 else f"{others[0]} ... {others[-1]}"
            yield f"{path} is on a disk of this machine ({kind}): make sure that {nodes} see it under the same path"


def _mounts() -> list[tuple[str, str]]:
    """Return mount points with their file systems, the longest first."""
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:  # not Linux
        return []
    return sorted(((fields[1], fields[2]) for fields in map(str.split, lines)), key=lambda m: len(m[0]), reverse=True)


def _file_system(path: str, mounts: list[tuple[str, str]]) -> str | None:
    real = os.path.realpath(path)
    return next((kind for point, kind in mounts if real == point or real.startswith(point.rstrip("/") + "/")), None)
