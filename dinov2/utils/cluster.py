"""What this machine knows about a cluster: its partitions, as SLURM's own commands tell them. No site is built in."""

import enum
import os
import re
import shutil
import subprocess
from dataclasses import dataclass

SINFO_FORMAT = "%P|%N|%G|%c|%l"  # partition (* for the default one), node, generic resources, CPUs, time limit
ANSWER_TIMEOUT_S = 20  # a controller that is down can keep its clients waiting for minutes


class ClusterType(enum.Enum):
    """Where jobs go from this machine."""

    SLURM = "slurm"
    LOCAL = "local"


def get_cluster_type() -> ClusterType:
    """Return SLURM where `sbatch` is on the PATH."""
    return ClusterType.SLURM if shutil.which("sbatch") else ClusterType.LOCAL


def get_slurm_partition() -> str | None:
    """Return the partition that SLURM's own variable SBATCH_PARTITION names; None leaves the choice to the cluster."""
    return os.environ.get("SBATCH_PARTITION") or None


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as it is declared to SLURM."""

    name: str
    gpus: int
    cpus: int


@dataclass(frozen=True)
class Partition:
    """A queue of the cluster."""

    name: str
    nodes: tuple[Node, ...]
    time_limit_min: int | None  # None: unlimited
    default: bool = False  # whether it takes the jobs that name no partition

    @property
    def max_gpus(self) -> int:
        """Return the largest number of GPUs in one of its nodes."""
        return max((node.gpus for node in self.nodes), default=0)


def query_partitions() -> dict[str, Partition] | None:
    """Ask `sinfo` for the partitions by name; None where it is not there or does not answer."""
    command = ["sinfo", "--noheader", "--Node", f"--format={SINFO_FORMAT}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_sinfo(answer.stdout)


def parse_sinfo(text: str) -> dict[str, Partition]:
    """Read lines of `sinfo --Node --format=SINFO_FORMAT`.

    Raises:
        ValueError: a line has another number of fields.
    """
    partitions: dict[str, Partition] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        fields = line.split("|")
        if len(fields) != SINFO_FORMAT.count("|") + 1:
            raise ValueError(f"sinfo answered {line!r}, which is not of the form {SINFO_FORMAT}")
        name, node, gres, cpus, limit = fields
        nodes = (Node(node, parse_gres_gpus(gres), int(cpus.rstrip("+"))),)
        is_default, name = name.endswith("*"), name.rstrip("*")
        nodes = (*partitions[name].nodes, *nodes) if name in partitions else nodes
        partitions[name] = Partition(name, nodes, parse_time(limit), is_default)
    return partitions


def parse_gres_gpus(gres: str) -> int:
    """Count the GPUs of a node in SLURM's list of generic resources: `gpu:a100:4(S:0-1),gpu:2,tmp:1T` -> 6."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", gres))


def parse_time(text: str) -> int | None:
    """Return the minutes of a SLURM time, rounded up; None for no limit.

    SLURM writes `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours[:minutes[:seconds]]`.

    Raises:
        ValueError: the text is no such time.
    """
    if text.strip().lower() in ("infinite", "unlimited", "n/a", "not_set"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} is not a SLURM time: write minutes, hours:minutes:seconds or days-hours:minutes:seconds"
        )
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None or len(numbers) == 3:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    else:
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    return (int(days or 0) * 24 + hours) * 60 + minutes + (seconds > 0)


def get_slurm_executor_parameters(
    nodes: int, num_gpus_per_node: int, *, mem_per_gpu: str | None = None, cpus_per_task: int | None = None, **kwargs
) -> dict[str, int | str]:
    """Name the resources of a job: one task per GPU, or one per node where no GPU is asked for.

    Args:
        nodes: number of machines.
        num_gpus_per_node: GPUs, hence tasks, on each.
        mem_per_gpu: main memory per GPU with its unit, such as 30G; None: the cluster's default.
        cpus_per_task: CPUs of each task; None: the cluster's default.
        kwargs: further parameters, such as `timeout_min`, or options of sbatch with `_` for `-`.

    Returns:
        The parameters that are set, under the names that submitit gives them.
    """
    parameters = {
        "nodes": nodes,
        "tasks_per_node": max(1, num_gpus_per_node),
        "gpus_per_node": num_gpus_per_node or None,
        "cpus_per_task": cpus_per_task,
        "mem_per_gpu": mem_per_gpu,
        **kwargs,
    }
    return {name: value for name, value in parameters.items() if value is not None}
