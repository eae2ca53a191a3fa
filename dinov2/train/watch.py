"""What the host must know of each step (a loss that is not finite, a request to stop), told without stalling a GPU."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2.distributed import gather_objects, get_global_rank, mean_over_ranks

logger = logging.getLogger("dinov2")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class NonFiniteLossError(RuntimeError):
    """The loss was not finite twice in a row; the message names the iteration, the ranks and the terms."""


class StopRequest:
    """Whether a signal has asked this process to stop; a second one interrupts at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def _handle(self, number: int, frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGUSR2 and Ctrl-C into a request that the training loop answers after its current step."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield request
        return
    before = {number: signal.signal(number, request._handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Step(NamedTuple):
    iteration: int
    names: list[str]
    own: Tensor
    host: Tensor
    arrived: torch.cuda.Event | None


class StepWatch:
    """Averages each step's numbers over the ranks and reads them when they have arrived.

    On a GPU that is one step later, so the host never waits; every rank reads the same numbers at the same step and
    so takes the same decision.

    Args:
        device: where the losses are.
        patience: steps in a row that may have a loss that is not finite; the optimizer skips them.
    """

    def __init__(self, device: torch.device, patience: int = 1):
        self.lag = 1 if device.type == "cuda" else 0
        self.patience = patience
        self.bad_in_a_row = 0
        self.stop_agreed = False
        self._steps: list[_Step] = []

    def observe(self, iteration: int, losses: dict[str, Tensor], *, stop: bool) -> dict[str, Tensor]:
        """Take in a step; return its losses as means over the ranks, on the device.

        Raises:
            NonFiniteLossError: more than `patience` steps in a row, up to the last one read, were not finite.
        """
        own = torch.stack([*(loss.float() for loss in losses.values())])
        flag = own.new_full((1,), float(stop))
        mean = mean_over_ranks(torch.cat([own, flag]))
        host, arrived = mean, None
        if mean.device.type == "cuda":
            host = torch.empty_like(mean, device="cpu", pin_memory=True).copy_(mean, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._steps.append(_Step(iteration, list(losses), own, host, arrived))
        if len(self._steps) > self.lag:
            self._read(self._steps.pop(0))
        return dict(zip(losses, mean[:-1], strict=True))

    def finish(self) -> None:
        """Read what has not been read yet."""
        while self._steps:
            self._read(self._steps.pop(0))

    def _read(self, step: _Step) -> None:
        if step.arrived is not None:
            step.arrived.synchronize()
        *losses, stop = step.host.tolist()
        self.stop_agreed |= stop > 0
        if all(map(torch.isfinite, torch.tensor(losses))):
            self.bad_in_a_row = 0
            return
        self.bad_in_a_row += 1
        where = self._blame(step)
        logger.warning("iteration %d: the loss is not finite and the step was skipped: %s", step.iteration, where)
        if self.bad_in_a_row > self.patience:
            raise NonFiniteLossError(
                f"the loss was not finite {self.bad_in_a_row} times in a row, last at iteration {step.iteration}: "
                f"{where}. "
                "The weights were not touched by these steps. Lower optim.base_lr, set dino.koleo_loss_weight=0 to see "
                "whether near-duplicate images are the cause, or compute in bf16 or fp32 (compute_precision.dtype); "
                "then run the same command again: it goes on from the last checkpoint"
            )

    @staticmethod
    def _blame(step: _Step) -> str:
        """Which term was what on which rank; every rank enters."""
        own = [
            f"{name}={value:g}"
            for name, value in zip(step.names, step.own.tolist(), strict=True)
            if not torch.isfinite(torch.tensor(value))
        ]
        told = gather_objects((get_global_rank(), own))
        return "; ".join(f"rank {rank}: {', '.join(terms)}" for rank, terms in told if terms)
