"""Running averages of a training loop, and the line, the file and the curves they become.

A step never waits for the device: numbers are kept as tensors and read when a line is due.
"""

import datetime
import logging
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.logging.writers import JsonLinesWriter, MetricWriter, NeverInTheWay, TensorBoardWriter

logger = logging.getLogger("dinov2")

T = TypeVar("T")

_MOST_PENDING = 1000  # tensors kept unread: far above any log period, so that an unread meter cannot grow for ever


class SmoothedValue:
    """A series of numbers: the newest, the median and mean of a window, the mean of all.

    Args:
        window_size: numbers in the window.
        fmt: how `str()` shows it, from the property names below.
    """

    def __init__(self, window_size: int = 20, fmt: str | None = None):
        self.fmt = fmt or "{median:.4g} ({global_avg:.4g})"
        self.window: deque[float] = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0
        self._pending: list[tuple[float | Tensor, int]] = []

    def update(self, value: float | Tensor, num: int = 1) -> None:
        """Add a number (a float, or a tensor with one element on any device) that stands for `num` samples."""
        if isinstance(value, Tensor):
            value = value.detach().clone()  # the caller may write over it before it is read
        self._pending.append((value, num))
        if len(self._pending) >= _MOST_PENDING:
            self._read()

    def _read(self) -> None:
        """Bring pending tensors to the CPU in one transfer and count them in."""
        pending, self._pending = self._pending, []
        tensors = [value.reshape(()).double() for value, _ in pending if isinstance(value, Tensor)]
        arrived = iter(torch.stack(tensors).tolist() if tensors else ())
        for value, num in pending:
            number = next(arrived) if isinstance(value, Tensor) else float(value)
            self.window.append(number)
            self.count += num
            self.total += number * num

    def synchronize_between_processes(self) -> None:
        """Let `global_avg` be that of all processes; the window stays this process's."""
        self._read()
        totals = torch.tensor([self.count, self.total], dtype=torch.float64)
        count, self.total = distributed.sum_over_ranks(totals).tolist()
        self.count = int(count)

    @property
    def median(self) -> float:
        """Median of the window (the lower one of two middle numbers)."""
        self._read()
        return torch.tensor(list(self.window), dtype=torch.float64).median().item() if self.window else float("nan")

    @property
    def avg(self) -> float:
        """Mean of the window."""
        self._read()
        return sum(self.window) / len(self.window) if self.window else float("nan")

    @property
    def global_avg(self) -> float:
        """Mean over all samples so far."""
        self._read()
        return self.total / self.count if self.count else float("nan")

    @property
    def max(self) -> float:
        """Largest number of the window."""
        self._read()
        return max(self.window, default=float("nan"))

    @property
    def value(self) -> float:
        """The newest number."""
        self._read()
        return self.window[-1] if self.window else float("nan")

    def __str__(self) -> str:
        return self.fmt.format(
            median=self.median, avg=self.avg, global_avg=self.global_avg, max=self.max, value=self.value
        )


class MetricLogger:
    """The numbers of a loop, written every few iterations: a line, a JSON line, TensorBoard points.

    Files and curves get every number, the line those that a person follows.

    Args:
        delimiter: between the parts of a line.
        output_file: JSON lines are appended here, by the main process.
        tensorboard_dir: event files go here, from the main process.
        images_per_iteration: over all processes; given, lines tell images per second, the share of time spent waiting
            for data, and memory.
        ideal_iteration_time: seconds that an iteration's arithmetic takes at the peak of the device; given, lines tell
            the share of that peak which was reached (model-FLOP utilisation, MFU).
        window_size: iterations that medians are taken over.
        writers: further destinations, used by the main process.
    """

    def __init__(
        self,
        delimiter: str = "  ",
        output_file: str | Path | None = None,
        tensorboard_dir: str | Path | None = None,
        images_per_iteration: int | None = None,
        window_size: int = 20,
        writers: Sequence[MetricWriter] = (),
        ideal_iteration_time: float | None = None,
    ):
        self.meters: dict[str, SmoothedValue] = {}
        self._latest: set[str] = set()
        self.delimiter = delimiter
        self.images_per_iteration = images_per_iteration
        self.ideal_iteration_time = ideal_iteration_time
        self.window_size = window_size
        self.output_file = output_file
        self._tensorboard_dir = tensorboard_dir
        self._writers: list[MetricWriter] = list(writers) if distributed.is_main_process() else []
        if output_file is not None and distributed.is_main_process():
            self._writers.append(JsonLinesWriter(output_file))

    def update(self, **scalars: float | Tensor) -> None:
        """Add one number per name: floats, or tensors with one element, read only when a line is due."""
        for name, value in scalars.items():
            self.meters.setdefault(name, SmoothedValue(self.window_size)).update(value)

    def set_latest(self, **scalars: float | Tensor) -> None:
        """Replace what is measured only when a line is due; names that are not given again are dropped."""
        for name in self._latest - scalars.keys():
            del self.meters[name]
        self._latest = set(scalars)
        for name, value in scalars.items():
            self.meters.setdefault(name, SmoothedValue(window_size=1)).update(value)

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Use a meter with another window or format for one name."""
        self.meters[name] = meter

    def __getattr__(self, name: str) -> SmoothedValue:
        meters = self.__dict__.get("meters", {})
        if name in meters:
            return meters[name]
        raise AttributeError(f"{type(self).__name__} has no attribute or metric {name!r}")

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def synchronize_between_processes(self) -> None:
        """Let every `global_avg` be that of all processes. All must have the same metrics."""
        for name in sorted(self.meters):
            self.meters[name].synchronize_between_processes()

    def log_scalars(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Send numbers that come from outside the loop, such as scores, to every writer but the JSON file."""
        self._open_tensorboard(0)  # which drops nothing: scores of an old checkpoint may come late
        for writer in self._writers:
            if not isinstance(writer, JsonLinesWriter):
                writer.write(iteration, scalars)

    def close(self) -> None:
        """Close every writer."""
        for writer in self._writers:
            writer.close()

    def log_every(
        self,
        iterable: Iterable[T],
        print_freq: int,
        header: str | None = None,
        n_iterations: int | None = None,
        start_iteration: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[T]:
        """Yield items for iterations `start_iteration` to `n_iterations` - 1, and report along the way.

        A report is written after every iteration that `print_freq` divides and after the last one. Nothing is
        yielded where no iteration is left.

        Args:
            iterable: its first item belongs to `start_iteration`.
            print_freq: iterations between reports.
            header: what the line starts with.
            n_iterations: iterations of the whole run; by default as long as the iterable.
            start_iteration: the number of the first iteration.
            should_stop: asked after each iteration; the one after which it says yes is reported, and is the last.

        Raises:
            ValueError: no `n_iterations`, and the iterable does not know its length.
        """
        if n_iterations is None:
            if not hasattr(iterable, "__len__"):
                raise ValueError("log_every needs n_iterations where the iterable has no length")
            n_iterations = start_iteration + len(iterable)
        self._open_tensorboard(start_iteration)
        clock = _Clock(self.window_size)
        items = iter(iterable)
        for iteration in range(start_iteration, n_iterations):
            clock.start()
            try:
                item = next(items)
            except StopIteration:
                logger.warning("the data ended after iteration %d of %d", iteration, n_iterations)
                break
            clock.data_arrived()
            yield item
            clock.stop()
            last = iteration == n_iterations - 1 or should_stop()
            if last or iteration % print_freq == 0:
                self._report(header or "", iteration, n_iterations, clock)
            if last:
                break
        clock.log_total(header or "")

    def _open_tensorboard(self, start_iteration: int) -> None:
        if self._tensorboard_dir is not None and distributed.is_main_process():
            curves = TensorBoardWriter(self._tensorboard_dir, start_iteration)
            self._writers.append(NeverInTheWay("TensorBoard", curves))
            self._tensorboard_dir = None

    def _report(self, header: str, iteration: int, n_iterations: int, clock: "_Clock") -> None:
        medians = {name: meter.median for name, meter in self.meters.items()}
        times = {"iter_time": clock.iteration_time.avg, "data_time": clock.data_time.avg}
        parts = [_progress(header, iteration, n_iterations), f"eta {clock.eta(n_iterations - 1 - iteration)}"]
        parts += [f"{name.removesuffix('_loss')} {medians[name]:.4g}" for name in _worth_a_look(medians)]
        if self.images_per_iteration is not None:
            times["images_per_s"] = self.images_per_iteration / max(times["iter_time"], 1e-9)
            times["data_wait"] = times["data_time"] / max(times["iter_time"], 1e-9)
            times["memory_gib"] = peak_memory() / 2**30
            parts += [f"{times['images_per_s']:.1f} img/s", f"data {times['data_wait']:.0%}"]
            parts.append(f"mem {times['memory_gib']:.1f} GiB")
        else:
            parts.append(f"{times['iter_time']:.3g} s/it")
        if self.ideal_iteration_time is not None:
            times["mfu"] = self.ideal_iteration_time / max(times["iter_time"], 1e-9)
            parts.append(f"MFU {times['mfu']:.1%}")
        logger.info("%s", self.delimiter.join(parts))
        for writer in self._writers:
            writer.write(iteration, {**times, **medians})


def peak_memory(device: torch.device | None = None) -> int:
    """Return the most bytes in use so far: tensors on the GPU, or this process's resident set where it uses none.

    Args:
        device: a GPU, or the CPU; by default the current GPU if this process has used one.
    """
    if torch.cuda.is_initialized() if device is None else device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _Clock:
    """Seconds per iteration, and the seconds of each that were spent waiting for data."""

    def __init__(self, window_size: int):
        self.iteration_time = SmoothedValue(window_size)
        self.data_time = SmoothedValue(window_size)
        self._begun = time.perf_counter()
        self._started = self._begun

    def start(self) -> None:
        self._started = time.perf_counter()

    def data_arrived(self) -> None:
        self.data_time.update(time.perf_counter() - self._started)

    def stop(self) -> None:
        self.iteration_time.update(time.perf_counter() - self._started)

    def eta(self, iterations_left: int) -> str:
        return _duration(self.iteration_time.global_avg * iterations_left)

    def log_total(self, header: str) -> None:
        total, count = time.perf_counter() - self._begun, self.iteration_time.count
        logger.info(
            "%s %d iterations in %s (%.3g s/it)",
            header,
            self.iteration_time.count,
            _duration(total),
            total / max(count, 1),
        )


def _worth_a_look(names: Iterable[str]) -> list[str]:
    """Return what a person follows on the console: losses, learning rate, agreement; without a loss, everything."""
    names = list(names)
    chosen = [name for name in names if name.endswith("loss") or name in ("lr", "teacher_agreement")]
    return chosen if any(name.endswith("loss") for name in names) else names


def _progress(header: str, iteration: int, n_iterations: int) -> str:
    return f"{header} [{iteration:{len(str(n_iterations))}d}/{n_iterations}]".strip()


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
