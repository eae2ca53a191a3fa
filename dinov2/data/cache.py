"""Decoded images of a small data set in one memory-mapped file, shared by all processes of a node.

    header     magic, format, number of images, capacity, end of what is taken (five int64)
    entries    offset of the pixels (0: not there, -1: being written), height, width, and a stamp of the image file
    pixels     uint8 RGB, one image after the other, written once and never moved

Whoever decodes an image first appends it; one whose file changes later is decoded each time from then on. Space is
handed out under a file lock; pixels are written outside of it, and an entry becomes visible when they are there. Pixels
are written with `pwrite`, so that a full disk is an error and not the end of the process, as it would be through the
mapping.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import mmap
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

from .decode import UnreadableImage
from .manifest import cache_folder

logger = logging.getLogger("dinov2")

_MAGIC = int.from_bytes(b"dinov2px", "little")
_FORMAT = 1
_HEADER = 5 * 8
_ENTRY = np.dtype([("offset", np.int64), ("stamp", np.uint64), ("height", np.int32), ("width", np.int32)])
_WRITING = -1
_ALIGNMENT = 64
_SAMPLED = 32  # images decoded to estimate the size of all
_KEEP_UNUSED_SECONDS = 7 * 24 * 3600


def cache_decoded(dataset: Any, max_gb: float, cache_dir: str | os.PathLike | None = None) -> Any:
    """Return the dataset with its decoded images kept in a file, or the dataset itself where they would not fit.

    Args:
        dataset: an `ImageDataset` of RGB images, or a dataset like one.
        max_gb: largest file, gigabytes.
        cache_dir: see `manifest.cache_folder`; the file lies in a folder of this node there.
    """
    if getattr(dataset, "in_chans", 3) != 3:
        return dataset
    expected = _decoded_bytes(dataset)
    if expected > max_gb * 1e9:
        logger.info(
            "decoded images would take about %.1f GB, more than train.cache_max_gb=%g: they are decoded each time",
            expected / 1e9,
            max_gb,
        )
        return dataset
    folder = cache_folder(cache_dir) / "decoded" / socket.gethostname()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unused(folder)
        file = folder / f"{_identity(dataset)}.pixels"
        free = os.statvfs(folder)
        kept = file.stat().st_blocks * 512 if file.exists() else 0
        if expected - kept > 0.9 * free.f_bavail * free.f_frsize:
            logger.info("decoded images are not kept: %s has too little room for %.1f GB", folder, expected / 1e9)
            return dataset
        images = CachedImages(dataset, file, int(max_gb * 1e9))
    except OSError as error:
        logger.warning("decoded images are not kept in %s: %s", folder, error)
        return dataset
    logger.info("decoded images are kept in %s, about %.2f GB in all", images.path_of_file, expected / 1e9)
    return images


class CachedImages:
    """A dataset whose `read` takes the pixels from a shared file, and puts them there the first time.

    Everything else is the dataset's own. Pickles as the dataset and the path of the file.

    Args:
        dataset: with `read(index)` and `path(index)`.
        path_of_file: made if absent, opened otherwise.
        capacity: bytes for pixels; images that find no room are decoded each time.
    """

    def __init__(self, dataset: Any, path_of_file: str | os.PathLike, capacity: int):
        self.dataset = dataset
        self.path_of_file = os.fspath(path_of_file)
        self.capacity = capacity
        self._file = _open_or_create(self.path_of_file, len(dataset), capacity)
        self._map = mmap.mmap(self._file, 0)
        self._header = np.frombuffer(self._map, np.int64, 5)
        self._entries = np.frombuffer(self._map, _ENTRY, len(dataset), _HEADER)
        self._full = False
        # An image file may have changed since an earlier run; each process looks once per image.
        self._verified = np.zeros(len(dataset), dtype=bool)

    def __reduce__(self):
        return CachedImages, (self.dataset, self.path_of_file, self.capacity)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not yet there while unpickling
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __del__(self):
        if file := self.__dict__.get("_file"):
            os.close(file)

    def read(self, index: int) -> np.ndarray:
        """Return image `index`, uint8 `(H, W, 3)`; raises UnreadableImage as the dataset does.

        The pixels of a kept image lie in the shared file: they must not be changed.
        """
        entry = self._entries[index]
        if entry["offset"] > 0:
            if not self._verified[index]:
                self._verified[index] = entry["stamp"] == self._stamp(index)
            if self._verified[index]:
                height, width = int(entry["height"]), int(entry["width"])
                pixels = np.frombuffer(self._map, np.uint8, height * width * 3, int(entry["offset"]))
                return pixels.reshape(height, width, 3)
        stamp = self._stamp(index)
        pixels = self.dataset.read(index)
        if entry["offset"] == 0 and not self._full and pixels.dtype == np.uint8 and pixels.shape[2:] == (3,):
            self._keep(index, pixels, stamp)
        return pixels

    def _keep(self, index: int, pixels: np.ndarray, stamp: int) -> None:
        try:
            offset = self._claim(index, pixels.nbytes)
            if offset is None:
                return
            _write_all(self._file, np.ascontiguousarray(pixels).data.cast("B"), offset)
        except OSError as error:  # a full disk, a file system without locks
            logger.warning("no more decoded images are kept in %s: %s", self.path_of_file, error.strerror)
            self._full = True
            return
        entry = self._entries[index]
        entry["height"], entry["width"], entry["stamp"] = *pixels.shape[:2], stamp
        self._entries["offset"][index] = offset  # last: from now on other processes read it

    def _claim(self, index: int, nbytes: int) -> int | None:
        """Take room for an image, unless another process has done so or there is none."""
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            if self._entries["offset"][index] != 0:
                return None
            offset = int(self._header[4])
            end = offset + -(-nbytes // _ALIGNMENT) * _ALIGNMENT
            if end > len(self._map):
                self._full = True
                return None
            self._header[4] = end
            self._entries["offset"][index] = _WRITING
            return offset
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _stamp(self, index: int) -> int:
        """Size and modification time of the image file, or of the shard it lies in, in one number; 0 if it is gone."""
        try:
            status = _stat_file(self.dataset.path(index))
        except OSError:
            return 0
        return (status.st_mtime_ns * 1_000_003 + status.st_size) & (2**64 - 1)


def _stat_file(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except NotADirectoryError:  # a member of a shard
        return _stat_file(os.path.dirname(path))


def _open_or_create(path: str, images: int, capacity: int) -> int:
    """Open the file, after making it if there is none that fits; many processes may do so at once."""
    first_pixels = -(-(_HEADER + images * _ENTRY.itemsize) // mmap.PAGESIZE) * mmap.PAGESIZE
    header = np.array([_MAGIC, _FORMAT, images, capacity, first_pixels], np.int64)
    if os.path.exists(path) and (file := _open_fitting(path, header)) is not None:
        return file
    scratch = f"{path}.{os.getpid()}-{time.time_ns()}"
    file = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        _write_all(file, memoryview(header.tobytes() + bytes(first_pixels - _HEADER)), 0)
        os.ftruncate(file, first_pixels + capacity)
        os.link(scratch, path)
    except FileExistsError:
        other = _open_fitting(path, header)  # another process was faster
        if other is not None:
            os.close(file)
            return other
        os.replace(scratch, path)
        return file
    finally:
        if os.path.exists(scratch):
            os.unlink(scratch)
    return file


def _open_fitting(path: str, header: np.ndarray) -> int | None:
    """Open a file that was made for the same images and capacity."""
    file = os.open(path, os.O_RDWR)
    found = np.frombuffer(os.pread(file, _HEADER, 0).ljust(_HEADER, b"\0"), np.int64)
    if (found[:4] == header[:4]).all():
        os.utime(path)
        return file
    os.close(file)
    return None


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _decoded_bytes(dataset: Any) -> float:
    """Estimate from some images what all take decoded."""
    sizes = []
    for index in np.unique(np.linspace(0, len(dataset) - 1, _SAMPLED).astype(int)):
        try:
            sizes.append(dataset.read(int(index)).nbytes)
        except UnreadableImage:  # found and reported in training
            continue
    return float(np.mean(sizes or [0])) * len(dataset)


def _identity(dataset: Any) -> str:
    """A name for these images in this order."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        digest.update(os.fsencode(dataset.path(index)) + b"\0")
    return digest.hexdigest()[:24]


def _remove_unused(folder: Path) -> None:
    for file in folder.glob("*.pixels*"):
        try:
            if time.time() - file.stat().st_mtime > _KEEP_UNUSED_SECONDS:
                file.unlink()
        except FileNotFoundError:  # another process was faster
            continue
