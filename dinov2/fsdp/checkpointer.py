"""Checkpoints that cannot be half there: written aside, verified, renamed; readable by any number of processes.

A checkpoint is a folder `model_0001249/` with the shards of `torch.distributed.checkpoint` and, written last, a
`checkpoint.json` that lists every file with its size and CRC-32, the iterations done, and what the trainer added.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dinov2.distributed import any_rank, barrier, broadcast_object, get_global_rank, get_global_size, is_main_process

logger = logging.getLogger("dinov2")

INDEX = "checkpoint.json"
LATEST = "last_checkpoint"


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message says which and why."""


def first_free(path: Path) -> Path:
    """`path` with .1, .2, ... behind its name: the first that does not exist."""
    return next(free for number in count(1) if not (free := path.with_name(f"{path.name}.{number}")).exists())


class FSDPCheckpointer:
    """Save and restore model, optimizer, scaler and random states.

    Args:
        model: its whole `state_dict` is saved, sharded or not.
        save_dir: folder of the checkpoints; made if missing.
        optimizer: saved by parameter name, so that it can be restored under another sharding.
        scaler: anything with `state_dict() -> dict[str, Tensor]` and `load_state_dict`.
        save_to_disk: `False` makes `save` do nothing.
        keep_last: how many of the newest checkpoints stay.
        keep_every: checkpoints whose iterations are a multiple of this stay for ever; 0 for none.
        asynchronous: copy to host memory and go on training while the files are written.

    Raises:
        CheckpointError: `save_dir` cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str | os.PathLike = "",
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: Any = None,
        save_to_disk: bool = True,
        keep_last: int = 2,
        keep_every: int = 0,
        asynchronous: bool = False,
    ):
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.save_dir = Path(save_dir)
        self.save_to_disk = save_to_disk
        self.keep_last, self.keep_every = keep_last, keep_every
        self.asynchronous = asynchronous
        # A group of its own: the files are written, and agreed on, while training uses the default one.
        self._group = dist.new_group(backend="gloo") if asynchronous and get_global_size() > 1 else None
        self._pending: Future | None = None
        self.last_save_failed = False
        self._finisher = ThreadPoolExecutor(max_workers=1)
        if save_to_disk and is_main_process():
            self._prepare_folder()

    def save(self, name: str, **extra: Any) -> None:
        """Write the checkpoint `name`; every rank calls it. `extra` (JSON values, `iteration` among them) is kept too.

        A failure (disk full, say) is logged as an error and leaves the checkpoints before it untouched.
        """
        if not self.save_to_disk:
            return
        self.wait()
        self.last_save_failed = False
        partial = self.save_dir / f".{name}.partial"
        state = self._state()
        if self.asynchronous:
            written = dcp.async_save(
                state, checkpoint_id=partial, process_group=self._group, no_dist=get_global_size() == 1
            )
            self._pending = self._finisher.submit(self._finish_when, written, partial, name, extra)
            return
        failure = self._try(
            lambda: (
                dcp.save(state, checkpoint_id=partial, no_dist=get_global_size() == 1),
                self._finish(partial, name, extra),
            )
        )
        if any_rank(failure is not None):
            self._give_up(partial, name, failure)

    def wait(self) -> None:
        """Return when the checkpoint being written is complete or given up."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None
            barrier()

    def close(self) -> None:
        """Let what is being written be finished, without asking the other ranks; for the end, however it comes."""
        if self._pending is not None:
            self._pending.result()

    def resume_or_load(self, path: str = "", *, resume: bool = True) -> dict[str, Any]:
        """Restore the newest good checkpoint (`resume`) or the one at `path`; return its extras, {} if there is none.

        A newest checkpoint that is damaged is named in a warning, and the one before it is used.
        """
        found = self.get_checkpoint_file() if resume else path
        return self.load(found) if found else {}

    def load(self, path: str | os.PathLike) -> dict[str, Any]:
        """Restore the checkpoint in the folder `path`, written by any number of processes; return its extras.

        Raises:
            CheckpointError: it is incomplete or damaged, or does not fit the model.
        """
        path = Path(path)
        problem = broadcast_object(find_damage(path) if is_main_process() else None)
        if problem:
            raise CheckpointError(f"checkpoint {path}: {problem}")
        extra = json.loads((path / INDEX).read_text())["extra"]
        saved = set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)
        if extra["world_size"] != get_global_size():
            logger.info("the checkpoint is of %d processes: random states start anew", extra["world_size"])
            saved = {key for key in saved if not key.startswith("random.")}
        state = self._state(saved)
        if missing := sorted(key for key in _flat_keys(state) if key not in saved):
            raise CheckpointError(f"checkpoint {path} has no {missing[0]} ({len(missing)} missing): another model's?")
        try:
            dcp.load(state, checkpoint_id=path, no_dist=get_global_size() == 1)
        except (dcp.CheckpointException, ValueError) as error:
            raise CheckpointError(f"checkpoint {path} does not fit the model: {error}") from error
        self._restore(state)
        return extra

    def set_aside(self) -> None:
        """Move the checkpoints there are to a folder beside `save_dir`, so that a new run starts without them."""
        if is_main_process() and _checkpoints(self.save_dir):
            aside = self.save_dir.rename(first_free(self.save_dir))
            self.save_dir.mkdir()
            logger.info("the checkpoints of an earlier run are now in %s", aside)
        barrier()

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The newest undamaged checkpoint, '' if there is none; the same answer on every rank."""
        return broadcast_object(self._newest_good() if is_main_process() else None)

    def tag_last_checkpoint(self, name: str) -> None:
        """Note, for people and scripts, which checkpoint is the newest."""
        _write_atomically(self.save_dir / LATEST, name)

    # What is saved ------------------------------------------------------------------------------------------------

    def _state(self, saved: set[str] | None = None) -> dict[str, Any]:
        """Every tensor of the run by name; with `saved`, room for what that checkpoint holds."""
        state: dict[str, Any] = {"model": self.model.state_dict()}
        if self.optimizer is not None:
            state["optimizer"] = self._optimizer_state(saved)
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        random_key = f"rank{get_global_rank()}"
        if saved is None or f"random.{random_key}.torch" in saved:
            state["random"] = {random_key: _random_state(self._device())}
        return state

    def _optimizer_state(self, saved: set[str] | None) -> dict[str, dict[str, Tensor]]:
        state = {}
        for name, parameter in self.model.named_parameters():
            entries = self.optimizer.state.get(parameter)
            if not entries and saved and f"optimizer.{name}.step" in saved:
                entries = {
                    "step": torch.zeros((), device=self._device()),
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                }
            if entries:
                state[name] = dict(entries)
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.optimizer is not None:
            for name, parameter in self.model.named_parameters():
                if name in state["optimizer"]:
                    self.optimizer.state[parameter] = state["optimizer"][name]
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        for random_state in state.get("random", {}).values():
            _set_random_state(random_state, self._device())

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    # Files --------------------------------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        try:
            self.save_dir.mkdir(parents=True, exist_ok=True)
            for partial in self.save_dir.glob(".*.partial"):
                shutil.rmtree(partial)
            probe = self.save_dir / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise CheckpointError(f"cannot write checkpoints to {self.save_dir}: {error}") from error

    @staticmethod
    def _try(write: Callable[[], Any]) -> BaseException | None:
        """What went wrong, if anything: a run is worth more than one of its checkpoints."""
        try:
            write()
        except (Exception, dcp.CheckpointException) as error:  # PyTorch's own is no Exception
            return error
        return None

    def _finish_when(self, written: Future, partial: Path, name: str, extra: dict[str, Any]) -> None:
        if failure := self._try(lambda: (written.result(), self._finish(partial, name, extra))):
            self._give_up(partial, name, failure)

    def _finish(self, partial: Path, name: str, extra: dict[str, Any]) -> None:
        """List, sync and rename; only one rank does it, after all ranks' files are there."""
        if not is_main_process():
            return
        files = {f.name: _fingerprint(f) for f in sorted(partial.iterdir())}
        extra = {**extra, "world_size": get_global_size()}
        _write_synced(partial / INDEX, json.dumps({"files": files, "extra": extra}, indent=1))
        _sync(partial)
        final = self.save_dir / name
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync(self.save_dir)
        self.tag_last_checkpoint(name)
        logger.info("saved %s", final)
        if failure := self._try(lambda: self._remove_old(name)):
            logger.warning("old checkpoints in %s could not be cleared away: %s", self.save_dir, failure)

    def _give_up(self, partial: Path, name: str, error: BaseException | None) -> None:
        self.last_save_failed = True
        reason = error or "another process failed"
        logger.error("checkpoint %s was NOT saved, those before it are untouched: %s", self.save_dir / name, reason)
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)

    def _remove_old(self, newest: str) -> None:
        """Keep the last ones up to `newest`. Those past it are damaged, the run went back behind them: none counts."""
        good = [checkpoint for checkpoint in _checkpoints(self.save_dir) if checkpoint.name <= newest]
        for old in good[self.keep_last :]:
            iteration = json.loads((old / INDEX).read_text())["extra"].get("iteration")
            if not (self.keep_every and iteration and iteration % self.keep_every == 0):
                shutil.rmtree(old)

    def _newest_good(self) -> str:
        for checkpoint in _checkpoints(self.save_dir):
            problem = find_damage(checkpoint)
            if not problem:
                return str(checkpoint)
            logger.warning("checkpoint %s is passed over: %s", checkpoint, problem)
        return ""


def find_damage(path: Path) -> str:
    """Why the checkpoint in the folder `path` cannot be used, '' if it can."""
    if not path.is_dir():
        return "there is no such folder"
    try:
        files = json.loads((path / INDEX).read_text())["files"]
        for name, fingerprint in files.items():
            if _fingerprint(path / name) != fingerprint:
                return f"{name} is not what was written (size or checksum differs)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it is incomplete or damaged ({error})"
    return ""


def _checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first; their names sort by iteration."""
    return sorted((path.parent for path in folder.glob(f"model_*/{INDEX}")), reverse=True)


def _fingerprint(path: Path) -> dict[str, int]:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial-file")
    _write_synced(partial, text)
    partial.replace(path)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flat_keys(state: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in state.items():
        keys += _flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return keys


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """States of torch's generators and of the global ones of NumPy and Python, as tensors (nothing is pickled)."""
    _, keys, position, _, _ = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.append(keys, position).astype(np.int64)),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    *keys, position = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position))
    random.setstate((3, tuple(state["python"].tolist()), None))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Options of `dinov2 consolidate`."""
    parser = argparse.ArgumentParser(
        "dinov2 consolidate", description="Gather a sharded training checkpoint into one file.", add_help=add_help
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, such as RUN/checkpoints/model_0001249")
    parser.add_argument("--out", type=Path, required=True, help="the file to write (.pth)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write all tensors of a checkpoint (model, optimizer, random states) into one file for `torch.load`."""
    args = get_args_parser().parse_args(argv)
    if problem := find_damage(args.checkpoint):
        raise CheckpointError(f"checkpoint {args.checkpoint}: {problem}")
    if args.out.exists():
        raise CheckpointError(f"{args.out} exists; name another file with --out")
    dcp_to_torch_save(args.checkpoint, args.out)
    logger.info("wrote %s", args.out)


if __name__ == "__main__":
    main()
