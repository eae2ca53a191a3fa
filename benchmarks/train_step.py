"""One optimizer step: images per second, utilisation (MFU) and peak memory against the published trainer's style.

    taskset -c 0 python benchmarks/train_step.py --cases demo,small --write docs/benchmarks.md      # on a CPU
    python benchmarks/train_step.py --cases large --images 64 --write docs/benchmarks.md            # on a GPU

Every side takes whole steps (both networks, losses, clipping, AdamW, moving average) on the same batch of noise, one
step of each side in turn. The baseline is `benchmarks/plain_step.py`. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from plain_step import PlainStep
from sections import table, write_section

from dinov2.configs import dinov2_default_config, load_and_merge_config
from dinov2.data.collate import Batch
from dinov2.layers import ATTENTION_BACKENDS
from dinov2.train.estimate import noise_batch
from dinov2.train.flops import peak_flops, step_flops
from dinov2.train.train import (
    accumulate_gradients,
    apply_optim_scheduler,
    build_model,
    build_optimizer,
    clip_and_step,
)

NAME = "benchmarks/train_step.py"
BASELINE = "published style"
Step = Callable[[], object]


class Case(NamedTuple):
    """A model, its crops, and images per step on a CPU and on a GPU."""

    arch: str
    cpu_images: int
    gpu_images: int
    registers: int = 0
    ffn: str = "mlp"


CASES = {
    "demo": Case("vit_tiny", 32, 256),
    "tiny": Case("vit_tiny", 4, 256),
    "small": Case("vit_small", 4, 128),
    "base": Case("vit_base", 2, 96),
    "large": Case("vit_large", 2, 64, registers=4),
    "giant": Case("vit_giant2", 2, 16, registers=4, ffn="swiglufused"),
}


class Side(NamedTuple):
    """Our step in one setting; None is the baseline."""

    dtype: str
    compiled: bool = False
    attention: str = "auto"

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "compute_precision.dtype": self.dtype,
            "train.compile": self.compiled,
            "student.attention_backend": self.attention,
        }

    @property
    def name(self) -> str:
        return ", ".join(
            ["ours", self.dtype, "compiled" if self.compiled else "eager"]
            + ([] if self.attention == "auto" else [f"attention by {self.attention}"])
        )


def sides_for(device: torch.device) -> dict[str, Side | None]:
    """What is compared on this device, by name."""
    compiled = [False, True]
    dtypes = ["bf16"] if device.type == "cuda" else ["fp32", "bf16"]
    ours = [Side(dtype, each) for dtype in dtypes for each in compiled]
    ours += [Side("bf16", device.type == "cuda", backend) for backend in ATTENTION_BACKENDS if backend != "auto"]
    return {BASELINE: None, **{side.name: side for side in ours}}


def config(case_name: str, side: Side | None, args: argparse.Namespace) -> Any:
    """The recipe of the paper (2 x 224 + 8 x 98) for one case, or the demo's."""
    case = CASES[case_name]
    if case_name == "demo":
        cfg = load_and_merge_config("train/demo")
    else:
        heads = {"head_n_prototypes": args.prototypes}
        recipe = {
            "student": {"arch": case.arch, "patch_size": 14, "ffn_layer": case.ffn},
            "crops": {"local_crops_size": 98},
            "train": {"centering": "sinkhorn_knopp"},
            "dino": heads,
            "ibot": {**heads, "separate_head": True},
        }
        cfg = OmegaConf.merge(dinov2_default_config, recipe, {"student": {"num_register_tokens": case.registers}})
    settings = {"train.device": args.device, **(side.settings if side else {"compute_precision.dtype": "fp32"})}
    for key, value in settings.items():
        OmegaConf.update(cfg, key, value)
    return OmegaConf.merge(cfg, OmegaConf.from_dotlist(args.set))


def build_step(cfg: Any, side: Side | None, images: int) -> tuple[Step, float]:
    """A step of one side that can be called again and again, and its floating-point operations."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    flops = step_flops(model, cfg, images)
    batch = noise_batch(cfg, images, model.device)
    if side is None:
        step = PlainStep(cfg, model)
        half = cast_crops(batch, torch.float16 if step.half else torch.float32)
        return lambda: step(half), flops
    batch = cast_crops(batch, model.input_dtype)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    apply_optim_scheduler(optimizer, lr=1e-6, wd=0.04, last_layer_lr=1e-6)

    def ours() -> None:
        optimizer.zero_grad(set_to_none=True)
        accumulate_gradients(model, [batch], teacher_temp=0.05)
        clip_and_step(optimizer, model, cfg.optim.clip_grad)
        model.update_teacher(0.999)

    return ours, flops


def cast_crops(batch: Batch, dtype: torch.dtype) -> Batch:
    return {key: value.to(dtype) if key.endswith("_crops") else value for key, value in batch.items()}


# ----------------------------------------------------------------------------------------------------- measuring


def check_same_losses(args: argparse.Namespace) -> float:
    """Largest relative difference of a loss term between both sides, on the same weights and batch, without dropping.

    KoLeo is only near: the baseline finds neighbours by inner products, which tie where features are near duplicates.

    Raises:
        RuntimeError: they do not compute the same.
    """
    cfg = config("demo", None, args)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    batch = noise_batch(cfg, 4, model.device)
    with torch.no_grad():
        plain = PlainStep(cfg, model).losses(batch)
        terms = model.loss_terms(model.teacher_targets(batch, 0.05), model.student_outputs(batch), batch)
    ours = [model.loss_weights[name] * term for name, term in terms.items()]
    off = {name: float(abs(b - a) / abs(a)) for (name, a), b in zip(plain.items(), ours, strict=True)}
    if off.pop("koleo") > 0.05 or max(off.values()) > 1e-4:
        raise RuntimeError(f"the two sides compute different losses: {plain} and {ours}")
    return max(off.values())


def seconds_of(step: Step, device: torch.device) -> float:
    """Of one step: on a CPU the time that this process computed, which other programs do not lengthen."""
    if device.type == "cpu":
        started = time.process_time()
        step()
        return (time.process_time() - started) / torch.get_num_threads()
    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def interleave(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of `rounds` steps of each side, in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds_of(step, device))
    return times


def peak_of_device(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second: from the data sheet of a GPU, measured on a CPU by the best of some matrix products."""
    known = peak_flops(device, dtype)
    if known:
        return known
    size, count = (8192, 20) if device.type == "cuda" else (2048, 6)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: a @ b, device) for _ in range(count))


def peak_memory(case_name: str, side_name: str, args: argparse.Namespace, images: int) -> int:
    """Bytes at the peak of two steps of a side, in a process of its own (on a CPU: above what the imports took)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (case_name, side_name, args, images))


def _peak_memory(case_name: str, side_name: str, args: argparse.Namespace, images: int) -> int:
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    before = high_water()
    side = sides_for(device)[side_name]
    step, _ = build_step(config(case_name, side, args), side, images)
    step()
    step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return high_water() - before


def high_water() -> int:
    """Most resident bytes of this process so far (`ru_maxrss` would count the parent's, from before the exec)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def measure(case_name: str, args: argparse.Namespace) -> tuple[list[list[str]], list[str]]:
    """The table's rows of one case, and the sides that do not run, with the reason."""
    device = torch.device(args.device)
    case = CASES[case_name]
    images = args.images or (case.gpu_images if device.type == "cuda" else case.cpu_images)
    torch.compiler.reset()  # what was compiled for another case counts towards PyTorch's limit of variants
    steps, flops, refused = {}, 0.0, []
    wanted = {name: side for name, side in sides_for(device).items() if not args.sides or name in args.sides}
    for name, side in wanted.items():
        try:
            step, flops = build_step(config(case_name, side, args), side, images)
            for _ in range(args.warmup):
                step()
        except (ValueError, RuntimeError) as error:  # a kernel that this device or installation does not have
            refused.append(f"{name}: {str(error).splitlines()[0]}")
        else:
            steps[name] = step
    times = interleave(steps, args.rounds, device)
    steps.clear()
    base = times.get(BASELINE)
    rows = []
    for name, seconds in times.items():
        side = wanted[name]
        low = "fp16" if device.type == "cuda" else "fp32"
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[side.dtype if side else low]
        least, middle = min(seconds), statistics.median(seconds)
        memory = peak_memory(case_name, name, args, images) if args.memory else 0
        rows.append(
            [
                f"{case_name}: {case.arch}/14" + (f" reg{case.registers}" if case.registers else "") + f", {images}",
                name,
                f"{least:.3f} / {middle:.3f}",
                f"{images / middle:.2f}",
                f"{min(base) / least:.2f} / {statistics.median(base) / middle:.2f}" if base else "",
                f"{flops / least / peak_of_device(device, dtype):.0%}",
                f"{memory / 2**30:.2f}" if memory else "",
            ]
        )
        print("| " + " | ".join(rows[-1]) + " |", flush=True)
    return rows, refused


# -------------------------------------------------------------------------------------------------------- report


def report(rows: list[list[str]], refused: list[str], difference: float, args: argparse.Namespace) -> str:
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"{args.threads} thread(s) of {cpu_name()}"
    peaks = ", ".join(
        f"{peak_of_device(device, dtype) / 1e9:,.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}"
        for dtype in ((torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16))
    )
    clock = "wall time with the device synchronised" if on_gpu else "this process's CPU time (the cores are shared)"
    head = ["case, images", "side", "s per step, min / median", "images/s", "faster, min / median", "MFU", "peak, GiB"]
    missing = "\n".join(f"- {line}" for line in dict.fromkeys(refused))
    return f"""## A training step: {args.cases} on {args.device}

`{args.command}`, {time.strftime("%Y-%m-%d")},
Python {platform.python_version()}, PyTorch {torch.__version__}, {where}, load {os.getloadavg()[0]:.1f} at the end.

Whole steps on noise, {args.rounds} of each side in turn after {args.warmup} to warm up; the clock is {clock}.
Crops of 2 x 224 + 8 x 98 pixels and two heads of {args.prototypes:,} prototypes; `demo` has the crops and heads of
`train/demo.yaml`. The baseline is `benchmarks/plain_step.py`: {"fp16 with loss scaling" if on_gpu else "fp32"}, eager,
one pass per crop size, default AdamW. On the same weights its losses and ours agree to {difference:.0e} (relative).
MFU counts the operations of `dinov2/train/flops.py`, for both sides the same, over the peak
({peaks}{"" if on_gpu else ", measured: the best matrix product of 2048 x 2048"}).

{table(head, rows)}

{"These do not run here:" if missing else ""}

{missing}
"""


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="demo,small", help=f"comma-separated, of {', '.join(CASES)}")
    parser.add_argument("--sides", nargs="*", help="names of sides as in the table; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=0, help="per step; 0: what each case has for the device")
    parser.add_argument("--prototypes", type=int, help="of each head; by default 131072 on a GPU, 8192 on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="settings of the configuration")
    parser.add_argument("--write", type=Path, help="Markdown file that keeps the table")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    args.prototypes = args.prototypes or (131072 if args.device == "cuda" else 8192)
    words = [f"--cases {args.cases}", f"--rounds {args.rounds}", f"--warmup {args.warmup}"]
    words += [f"--images {args.images}"] if args.images else []
    words += ["--sides " + " ".join(f'"{side}"' for side in args.sides)] if args.sides else []
    words += [f"--set {' '.join(args.set)}"] if args.set else []
    args.command = " ".join(["python benchmarks/train_step.py", *words])
    torch.set_num_threads(args.threads)
    difference = check_same_losses(args)
    measured = [measure(case, args) for case in args.cases.split(",")]
    rows = [row for case_rows, _ in measured for row in case_rows]
    section = report(rows, [line for _, refused in measured for line in refused], difference, args)
    print(section)
    if args.write:
        write_section(args.write, f"{NAME} {args.cases} on {args.device}", section)


if __name__ == "__main__":
    main()
