"""The log of a run: console of the main process, one file per process, and the numbers of the training loop."""

import logging
import sys
from pathlib import Path

from dinov2 import distributed
from dinov2.logging.helpers import MetricLogger, SmoothedValue
from dinov2.logging.trackers import build_trackers
from dinov2.logging.writers import JsonLinesWriter, MetricWriter, TensorBoardWriter

__all__ = [
    "JsonLinesWriter",
    "MetricLogger",
    "MetricWriter",
    "SmoothedValue",
    "TensorBoardWriter",
    "build_trackers",
    "setup_logging",
]


def setup_logging(
    output: str | Path | None = None,
    *,
    name: str | None = None,
    level: int = logging.DEBUG,
    capture_warnings: bool = True,
) -> None:
    """Send log lines to the console (main process only) and to a file (every process its own).

    Calling it again replaces the handlers of the earlier call.

    Args:
        output: a `.txt` or `.log` file, or a folder, in which `logs/log.txt` is written; None: no file. The file of
            rank r > 0 ends in `.rank{r}`.
        name: of the logger to set up; None: the root logger.
        level: lines below it are dropped.
        capture_warnings: log Python warnings too.
    """
    logging.captureWarnings(capture_warnings)
    target = logging.getLogger(name)
    target.setLevel(level)
    for handler in [handler for handler in target.handlers if getattr(handler, "_is_ours", False)]:
        target.removeHandler(handler)
        handler.close()

    if name is not None:
        target.propagate = False
    rank = distributed.get_global_rank()
    handlers: list[logging.Handler] = []
    if rank == 0:
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(logging.Formatter("%(levelprefix)s%(asctime)s  %(message)s", "%H:%M:%S"))
        handlers.append(console)
    if output is not None:
        file = logging.FileHandler(_log_file(Path(output), rank))
        pattern = "%(levelname).1s%(asctime)s %(process)d %(name)s %(filename)s:%(lineno)d] %(message)s"
        file.setFormatter(logging.Formatter(pattern, "%Y%m%d %H:%M:%S"))
        handlers.append(file)
    for handler in handlers:
        handler.addFilter(_name_what_is_not_ordinary)
        handler._is_ours = True
        target.addHandler(handler)


def _name_what_is_not_ordinary(record: logging.LogRecord) -> bool:
    """Give a record `levelprefix`: empty for ordinary lines, `WARNING ` and the like for others."""
    record.levelprefix = f"{record.levelname} " if record.levelno > logging.INFO else ""
    return True


def _log_file(output: Path, rank: int) -> Path:
    path = output if output.suffix in (".txt", ".log") else output / "logs" / "log.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path if rank == 0 else path.with_name(f"{path.name}.rank{rank}")
