"""The fast path of pre-training: from image files to batches of crops in shared memory.

Workers draw their batches straight into a ring of slots that every process maps; only a slot's report goes through the
queue. What a batch holds depends on the seed, its number and the rank, never on the number of workers, their speed, or
where a run was interrupted. docs/data-path.md follows one batch.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dinov2.distributed import get_local_size

from . import kernels
from .augmentations import DataAugmentationDINO, UintCrops, as_pixels, make_renderer
from .collate import Batch, draw_masks, mask_upperbound
from .decode import UnreadableImage
from .loaders import resolve_num_workers
from .photometric import finish_crops
from .samplers import PermutedStream, WeightedStream

logger = logging.getLogger("dinov2")

_BATCHES_AHEAD = 2  # per worker
_TRIES = 100  # images in a row that may be unreadable before a worker gives up
_GRACE = 2  # times `hold` batches are given from a fault on, in which the processes of a run agree to save and stop
_FORGIVEN = 5  # unreadable files that never stop a run, however small the dataset
_SHARED_MEMORY = "/dev/shm"


class TooManyUnreadable(ValueError):
    """More of the images tried were unreadable than `max_unreadable_share` allows."""


class DataStats(NamedTuple):
    """What the loader has done since it was made, in this process's share of the data."""

    batches: int
    images: int  # given to the trainer
    unreadable: int  # reads that failed, each replaced by another image
    wait_seconds: float  # the trainer waited for data
    worker_seconds: float  # CPU time of the workers


class MultiCropLoader:
    """Endless batches of augmented, masked, cast crops.

    Batch `i` of rank `r` holds the images at positions `(i * batch_size + j) * world_size + r` of one endless shuffled
    stream (`PermutedStream`, or `WeightedStream` where the sources of the dataset have different weights).

    A batch lies in a slot of the ring, and is valid until `hold` more batches have been asked for. `to_device` copies
    it, and the loader waits for that copy before it gives the slot back to a worker.

    Where too many images are unreadable, `fault` says so, and a few batches later the iteration raises it: time for the
    processes of a run to agree, save and stop, for none of them may leave the others waiting.

    Args:
        dataset: `len()`, `read(index)` giving pixels `(H, W, C)` or raising `UnreadableImage`; and if it has several
            sources, `spans`.
        augmentation: draws and sizes of the crops.
        batch_size: images per batch.
        mask_generator: such as `MaskingGenerator`.
        mask_ratio_tuple: smallest and largest share of the patches of a masked crop to mask.
        mask_probability: share of the global crops that are masked.
        n_tokens: patches of a global crop.
        dtype: of the crops: float32, float16 or bfloat16.
        num_workers: worker processes at most, see `resolve_num_workers`; 0 works in this process.
        seed: of the order of the images, their crops and the masks.
        start_iteration: number of the first batch.
        rank: of this process.
        world_size: processes that share the stream.
        pin_memory: page-lock the slots, so that copies to a GPU run beside the training.
        augment_on: "cpu" for finished crops from the workers; "device" for uint8 crops that `to_device` finishes.
        max_unreadable_share: stop when more than this share of the images tried could not be read.
        hold: batches that stay valid at the same time.

    Raises:
        ValueError: an option that does not fit, or too little shared memory for the slots.
    """

    def __init__(
        self,
        dataset: Any,
        augmentation: DataAugmentationDINO,
        *,
        batch_size: int,
        mask_generator: Callable[..., np.ndarray],
        mask_ratio_tuple: tuple[float, float],
        mask_probability: float,
        n_tokens: int,
        dtype: torch.dtype,
        num_workers: int | Literal["auto"],
        seed: int,
        start_iteration: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        augment_on: Literal["cpu", "device"] = "cpu",
        max_unreadable_share: float = 0.01,
        hold: int = 1,
    ):
        if augment_on not in ("cpu", "device"):
            raise ValueError(f"augment_on={augment_on!r}: choose cpu or device")
        if augment_on == "device" and augmentation.channels != 3:
            raise ValueError(f"augment_on='device' is for RGB; images of {augmentation.channels} channels need cpu")
        if batch_size < 1 or hold < 1:
            raise ValueError(f"batch_size={batch_size} and hold={hold} must be at least 1")
        self.num_workers = resolve_num_workers(num_workers, get_local_size())
        self.start_iteration = start_iteration
        self.unreadable: dict[str, str] = {}  # path: reason
        self.fault: TooManyUnreadable | None = None
        self._batches_since_fault = 0
        self._max_unreadable_share = max_unreadable_share
        self._augmentation = augmentation
        self._dtype = dtype
        self._on_device = augment_on == "device"
        self._pin_memory = pin_memory
        self._batch_size = batch_size
        self._hold = hold
        self._copies: deque[torch.cuda.Event | None] = deque()  # one per batch that is still valid
        self._stats = DataStats(0, 0, 0, 0.0, 0.0)

        masks = (2 * batch_size, n_tokens, mask_ratio_tuple, mask_probability)
        layout = _SlotLayout(augmentation, batch_size, n_tokens, mask_upperbound(*masks), dtype, augment_on)
        self._ahead = _batches_ahead(self.num_workers, hold, layout.nbytes)
        slots = [torch.empty(layout.nbytes, dtype=torch.uint8) for _ in range(self.num_workers * self._ahead + hold)]
        if self.num_workers:
            for slot in slots:
                slot.share_memory_()
        self._maker = _BatchMaker(
            dataset=dataset,
            augmentation=augmentation,
            layout=layout,
            slots=slots,
            draw_masks=partial(draw_masks, *masks, mask_generator),
            stream=_make_stream(dataset, seed),
            seed=seed,
            rank=rank,
            world_size=world_size,
        )

    @property
    def data_stats(self) -> DataStats:
        """Counts and seconds so far."""
        return self._stats

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from `start_iteration` on."""
        _compile(self._augmentation)
        reports = iter(
            DataLoader(
                self._maker,
                batch_size=None,
                sampler=_CountFrom(self.start_iteration),
                num_workers=self.num_workers,
                prefetch_factor=self._ahead if self.num_workers else None,
                collate_fn=_unchanged,
                worker_init_fn=_leave_signals_to_the_run,
                generator=torch.Generator(),  # or it would draw from the random state that a resumed run has restored
            )
        )
        pinned = [_pin(slot) for slot in self._maker.slots] if self._pin_memory else []
        try:
            while True:
                self._release_oldest()
                started = time.perf_counter()
                report = next(reports)
                self._account(report, time.perf_counter() - started)
                self._raise_old_fault()
                self._copies.append(None)
                yield self._maker.layout.batch(self._maker.slot(report.iteration), report.masked)
        finally:
            self._copies.clear()
            for slot in filter(None, pinned):
                torch.cuda.cudart().cudaHostUnregister(slot)

    def to_device(self, batch: Batch, device: torch.device) -> Batch:
        """Copy the latest batch to a device and finish it there if that is where it is augmented.

        On the CPU, finished crops are not copied: the batch stays in its slot.
        """
        on_device: dict[str, Any] = {
            key: value.to(device, non_blocking=device.type == "cuda") if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key != "crop_parameters"
        }
        if device.type == "cuda" and self._copies:
            self._copies[-1] = torch.cuda.Event()
            self._copies[-1].record()
        if self._on_device:
            crops = batch["crop_parameters"].numpy().view(kernels.CROP)[:, 0]
            first_local = len(batch["collated_global_crops"])
            groups = (("collated_global_crops", crops[:first_local]), ("collated_local_crops", crops[first_local:]))
            for key, group in groups:
                on_device[key] = finish_crops(on_device[key], group, self._augmentation.levels, self._dtype)
        return on_device

    def _release_oldest(self) -> None:
        """Wait until the batch whose slot is about to be reused has left it."""
        if len(self._copies) == self._hold:
            copy = self._copies.popleft()
            if copy is not None:
                copy.synchronize()

    def _account(self, report: _Report, waited: float) -> None:
        before = self._stats
        self._stats = DataStats(
            batches=before.batches + 1,
            images=before.images + self._batch_size,
            unreadable=before.unreadable + len(report.unreadable),
            wait_seconds=before.wait_seconds + waited,
            worker_seconds=before.worker_seconds + report.seconds,
        )
        for path, reason in report.unreadable:
            if path not in self.unreadable:
                logger.warning("%s cannot be read (%s): another image takes its place", path, reason)
                self.unreadable[path] = reason
        if report.gave_up and self.fault is None:
            path, reason = report.unreadable[-1]
            self.fault = TooManyUnreadable(
                f"{_TRIES} images in a row could not be read; the last is {path} ({reason}). Is the disk still there?"
            )
        tried = self._stats.images + self._stats.unreadable
        allowed = self._max_unreadable_share * tried
        if tried < self._maker.n_images:  # within the first pass, a few more may be chance: three standard deviations
            allowed += 3 * allowed**0.5
        if self._stats.unreadable > allowed and len(self.unreadable) > _FORGIVEN and self.fault is None:
            examples = "\n".join(f"  {path}: {reason}" for path, reason in list(self.unreadable.items())[:5])
            self.fault = TooManyUnreadable(
                f"{self._stats.unreadable} of {tried} images tried could not be read "
                f"({self._stats.unreadable / tried:.1%}), more than "
                f"train.max_unreadable_share={self._max_unreadable_share:g} allows; {len(self.unreadable)} files:\n"
                f"{examples}\nFind them all with `dinov2 check`, leave them out with train.exclude, or raise the share"
            )

    def _raise_old_fault(self) -> None:
        if self.fault is not None:
            self._batches_since_fault += 1
            if self._batches_since_fault > _GRACE * self._hold:
                raise self.fault


class _Report(NamedTuple):
    """What a worker says of a batch that it has drawn."""

    iteration: int
    masked: int
    unreadable: list[tuple[str, str]]  # path and reason of each failed read
    gave_up: bool  # images were left black, for nothing could be read in their place
    seconds: float  # CPU time


class _SlotLayout:
    """Where the tensors of a batch lie in the bytes of a slot."""

    def __init__(
        self,
        augmentation: DataAugmentationDINO,
        batch_size: int,
        n_tokens: int,
        upperbound: int,
        dtype: torch.dtype,
        augment_on: str,
    ):
        self.batch_size, self.upperbound = batch_size, upperbound
        n_global, n_local = 2 * batch_size, augmentation.local_crops_number * batch_size
        large, small = augmentation.global_crops_size, augmentation.local_crops_size
        if augment_on == "cpu":
            self._fields = {
                "collated_global_crops": ((n_global, augmentation.channels, large, large), dtype),
                "collated_local_crops": ((n_local, augmentation.channels, small, small), dtype),
            }
        else:
            self._fields = {
                "collated_global_crops": ((n_global, large, large, 3), torch.uint8),
                "collated_local_crops": ((n_local, small, small, 3), torch.uint8),
                "crop_parameters": ((n_global + n_local, kernels.CROP.itemsize), torch.uint8),
            }
        self._fields |= {
            "collated_masks": ((n_global, n_tokens), torch.bool),
            "mask_indices_list": ((self.upperbound,), torch.int64),
            "masks_weight": ((self.upperbound,), torch.float32),
            "n_masked_patches": ((1,), torch.int64),
        }
        sizes = [np.prod(shape, dtype=int) * kind.itemsize for shape, kind in self._fields.values()]
        self._offsets = np.cumsum([0, *(-(-size // 64) * 64 for size in sizes)]).tolist()

    @property
    def nbytes(self) -> int:
        return self._offsets[-1]

    def tensors(self, slot: Tensor) -> dict[str, Tensor]:
        """The whole tensors of a slot; the lists of masked patches have room for `upperbound`."""
        views = {}
        for (name, (shape, dtype)), offset in zip(self._fields.items(), self._offsets):
            size = int(np.prod(shape)) * dtype.itemsize
            views[name] = slot[offset : offset + size].view(dtype).view(shape)
        return views

    def batch(self, slot: Tensor, masked: int) -> Batch:
        """The batch in a slot, with lists of the `masked` patches there are."""
        views: dict[str, Any] = self.tensors(slot)
        for name in ("mask_indices_list", "masks_weight"):
            views[name] = views[name][:masked]
        return {**views, "upperbound": self.upperbound}


class _BatchMaker(Dataset):
    """Draws batch `i` into slot `i % len(slots)`; what the DataLoader's workers run."""

    def __init__(
        self,
        *,
        dataset: Any,
        augmentation: DataAugmentationDINO,
        layout: _SlotLayout,
        slots: list[Tensor],
        draw_masks: Callable[..., dict],
        stream: PermutedStream | WeightedStream,
        seed: int,
        rank: int,
        world_size: int,
    ):
        self.layout, self.slots = layout, slots
        self._dataset, self._augmentation = dataset, augmentation
        self.n_images = len(dataset)
        self._draw_masks, self._stream = draw_masks, stream
        self._seed, self._rank, self._world_size = seed, rank, world_size

    def slot(self, iteration: int) -> Tensor:
        """The bytes where a batch is drawn."""
        return self.slots[iteration % len(self.slots)]

    def __getitem__(self, iteration: int) -> _Report:
        started = time.process_time()
        tensors = self.layout.tensors(self.slot(iteration))
        with _one_thread():
            unreadable, gave_up = self._fill_crops(iteration, tensors)
            masked = self._fill_masks(iteration, tensors)
        return _Report(iteration, masked, unreadable, gave_up, time.process_time() - started)

    def _fill_crops(self, iteration: int, tensors: dict[str, Tensor]) -> tuple[list[tuple[str, str]], bool]:
        unreadable: list[tuple[str, str]] = []
        gave_up = False
        draw = self._make_drawer(tensors)
        in_batch = np.arange(self.layout.batch_size)
        positions = (iteration * self.layout.batch_size + in_batch) * self._world_size + self._rank
        for image, (position, index) in enumerate(zip(positions.tolist(), self._stream[positions].tolist())):
            pixels = None if gave_up else self._read(index, position, unreadable)
            if pixels is None:  # the run is about to stop: no hundred more tries for each image that is left
                gave_up, pixels = True, np.zeros((32, 32, self._augmentation.channels), np.uint8)
            crops = self._augmentation.draw(*pixels.shape[:2], _rng(self._seed, position))
            draw(pixels, crops, image)
        return unreadable, gave_up

    def _make_drawer(self, tensors: dict[str, Tensor]) -> Callable[[np.ndarray, np.ndarray, int], None]:
        """From pixels, crop parameters and the number of an image to its rows in the slot."""
        groups = tensors["collated_global_crops"], tensors["collated_local_crops"]
        if "crop_parameters" not in tensors:
            return make_renderer(self._augmentation, *groups).render
        resized = UintCrops(*groups)
        parameters = tensors["crop_parameters"].numpy().view(kernels.CROP)[:, 0].reshape(-1, self.layout.batch_size)

        def draw(pixels: np.ndarray, crops: np.ndarray, image: int) -> None:
            resized.resize(pixels, crops, image)
            parameters[:, image] = crops

        return draw

    def _read(self, index: int, position: int, unreadable: list[tuple[str, str]]) -> np.ndarray | None:
        """Read an image; where it cannot be read, one that depends on the seed and the position only.

        None after too many tries.
        """
        for attempt in range(1, _TRIES + 1):
            try:
                return as_pixels(self._dataset.read(index), self._augmentation.channels)
            except UnreadableImage as problem:
                unreadable.append((os.fspath(problem.path), problem.reason))
            elsewhere = _rng(self._seed, position, attempt).integers(1 << 40)
            index = int(self._stream[np.array([elsewhere])][0])
        return None

    def _fill_masks(self, iteration: int, tensors: dict[str, Tensor]) -> int:
        # A text as seed is hashed, so that neighbouring numbers give unrelated masks.
        masks = self._draw_masks(rng=random.Random(f"{self._seed}/{iteration}/{self._rank}"))
        masked = int(masks["n_masked_patches"])
        tensors["collated_masks"].copy_(masks["collated_masks"])
        tensors["mask_indices_list"][:masked] = masks["mask_indices_list"]
        tensors["masks_weight"][:masked] = masks["masks_weight"]
        tensors["n_masked_patches"].copy_(masks["n_masked_patches"])
        return masked


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch from splitting the resize of one small crop among threads, which costs more than it gains."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _CountFrom(Sampler[int]):
    def __init__(self, start: int):
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return count(self._start)


def _rng(seed: int, position: int, attempt: int = 0) -> np.random.Generator:
    """The draws for one place in the stream: a counter-based generator, which costs nothing to seed."""
    return np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), position], counter=[0, 0, 0, attempt]))


def _make_stream(dataset: Any, seed: int) -> PermutedStream | WeightedStream:
    spans = [(span.start, span.stop, span.weight) for span in getattr(dataset, "spans", ()) if span.stop > span.start]
    if len({weight for _, _, weight in spans}) > 1:
        return WeightedStream(spans, seed)
    return PermutedStream(len(dataset), seed)


def _unchanged(report: _Report) -> _Report:
    return report


def _leave_signals_to_the_run(worker: int) -> None:
    """Let a worker outlive a request to stop, which SLURM and a terminal send to all processes at once.

    The training still finishes its step and saves; a worker ends when the run lets go of it.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _compile(augmentation: DataAugmentationDINO) -> None:
    """Load or compile the kernels before there are workers, so that not each of them has to."""
    started = time.perf_counter()
    augmentation(np.zeros((32, 32, augmentation.channels), np.uint8), np.random.default_rng(0))
    seconds = time.perf_counter() - started
    if seconds > 2:
        logger.info("compiled the augmentation in %.0f s; the next run finds it in the cache", seconds)


def _batches_ahead(num_workers: int, hold: int, nbytes: int) -> int:
    """Batches that each worker prepares ahead, as many as shared memory has room for."""
    if not num_workers or not os.path.isdir(_SHARED_MEMORY):
        return _BATCHES_AHEAD
    room = os.statvfs(_SHARED_MEMORY)
    free = room.f_bavail * room.f_frsize
    for ahead in range(_BATCHES_AHEAD, 0, -1):
        if (num_workers * ahead + hold) * nbytes <= free:
            return ahead
    raise ValueError(
        f"{_SHARED_MEMORY} has {free / 1e6:.0f} MB free, {num_workers} workers need "
        f"{(num_workers + hold) * nbytes / 1e6:.0f} MB: give it more (docker: --shm-size), or lower train.num_workers "
        "or train.batch_size_per_gpu"
    )


def _pin(slot: Tensor) -> int | None:
    """Page-lock memory that already exists; None, and a slower copy, where the driver refuses."""
    error = torch.cuda.cudart().cudaHostRegister(slot.data_ptr(), slot.nbytes, 0)
    if int(error) != 0:
        logger.warning("cannot page-lock the batches (CUDA error %d): copies to the GPU will be slower", int(error))
        return None
    return slot.data_ptr()
