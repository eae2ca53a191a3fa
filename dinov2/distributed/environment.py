"""Which launcher started this process, as a value: SLURM, torchrun or none. Nothing here has a side effect."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_TORCHRUN_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")


@dataclass(frozen=True)
class ProcessEnvironment:
    """The place of one process among all processes of a run."""

    launcher: str  # "torchrun", "slurm" or "single"
    rank: int = 0  # among all processes
    world_size: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"  # host name where rank 0 listens
    master_port: int = 0  # TCP port; 0 where no other process has to be met

    def as_variables(self) -> dict[str, str]:
        """Return the variables that `torch.distributed` (`env://`) and its users read."""
        return {
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
        }


def detect(environ: Mapping[str, str]) -> ProcessEnvironment:
    """Read the launcher from environment variables.

    torchrun wins over SLURM, because it is often started inside a SLURM job. A SLURM job counts only inside `srun`
    (a job step): the batch script itself and an `salloc` shell are one process, whatever the job has reserved.

    Raises:
        ValueError: the variables of a launcher are there in part, or are not numbers.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _from_torchrun(environ)
    if "SLURM_PROCID" in environ and ("SLURM_STEP_ID" in environ or "SLURM_STEP_NUM_TASKS" in environ):
        return _from_slurm(environ)
    return ProcessEnvironment(launcher="single")


def _from_torchrun(environ: Mapping[str, str]) -> ProcessEnvironment:
    missing = [name for name in _TORCHRUN_VARIABLES if name not in environ]
    if missing:
        raise ValueError(
            f"RANK and WORLD_SIZE are set, {', '.join(missing)} not: start with torchrun, or unset RANK and WORLD_SIZE"
        )
    rank, world_size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    return _checked(
        ProcessEnvironment(
            launcher="torchrun",
            rank=rank,
            world_size=world_size,
            local_rank=_integer(environ, "LOCAL_RANK", default=rank),
            local_world_size=_integer(environ, "LOCAL_WORLD_SIZE", default=world_size),
            master_addr=environ["MASTER_ADDR"],
            master_port=_integer(environ, "MASTER_PORT"),
        )
    )


def _from_slurm(environ: Mapping[str, str]) -> ProcessEnvironment:
    world_size = _integer(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", default=1)
    nodes = _parse_slurm_node_list(_first(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", default="127.0.0.1"))
    tasks_per_node = _parse_slurm_task_counts(_first(environ, "SLURM_STEP_TASKS_PER_NODE", default=""))
    node = _integer(environ, "SLURM_NODEID", default=0)
    local_world_size = tasks_per_node[node] if node < len(tasks_per_node) else max(1, world_size // len(nodes))
    job, step = _integer(environ, "SLURM_JOB_ID", default=0), _integer(environ, "SLURM_STEP_ID", default=0)
    return _checked(
        ProcessEnvironment(
            launcher="slurm",
            rank=_integer(environ, "SLURM_PROCID"),
            world_size=world_size,
            local_rank=_integer(environ, "SLURM_LOCALID", default=0),
            local_world_size=local_world_size,
            master_addr=environ.get("MASTER_ADDR", nodes[0]),
            # Every rank derives the same port without talking; two steps of one job, or two jobs, rarely share it.
            master_port=_integer(environ, "MASTER_PORT", default=20_000 + (31 * job + step) % 12_000),
        )
    )


def _checked(environment: ProcessEnvironment) -> ProcessEnvironment:
    if not (0 <= environment.rank < environment.world_size and environment.local_rank >= 0):
        raise ValueError(
            f"the {environment.launcher} variables contradict each other: rank {environment.rank} (local "
            f"{environment.local_rank}) of {environment.world_size} processes"
        )
    return environment


def _first(environ: Mapping[str, str], *names: str, default: str) -> str:
    return next((environ[name] for name in names if environ.get(name)), default)


def _integer(environ: Mapping[str, str], *names: str, default: int | None = None) -> int:
    name = next((name for name in names if environ.get(name)), None)
    if name is None:
        if default is None:
            raise ValueError(f"the environment variable {' or '.join(names)} is not set")
        return default
    try:
        return int(environ[name])
    except ValueError as error:
        raise ValueError(f"the environment variable {name}={environ[name]!r} is not a whole number") from error


def _parse_slurm_node_list(nodes: str) -> list[str]:
    """Expand SLURM's compact host list: `a1,b[2-3,7],c[08-10]` -> a1 b2 b3 b7 c08 c09 c10.

    Raises:
        ValueError: the text is empty or is no host list.
    """
    names = [name for group in _split_outside_brackets(nodes) for name in _expand_group(group)]
    if not names:
        raise ValueError(f"no host in the SLURM node list {nodes!r}")
    return names


def _split_outside_brackets(text: str) -> list[str]:
    return [part for part in re.split(r",(?![^\[]*\])", text.strip()) if part]


def _expand_group(group: str) -> Iterator[str]:
    match = re.fullmatch(r"([^\[\]]*)\[([0-9,\-]+)\](.*)", group)
    if match is None:
        if "[" in group or "]" in group:
            raise ValueError(f"cannot read {group!r} in a SLURM node list")
        yield group
        return
    prefix, ranges, rest = match.groups()
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for suffix in _expand_group(rest):
                yield f"{prefix}{number:0{len(first)}d}{suffix}"


def _parse_slurm_task_counts(text: str) -> list[int]:
    """Expand SLURM's tasks per node: `2(x3),1` -> [2, 2, 2, 1]."""
    counts = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"cannot read {text!r} as SLURM tasks per node")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
