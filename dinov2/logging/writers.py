"""Where numbers go: JSON lines, TensorBoard. Another destination is one more class with `write` and `close`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class MetricWriter(Protocol):
    """A destination for the numbers of one iteration. Only the main process has any."""

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Take the numbers of one iteration."""

    def close(self) -> None:
        """Write what is still held back."""


class JsonLinesWriter:
    """Appends one JSON object per call to a text file, so that a resumed run continues the file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Append one line. NaN and infinity are written as Python's json does, so that no value is lost."""
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, **scalars}) + "\n")

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
