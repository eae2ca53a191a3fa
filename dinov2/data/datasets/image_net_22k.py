"""ImageNet-22k as DINOv2 keeps it: one tar file per class, and an index of their members in `.npy` files."""

from __future__ import annotations

import gzip
import os
import tarfile
from collections.abc import Callable

import numpy as np

from .extended import ExtendedVisionDataset

_TAR_BLOCK = 512  # bytes; a member is one header block and its content, filled up to whole blocks


class ImageNet22k(ExtendedVisionDataset):
    """ImageNet-22k, read from its tar files without unpacking them.

    Args:
        root: folder with one `<class id>.tar` per class.
        extra: folder with entries.npy and class-ids.npy, which `dump_extra` writes.
        transforms: applied to image and target together.
        transform: applied to the PIL image.
        target_transform: applied to the class number.
    """

    def __init__(
        self,
        *,
        root: str,
        extra: str,
        transforms: Callable | None = None,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
    ) -> None:
        super().__init__(root, transforms, transform, target_transform)
        self._extra_root = extra
        self._extras: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._extra("entries"))

    def get_image_data(self, index: int) -> bytes:
        """Return the content of an image file; the few that are compressed inside their tar file are inflated."""
        entry = self._extra("entries")[index]
        start, stop = int(entry["start_offset"]) + _TAR_BLOCK, int(entry["end_offset"])
        with open(os.path.join(self.root, f"{entry['class_id']}.tar"), "rb", buffering=0) as file:
            data = os.pread(file.fileno(), stop - start, start)
        return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data

    def get_target(self, index: int) -> int:
        """Return the class number."""
        return int(self._extra("entries")[index]["class_index"])

    def get_targets(self) -> np.ndarray:
        """Return all class numbers."""
        return self._extra("entries")["class_index"]

    def get_class_id(self, index: int) -> str:
        """Return the WordNet identifier of an image's class."""
        return str(self._extra("entries")[index]["class_id"])

    def get_class_ids(self) -> np.ndarray:
        """Return the WordNet identifiers of all images' classes."""
        return self._extra("entries")["class_id"]

    def find_class_id(self, class_index: int) -> str:
        """Return the WordNet identifier of a class number."""
        return str(self._extra("class-ids")[class_index])

    def dump_extra(self) -> None:
        """Write the `.npy` files from the tar files."""
        class_ids = sorted(name[:-4] for name in os.listdir(self.root) if name.endswith(".tar"))
        rows = []
        for class_index, class_id in enumerate(class_ids):
            with tarfile.open(os.path.join(self.root, f"{class_id}.tar"), "r:") as archive:
                for member in archive:
                    blocks = -(-member.size // _TAR_BLOCK)
                    start, stop = member.offset_data - _TAR_BLOCK, member.offset_data + blocks * _TAR_BLOCK
                    rows.append((class_index, class_id, start, stop, member.name))
        if not rows:
            raise ValueError(f"no image in the tar files of {self.root}")
        longest_id, longest_name = (max(len(row[column]) for row in rows) for column in (1, 4))
        fields = [
            ("class_index", "<u4"),
            ("class_id", f"U{longest_id}"),
            ("start_offset", "<u8"),
            ("end_offset", "<u8"),
        ]
        os.makedirs(self._extra_root, exist_ok=True)
        np.save(self._extra_path("entries"), np.array(rows, dtype=[*fields, ("filename", f"U{longest_name}")]))
        np.save(self._extra_path("class-ids"), np.array(class_ids))

    def _extra(self, name: str) -> np.ndarray:
        if name not in self._extras:
            path = self._extra_path(name)
            if not os.path.exists(path):
                raise ValueError(f"{path} does not exist; ImageNet22k(...).dump_extra() writes it from the tar files")
            self._extras[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        return self._extras[name]

    def _extra_path(self, name: str) -> str:
        return os.path.join(self._extra_root, f"{name}.npy")
