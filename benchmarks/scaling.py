"""One process against two on a CPU (gloo), replicated and sharded: losses, speed, and what a step sends.

    python benchmarks/scaling.py --write docs/benchmarks.md

Every run is the demo's step on the same number of images per process. What a step sends is counted, by watching the
collectives that PyTorch dispatches, and computed from the sizes of the parameters; the formula also gives the larger
models. That two processes compute what one does with the double batch is tested in `tests/train/test_two_processes.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from sections import table, write_section
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov2 import distributed
from dinov2.configs import dinov2_default_config, load_and_merge_config
from dinov2.train.estimate import noise_batch
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.train import (
    accumulate_gradients,
    apply_optim_scheduler,
    build_model,
    build_optimizer,
    clip_and_step,
)

NAME = "benchmarks/scaling.py"
STRATEGIES = ("NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD")
MODELS = {"vit_small": ("mlp", 0), "vit_base": ("mlp", 0), "vit_large": ("mlp", 4), "vit_giant2": ("swiglufused", 4)}
# Bytes that a process sends in a ring of n, per byte of the whole tensor.
RING = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
}


# ------------------------------------------------------------------------------------------------ what a step sends


# PyTorch's operators of collectives: the kind, the position of the tensor(s) that hold the whole, and of the group.
COLLECTIVES = {
    "c10d::_allgather_base_": ("all-gather", 0, 2),
    "c10d::allgather_": ("all-gather", 0, 2),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1, 2),
    "c10d::allreduce_": ("all-reduce", 0, 1),
}


class SentBytes(TorchDispatchMode):
    """Count what the collectives called inside would send in a ring, by kind; `sent` is in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.name().removesuffix(".default")
        if name in COLLECTIVES:
            kind, whole, group = COLLECTIVES[name]
            size = dist.ProcessGroup.unbox(args[group]).size()
            self.sent[kind] += round(RING[kind](size) * sum(tensor.nbytes for tensor in tree_leaves(args[whole])))
        elif func.namespace in ("c10d", "_c10d_functional"):
            raise RuntimeError(f"{name} is a collective that this benchmark does not count yet")
        return func(*args, **(kwargs or {}))


def computed_bytes(model: SSLMetaArch, strategy: str, processes: int, *, compute: int, reduce: dict[str, int]) -> float:
    """Bytes that a process sends in one step for parameters and gradients.

    Args:
        model: whose parameters travel.
        strategy: as in `compute_precision`.
        processes: in one ring.
        compute: bytes of a parameter as it is gathered.
        reduce: bytes of a gradient as it is summed, by sub-module.
    """
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in model.student.items()}
    gradients = sum(count * reduce[name] for name, count in parameters.items())
    if strategy == "NO_SHARD":
        return RING["all-reduce"](processes) * gradients
    gathers = 2 if strategy == "SHARD_GRAD_OP" else 3  # student, teacher, and the student's blocks in the backward pass
    return RING["all-gather"](processes) * (gathers * compute * sum(parameters.values()) + gradients)


# ---------------------------------------------------------------------------------------------------- one process


def demo_config(strategy: str) -> Any:
    changes = {
        f"compute_precision.{role}.{part}.sharding_strategy": strategy
        for role in ("student", "teacher")
        for part in ("backbone", "dino_head", "ibot_head")
    }
    return OmegaConf.merge(
        load_and_merge_config("train/demo"), OmegaConf.from_dotlist([f"{k}={v}" for k, v in changes.items()])
    )


def worker(strategy: str, images: int, steps: int, out: Path) -> None:
    """Train some steps as one of the processes of torchrun, or alone; the main one writes what happened."""
    torch.set_num_threads(1)
    distributed.enable(device="cpu")
    rank, processes = distributed.get_global_rank(), distributed.get_global_size()
    cfg = demo_config(strategy)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model.get_params_groups())
    apply_optim_scheduler(optimizer, lr=1e-3, wd=0.04, last_layer_lr=1e-3)
    losses, seconds, counter = [], [], SentBytes()

    def step(number: int) -> None:
        batch = noise_batch(cfg, images, model.device, seed=number * processes + rank)
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        terms = accumulate_gradients(model, [batch], teacher_temp=0.05)
        clip_and_step(optimizer, model, cfg.optim.clip_grad)
        model.update_teacher(0.97)
        seconds.append(time.perf_counter() - started)
        mine = sum(model.loss_weights[name] * term for name, term in terms.items() if name in model.loss_weights)
        losses.append(float(distributed.mean_over_ranks(mine)))

    for number in range(steps):
        step(number)
    with counter:
        step(steps)
    if rank == 0:
        one = computed_bytes(model, strategy, processes, compute=4, reduce=dict.fromkeys(model.student, 4))
        result = {"losses": losses, "seconds": seconds[1:-1], "sent": counter.sent, "computed": one * (processes > 1)}
        out.write_text(json.dumps(result))
    distributed.disable()


def launch(processes: int, strategy: str, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    script = [__file__, "--worker", strategy, "--images", str(args.images), "--steps", str(args.steps), "--out", out]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    subprocess.run([sys.executable, *launcher, *map(str, script)], check=True)
    return json.loads(out.read_text())


# --------------------------------------------------------------------------------------------------------- report


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def volume_rows(processes: int) -> list[list[str]]:
    """GB that a GPU sends per step in bf16, for the larger models with heads of 131,072 prototypes."""
    rows = []
    for arch, (ffn, registers) in MODELS.items():
        settings = {
            "student": {"arch": arch, "patch_size": 14, "ffn_layer": ffn, "num_register_tokens": registers},
            "dino": {"head_n_prototypes": 131072},
            "ibot": {"head_n_prototypes": 131072, "separate_head": True},
        }
        with torch.device("meta"):
            model = SSLMetaArch(OmegaConf.merge(dinov2_default_config, settings))
        reduce = {"backbone": 2, "dino_head": 4, "ibot_head": 4}  # as the default compute_precision has it
        sent = [computed_bytes(model, s, processes, compute=2, reduce=reduce) for s in STRATEGIES]
        parameters = sum(p.numel() for p in model.student.parameters())
        rows.append([f"{arch}/14", f"{parameters / 1e6:,.0f} M", *(f"{count / 1e9:.2f}" for count in sent)])
    return rows


def report(runs: dict[tuple[int, str], dict[str, Any]], args: argparse.Namespace) -> str:
    alone = statistics.median(runs[1, "NO_SHARD"]["seconds"])
    reference = runs[2, "NO_SHARD"]["losses"]
    rows = []
    for (processes, strategy), run in runs.items():
        middle = statistics.median(run["seconds"])
        off = max(abs(a - b) / abs(b) for a, b in zip(run["losses"], reference))
        counted = run["sent"]
        rows.append(
            [
                f"{processes}",
                strategy if processes > 1 else "-",
                f"{min(run['seconds']):.2f} / {middle:.2f}",
                f"{processes * alone / middle:.2f}",
                f"{off:.0e}" if processes > 1 else "",
                " + ".join(f"{megabytes(counted.get(kind, 0))} {kind}" for kind in RING if counted.get(kind)) or "0",
                megabytes(run["computed"]),
            ]
        )
    head = ["processes", "strategy", "s per step, min / median", "images/s, of one process"]
    head += [
        "losses differ from NO_SHARD",
        "counted, MB per process and step",
        "parameters and gradients, computed, MB",
    ]
    volumes = table(["model, 2 heads", "parameters", *STRATEGIES], volume_rows(8))
    return f"""## Scaling over processes

`python {NAME} --images {args.images} --steps {args.steps}`, {time.strftime("%Y-%m-%d")},
Python {platform.python_version()}, PyTorch {torch.__version__}, gloo, one thread a process, {os.cpu_count()} cores,
load {os.getloadavg()[0]:.1f} at the end.

The demo's model in float32 on {args.images} images per process (two processes do twice the work of one), wall time. Two
processes on {os.cpu_count()} cores that other programs use too scale badly, and the figure says little of idle cores.
Bytes are what a process sends when collectives run as rings; what is counted beyond the parameters is Sinkhorn-Knopp's
sums, gradient norms and flags. `tests/train/test_two_processes.py` holds that every strategy gives the losses and
weights of one process with the double batch, to float tolerance.

{table(head, rows)}

By the same formula, GB that one of 8 GPUs sends per step in bf16 (gradients of heads summed in float32, the default),
whatever the batch; 131,072 prototypes. Replication sums gradients; SHARD_GRAD_OP gathers student and teacher
once each and scatters the gradients; FULL_SHARD gathers the student's parameters again in the backward pass.

{volumes}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, help="per process and step")
    parser.add_argument("--steps", type=int, default=5, help="timed, the first of which warms up")
    parser.add_argument("--write", type=Path, help="Markdown file that keeps the tables")
    parser.add_argument("--worker", choices=STRATEGIES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.images, args.steps, args.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        wanted = [(1, "NO_SHARD"), *((2, strategy) for strategy in STRATEGIES)]
        runs = {key: launch(*key, args, Path(folder) / "run.json") for key in wanted}
    section = report(runs, args)
    print(section)
    if args.write:
        write_section(args.write, NAME, section)


if __name__ == "__main__":
    main()
