"""Run a Python snippet in several real processes that meet through gloo, as torchrun or SLURM would start them."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PREAMBLE = """
import json, sys, torch
torch.set_num_threads(1)
from dinov2 import distributed
distributed.enable(device="cpu")
rank, world = distributed.get_global_rank(), distributed.get_global_size()
answers = {}
"""
EPILOGUE = """
distributed.disable()
json.dump(answers, open(sys.argv[1], "w"))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun_variables(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
    }


def slurm_variables(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(world),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": str(world),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "MASTER_PORT": str(port),
    }


def run_ranks(body: str, folder: Path, *, world: int = 2, variables: Callable = torchrun_variables) -> list[dict]:
    """Run `body` on every rank and return what each put into `answers`, in rank order."""
    port = free_port()
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    }
    outputs = [folder / f"rank{rank}.json" for rank in range(world)]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + body + EPILOGUE, str(outputs[rank])],
            env=inherited | variables(rank, world, port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [child.communicate(timeout=90)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    for rank, (child, error) in enumerate(zip(children, errors)):
        assert child.returncode == 0, f"rank {rank}: {error[-3000:]}"
    return [json.loads(path.read_text()) for path in outputs]
