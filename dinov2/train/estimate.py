"""How large a batch fits on this device, and how long a schedule will take: measured on real steps.

dinov2 estimate --config-file CONFIG [key=value ...]
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch

from dinov2.configs import check
from dinov2.data import MaskingGenerator
from dinov2.data.collate import Batch, draw_masks
from dinov2.logging.helpers import peak_memory
from dinov2.train.flops import peak_flops, step_flops
from dinov2.train.schedules import total_iterations
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.train import (
    accumulate_gradients,
    apply_optim_scheduler,
    build_model,
    build_optimizer,
    clip_and_step,
)
from dinov2.utils.config import apply_scaling_rules_to_cfg, get_cfg_from_args, get_effective_batch_size

logger = logging.getLogger("dinov2")


class StepCost(NamedTuple):
    """What one optimizer step costs on this device."""

    images: int
    seconds: float
    peak_bytes: int
    flops: float

    @property
    def images_per_second(self) -> float:
        """Throughput of the step alone, without the data path."""
        return self.images / self.seconds


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Options of `dinov2 estimate`."""
    parser = argparse.ArgumentParser("dinov2 estimate", description=__doc__.splitlines()[0], add_help=add_help)
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML file; what it leaves out has defaults")
    parser.add_argument("--steps", type=int, default=5, help="steps to time, after two to warm up")
    parser.add_argument("--images", type=int, default=0, help="training images there are, to tell passes over them")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="settings that override the file's")
    parser.set_defaults(output_dir="")
    return parser


def noise_batch(cfg: Any, images: int, device: torch.device, seed: int = 0) -> Batch:
    """A batch of `images` images of noise on `device`, with the shapes and masks of real ones."""
    generator = torch.Generator().manual_seed(seed)
    crops, side = cfg.crops, cfg.crops.global_crops_size // cfg.student.patch_size
    shape = (cfg.student.in_chans, crops.global_crops_size, crops.global_crops_size)
    local_shape = (cfg.student.in_chans, crops.local_crops_size, crops.local_crops_size)
    masks = draw_masks(
        2 * images,
        side**2,
        tuple(cfg.ibot.mask_ratio_min_max),
        cfg.ibot.mask_sample_probability,
        MaskingGenerator(input_size=(side, side), max_num_patches=0.5 * side**2),
        random.Random(seed),
    )
    batch = {
        "collated_global_crops": torch.randn(2 * images, *shape, generator=generator),
        "collated_local_crops": torch.randn(crops.local_crops_number * images, *local_shape, generator=generator),
        **masks,
    }
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def measure_step(cfg: Any, model: SSLMetaArch, images: int, steps: int = 5, warmup: int = 2) -> StepCost:
    """Time whole optimizer steps (both networks, losses, clipping, update, moving average) on batches of noise."""
    device = model.device
    model.train()
    model.update_gram_teacher(cfg.gram.start_iteration)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    apply_optim_scheduler(optimizer, 1e-6, 0.04, 1e-6)
    batches = [noise_batch(cfg, images, device)] * cfg.train.gradient_accumulation_steps
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        accumulate_gradients(model, batches, teacher_temp=0.05)
        clip_and_step(optimizer, model, cfg.optim.clip_grad)
        model.update_teacher(0.999)

    for _ in range(warmup):
        step()
    _wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _wait(device)
    seconds = (time.perf_counter() - start) / steps
    images *= len(batches)
    return StepCost(images, seconds, peak_memory(device), step_flops(model, cfg, images))


def largest_batch(fits: Callable[[int], bool], start: int) -> int:
    """The largest number that `fits`, a monotone predicate; found by doubling from `start`, then by halving the gap.

    0 when not even 1 fits.
    """
    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):  # to about 6 %
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits_on_gpu(cfg: Any) -> Callable[[int], bool]:
    def fits(images: int) -> bool:
        try:
            measure_step(cfg, build_model(cfg), images, steps=1, warmup=1)
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    return fits


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(cfg: Any, model: SSLMetaArch, cost: StepCost, images: int) -> str:
    """What `dinov2 estimate` prints."""
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in model.student.items()}
    dtype = model.precision["student"]["backbone"].compute
    iterations, batch = total_iterations(cfg), get_effective_batch_size(cfg)
    peak = peak_flops(model.device, dtype, cfg.train.peak_tflops)
    share = f", {cost.flops / cost.seconds / peak:.0%} of the device's peak (MFU)" if peak else ""
    lines = [
        f"model      {cfg.student.arch}/{cfg.student.patch_size}: "
        + ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in parameters.items())
        + " parameters",
        f"device     {model.device}, arithmetic in {str(dtype).removeprefix('torch.')}",
        f"step       {cost.seconds:.3f} s for {cost.images} images, {cost.images_per_second:.1f} images/s",
        f"           {cost.flops / 1e12:.3g} TFLOP, {cost.flops / cost.seconds / 1e12:.3g} TFLOP/s{share}",
        f"memory     {cost.peak_bytes / 2**30:.2f} GiB at the peak"
        + ("" if model.device.type == "cuda" else " of this process"),
        f"schedule   {iterations} iterations of {batch} images: "
        f"{timedelta(seconds=round(cost.seconds * iterations))} of steps alone, without evaluations",
    ]
    if images:
        lines.append(f"           {iterations * batch / images:.1f} passes over {images} images")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Time steps of a configuration on this device and print what a run will cost."""
    args = get_args_parser().parse_args(argv)
    cfg = get_cfg_from_args(args)
    check(cfg, for_training=False)
    apply_scaling_rules_to_cfg(cfg)
    model = build_model(cfg)
    print(report(cfg, model, measure_step(cfg, model, cfg.train.batch_size_per_gpu, args.steps), args.images))
    if model.device.type == "cuda":
        del model
        print(f"batch      {largest_batch(_fits_on_gpu(cfg), cfg.train.batch_size_per_gpu)} images fit on this device")


if __name__ == "__main__":
    main()
