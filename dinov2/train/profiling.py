"""Where the time of a step goes: a trace of a few steps by PyTorch's profiler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from dinov2.distributed import is_main_process

logger = logging.getLogger("dinov2")

DEFAULT_STEPS = 5  # recorded with --profile
STEPS_BEFORE = 5  # steps of this start that are let pass: compiling, first allocations, warming of the profiler


@contextmanager
def profiled_steps(output_dir: str | Path, steps: int, device: torch.device) -> Iterator[Callable[[], None]]:
    """Record `steps` steps of the main process; yield what to call after each step.

    The trace (`*.pt.trace.json`) goes to `profile/` in `output_dir`: Chrome's trace format, which
    https://ui.perfetto.dev, `chrome://tracing` and TensorBoard's profiler plugin show. With 0 steps nothing happens.
    """
    if steps == 0 or not is_main_process():
        yield lambda: None
        return
    folder = Path(output_dir) / "profile"
    write = tensorboard_trace_handler(str(folder), worker_name="rank0")

    def write_and_tell(profiler: profile) -> None:
        write(profiler)
        recorded = min(steps, profiler.step_num - STEPS_BEFORE)
        table = profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=12)
        logger.info("wrote the trace of %d steps to %s; most of the time went to\n%s", recorded, folder, table)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    plan = schedule(wait=STEPS_BEFORE - 1, warmup=1, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write_and_tell, profile_memory=True) as profiler:
        yield profiler.step
    if profiler.step_num < STEPS_BEFORE + steps:
        logger.warning(
            "the run ended after %d steps: a whole trace needs %d before and %d to record (train.profile_steps)",
            profiler.step_num,
            STEPS_BEFORE,
            steps,
        )
