"""Where numbers go: JSON lines, TensorBoard. Another destination is one more class with `write` and `close`."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger("dinov2")


class MetricWriter(Protocol):
    """A destination for the numbers of one iteration. Only the main process has any."""

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Take the numbers of one iteration."""

    def close(self) -> None:
        """Write what is still held back."""


def append_json_line(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append an object as a line of its own, even below one that a crash has cut off.

    A line that cannot be written, to a full disk for example, is told in the log: a run is worth more.
    """
    try:
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
            cut_off = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * cut_off + json.dumps(row).encode() + b"\n")
    except OSError as error:
        logger.error("%s lacks the numbers of iteration %s: %s", path, row.get("iteration"), error)


class JsonLinesWriter:
    """Appends one JSON object per call to a text file, so that a resumed run continues the file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Append one line. NaN and infinity are written as Python's json does, so that no value is lost."""
        append_json_line(self.path, {"iteration": iteration, **scalars})

    def close(self) -> None:
        """Nothing is held back."""


class TensorBoardWriter:
    """Writes each number as a TensorBoard scalar of its own name.

    Args:
        folder: of the event files.
        first_iteration: of this run; what an interrupted one wrote after it is dropped. Scores of the checkpoint that
            this run resumes from carry its number, and stay.
    """

    def __init__(self, folder: str | Path, first_iteration: int = 0):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only the main process needs it

        self._events: Any = SummaryWriter(str(folder), purge_step=first_iteration + 1 if first_iteration else None)

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Add one point to every curve."""
        for name, value in scalars.items():
            self._events.add_scalar(name, value, iteration)
        self._events.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._events.close()


class NeverInTheWay:
    """A destination whose failure costs its points, not the run: the first is told, then it is left alone.

    A server that does not answer, or a full disk, would otherwise hold up every step that is reported, end the run, or
    change the exit code of one that has saved everything.

    Args:
        name: of the destination.
        writer: to hand the numbers to.
    """

    def __init__(self, name: str, writer: MetricWriter):
        self._name, self._writer = name, writer
        self._failed = False

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Hand the numbers on."""
        self._try(lambda: self._writer.write(iteration, scalars), f"from iteration {iteration} on")

    def close(self) -> None:
        """Close the destination."""
        self._try(self._writer.close, "while it was closed")

    def _try(self, act: Callable[[], None], when: str) -> None:
        if self._failed:
            return
        try:
            act()
        except Exception as error:
            self._failed = True
            logger.warning("%s takes no more numbers, %s: %s", self._name, when, error)
