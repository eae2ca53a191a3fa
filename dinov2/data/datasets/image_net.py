"""ImageNet-1k as DINOv2 keeps it: pictures in folders, and their order and classes in `.npy` files beside them."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Callable
from enum import Enum

import numpy as np

from .extended import ExtendedVisionDataset

logger = logging.getLogger("dinov2")


class _Split(Enum):
    TRAIN = "train"
    VAL = "val"
    TEST = "test"

    @property
    def length(self) -> int:
        """Number of images in the official split."""
        return {"train": 1_281_167, "val": 50_000, "test": 100_000}[self.value]

    def get_dirname(self, class_id: str | None = None) -> str:
        """Return the folder of the split, or of one of its classes, below the root."""
        return self.value if class_id is None else os.path.join(self.value, class_id)

    def get_image_relpath(self, actual_index: int, class_id: str | None = None) -> str:
        """Return the path of an image below the root, by the number in its file name."""
        name = f"{class_id}_{actual_index}" if self is _Split.TRAIN else f"ILSVRC2012_{self.value}_{actual_index:08d}"
        return os.path.join(self.get_dirname(class_id), f"{name}.JPEG")

    def parse_image_relpath(self, image_relpath: str) -> tuple[str, int]:
        """Return (class id, number in the file name) of a training or validation image."""
        folder, name = os.path.split(image_relpath)
        return os.path.basename(folder), int(os.path.splitext(name)[0].rsplit("_", 1)[1])


class ImageNet(ExtendedVisionDataset):
    """ImageNet-1k.

    Args:
        split: `ImageNet.Split.TRAIN`, `VAL` or `TEST`.
        root: folder with `labels.txt` (lines `class id,class name`) and train/, val/ and test/.
        extra: folder with entries-SPLIT.npy, class-ids-SPLIT.npy and class-names-SPLIT.npy, which `dump_extra` writes.
        transforms: applied to image and target together.
        transform: applied to the PIL image.
        target_transform: applied to the class number.
    """

    Split = _Split

    def __init__(
        self,
        *,
        split: _Split,
        root: str,
        extra: str,
        transforms: Callable | None = None,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
    ) -> None:
        super().__init__(root, transforms, transform, target_transform)
        self._split = split
        self._extra_root = extra
        self._extras: dict[str, np.ndarray] = {}

    @property
    def split(self) -> _Split:
        """The split that was asked for."""
        return self._split

    def __len__(self) -> int:
        count = len(self._extra("entries"))
        if count != self.split.length:
            raise ValueError(
                f"{self._extra_path('entries')} lists {count} images where ImageNet has {self.split.length}"
            )
        return count

    def get_image_data(self, index: int) -> bytes:
        """Return the content of an image file."""
        relpath = self.split.get_image_relpath(int(self._entry(index)["actual_index"]), self.get_class_id(index))
        with open(os.path.join(self.root, relpath), "rb") as file:
            return file.read()

    def get_target(self, index: int) -> int | None:
        """Return the class number, None in the test split."""
        return None if self.split is _Split.TEST else int(self._entry(index)["class_index"])

    def get_targets(self) -> np.ndarray | None:
        """Return all class numbers, None in the test split."""
        return None if self.split is _Split.TEST else self._extra("entries")["class_index"]

    def get_class_id(self, index: int) -> str | None:
        """Return the WordNet identifier of an image's class, None in the test split."""
        return None if self.split is _Split.TEST else str(self._entry(index)["class_id"])

    def get_class_name(self, index: int) -> str | None:
        """Return the name of an image's class, None in the test split."""
        return None if self.split is _Split.TEST else str(self._entry(index)["class_name"])

    def find_class_id(self, class_index: int) -> str:
        """Return the WordNet identifier of a class number."""
        return str(self._extra("class-ids")[class_index])

    def find_class_name(self, class_index: int) -> str:
        """Return the name of a class number."""
        return str(self._extra("class-names")[class_index])

    def dump_extra(self) -> None:
        """Write the `.npy` files of the split from the pictures and `labels.txt`."""
        if self.split is _Split.TEST:
            nothing = np.iinfo(np.uint32).max
            rows = [(number, nothing, "", "") for number in range(1, self.split.length + 1)]
            self._save("entries", _entries(rows))
            return
        names = self._load_labels()
        folder = os.path.join(self.root, self.split.get_dirname())
        class_ids = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        rows = []
        for class_index, class_id in enumerate(class_ids):
            for name in sorted(os.listdir(os.path.join(folder, class_id))):
                _, number = self.split.parse_image_relpath(os.path.join(class_id, name))
                rows.append((number, class_index, class_id, names[class_id]))
        logger.info("writing %s entries to %s", f"{len(rows):,}", self._extra_path("entries"))
        self._save("entries", _entries(rows))
        self._save("class-ids", np.array(class_ids))
        self._save("class-names", np.array([names[class_id] for class_id in class_ids]))

    def _load_labels(self) -> dict[str, str]:
        path = os.path.join(self.root, "labels.txt")
        try:
            with open(path, newline="") as file:
                return dict(csv.reader(file))
        except OSError as error:
            raise ValueError(
                f"{path}: {error.strerror}; it must list `class id,class name`, one class a line"
            ) from error

    def _entry(self, index: int) -> np.void:
        return self._extra("entries")[index]

    def _extra(self, name: str) -> np.ndarray:
        if name not in self._extras:
            path = self._extra_path(name)
            if not os.path.exists(path):
                raise ValueError(f"{path} does not exist; ImageNet(...).dump_extra() writes it from the pictures")
            self._extras[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        return self._extras[name]

    def _extra_path(self, name: str) -> str:
        return os.path.join(self._extra_root, f"{name}-{self.split.value.upper()}.npy")

    def _save(self, name: str, array: np.ndarray) -> None:
        os.makedirs(self._extra_root, exist_ok=True)
        np.save(self._extra_path(name), array)


def _entries(rows: list[tuple[int, int, str, str]]) -> np.ndarray:
    longest_id, longest_name = (max(len(row[column]) for row in rows) for column in (2, 3))
    fields = [("actual_index", "<u4"), ("class_index", "<u4")]
    fields += [("class_id", f"U{longest_id}"), ("class_name", f"U{longest_name}")]
    return np.array(rows, dtype=fields)
