"""Folders, manifests and shards of one's own images: `ImageDataset` for pre-training, `LabelledDataset` for scoring."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..decode import UnreadableImage, decode_channels, decode_rgb
from ..manifest import Catalog, Index, PathList, cache_folder, describe_counts

logger = logging.getLogger("dinov2")

_PROBES = 16  # images decoded when a data set is opened, to find out early that none can be


class SourceSpan(NamedTuple):
    """The positions start..stop-1 of a data set that come from one source, and that source's sampling weight."""

    name: str
    start: int
    stop: int
    weight: float


@dataclass(frozen=True)
class DatasetSummary:
    """What was found and what becomes of it; `str()` gives the lines to print before a run."""

    sources: dict[str, int]  # images found in each source
    folders: int
    skipped: dict[str, int]  # files that are no images, by extension or reason
    excluded: int
    held_out: int
    used: int
    exclude: str = ""  # the exclude list
    held_out_of: dict[str, int] = field(default_factory=dict)  # images in each folder of path_preserved

    @property
    def found(self) -> int:
        """Images found in all sources."""
        return sum(self.sources.values())

    def __str__(self) -> str:
        lines = [f"{self.found:,} images found in {self.folders:,} folder(s)"]
        if len(self.sources) > 1:
            lines += [f"  {count:>10,}  {source}" for source, count in self.sources.items()]
        if self.skipped:
            lines.append(f"{sum(self.skipped.values()):,} files skipped: {describe_counts(self.skipped)}")
        if self.excluded:
            lines.append(f"{self.excluded:,} images left out by {self.exclude}")
        if self.held_out_of:
            of = ", ".join(f"{count:,} in {folder}" for folder, count in self.held_out_of.items())
            lines.append(f"{self.held_out:,} images held out of {of}")
        return "\n".join([*lines, f"{self.used:,} images to train on"])


class ImageDataset(Dataset):
    """Images without labels, of which a reproducible share can be held out.

    The images are rows of a memory-mapped index (see `dinov2.data.manifest`), so that a copy in a worker process costs
    next to nothing, however many images there are. Which images are held out depends on their paths relative to the
    folder of `path_preserved` and on `seed` only: not on the order of the file system, nor on where the data lies.

    Args:
        root: what `find_sources` takes: a folder, a manifest, shards, a mapping with path and weight, or a list.
        transform: applied to each image, a PIL image when there are three channels, else an array
            (height, width, channels).
        path_preserved: folder or list of folders, within `root`, of which the share `frac` is held out. Where a
            manifest names groups (patients, slides), whole groups are held out.
        frac: the share, between 0 and 1; at least one image of each folder unless it is 0.
        is_valid: True gives the images to train on, False those held out.
        exclude: text file of image paths to leave out, one a line, as `dinov2 check` writes it.
        seed: of the choice of held-out images.
        in_chans: 3 reads every file as RGB; any other number reads that many channels as stored.
        cache_dir: folder for the index; by default $DINOV2_CACHE or ~/.cache/dinov2.

    Attributes:
        images_list: paths of the images to train on.
        preserved_images: paths of those held out.
        summary: DatasetSummary.

    Raises:
        DatasetNotFound: a path does not exist.
        ValueError: no image, none that can be read, or a wrong argument; the message says what was found instead.
    """

    def __init__(
        self,
        root: str | os.PathLike | Mapping | Iterable,
        transform: Callable | None = None,
        path_preserved: str | os.PathLike | Sequence[str] | None = None,
        frac: float = 0.1,
        is_valid: bool = True,
        *,
        exclude: str | os.PathLike | None = None,
        seed: int = 0,
        in_chans: int = 3,
        cache_dir: str | os.PathLike | None = None,
    ):
        if not 0 <= frac <= 1:
            raise ValueError(f"frac={frac} is not a share between 0 and 1")
        self.transform = transform
        self.is_valid = is_valid
        self.in_chans = in_chans
        catalog = Catalog.open(root, cache_dir=cache_dir)
        preserved = _as_paths(path_preserved)
        _check_within(preserved, catalog)
        exclude = os.fspath(exclude) if exclude else ""
        selection = _select(catalog, preserved if frac else [], frac, seed, exclude, cache_dir)
        self.images_list = selection.kept
        self.preserved_images = selection.held_out
        self._split = f"frac={frac} of {', '.join(preserved)}, seed={seed}"
        self.summary = _summarise(catalog, selection, preserved, exclude)
        if not len(self._served):
            raise ValueError(f"no image is left of {self.summary.found:,}:\n{self.summary}")
        _refuse_unreadable(self)

    @property
    def _served(self) -> PathList:
        return self.images_list if self.is_valid else self.preserved_images

    def __len__(self) -> int:
        return len(self._served)

    def __getitem__(self, index: int) -> Any:
        image = self.read(index)
        image = Image.fromarray(image) if self.in_chans == 3 else image
        return self.transform(image) if self.transform else image

    def path(self, index: int) -> str:
        """Return the path of image `index`."""
        return self._served[index]

    def read_bytes(self, index: int) -> bytes:
        """Return the content of the file of image `index`, undecoded."""
        return self._served.read(index)

    def read(self, index: int) -> np.ndarray:
        """Return image `index` as an array (height, width, channels), uint8 RGB where in_chans is 3.

        Raises:
            UnreadableImage: naming the file and the reason.
        """
        return _decode(self._served, index, self.in_chans)

    @property
    def spans(self) -> list[SourceSpan]:
        """Which positions belong to which source, for sampling by weight."""
        catalog, rows = self._served.catalog, self._served.rows
        bounds = catalog.starts if rows is None else np.searchsorted(rows, catalog.starts)
        return [
            SourceSpan(str(source), int(start), int(stop), source.weight)
            for source, start, stop in zip(catalog.sources, bounds, bounds[1:])
        ]

    def write_preserved(self, path: str | os.PathLike) -> None:
        """Write the held-out paths, one a line, readable and in the format of an exclude list."""
        with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"# {len(self.preserved_images)} images held out of training: {self._split}\n")
            file.writelines(f"{image}\n" for image in self.preserved_images)


def read_path_list(path: str | os.PathLike) -> list[str]:
    """Read a list of paths, one a line; empty lines and those that start with # do not count.

    Relative paths start from the list's own folder.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"cannot read the list of images {path}: {error.strerror}") from error
    lines = (line.strip() for line in text.splitlines())
    folder = os.path.abspath(os.path.dirname(path))
    return [os.path.normpath(os.path.join(folder, line)) for line in lines if line and not line.startswith("#")]


def _as_paths(paths: str | os.PathLike | Iterable[str] | None) -> list[str]:
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths or [])
    return [os.path.abspath(os.path.expanduser(path)) for path in paths if path]


def _check_within(preserved: list[str], catalog: Catalog) -> None:
    for path in preserved:
        if not catalog.count_below(path):
            known = "\n".join(f"  {source}" for source in catalog.sources)
            why = "holds no image of the data set" if os.path.exists(path) else "does not exist"
            raise ValueError(f"path_preserved: {path} {why}; it must be one of these, or a folder within:\n{known}")


def _refuse_unreadable(dataset) -> None:
    """Raise ValueError when none of some images spread over the data set can be read."""
    problems = []
    for position in np.unique(np.linspace(0, len(dataset) - 1, _PROBES).astype(int)):
        try:
            dataset.read(int(position))
            return
        except UnreadableImage as problem:
            problems.append(str(problem))
    raise ValueError(
        f"none of the {len(problems)} images tried could be read:\n  " + "\n  ".join(problems[:5]) + "\n"
        "`dinov2 check` reads them all and reports on each"
    )


# ----------------------------------------------------------------------------------------- which rows are held out


class _Selection(NamedTuple):
    """Sorted rows of a catalog."""

    kept: PathList
    held_out: PathList
    excluded: PathList


def _select(
    catalog: Catalog, preserved: list[str], frac: float, seed: int, exclude: str, cache_dir: str | os.PathLike | None
) -> _Selection:
    """Split the rows of a catalog; the answer is kept in the cache folder, under a name made of all it depends on."""
    if not preserved and not exclude:
        nothing = PathList(catalog, np.arange(0))
        return _Selection(PathList(catalog), nothing, nothing)
    listed = sorted(set(read_path_list(exclude))) if exclude else []
    key = repr([[index.folder for index in catalog.indexes], preserved, frac, seed, listed])
    folder = cache_folder(cache_dir) / "selection" / hashlib.sha256(os.fsencode(key)).hexdigest()[:24]
    if not folder.is_dir():
        excluded = catalog.rows_named(listed)
        if len(excluded) < len(listed):
            logger.warning("%s: %d of its paths are not in the data set", exclude, len(listed) - len(excluded))
        held_out = np.setdiff1d(_hold_out(catalog, preserved, frac, seed), excluded)
        kept = np.ones(len(catalog), bool)
        kept[excluded] = kept[held_out] = False
        _save_rows(folder, {"kept": np.flatnonzero(kept), "held_out": held_out, "excluded": excluded})
    return _Selection(*(PathList(catalog, folder / f"{name}.npy") for name in _Selection._fields))


def _hold_out(catalog: Catalog, preserved: list[str], frac: float, seed: int) -> np.ndarray:
    """Return the sorted rows to hold out: in each folder those whose names have the smallest hashes.

    Images added later change the choice little: the order of the images that were there stays.
    """
    chosen = [_smallest_hashes(catalog, folder, frac, seed) for folder in preserved]
    return np.unique(np.concatenate([np.arange(0), *chosen]))


def _smallest_hashes(catalog: Catalog, folder: str, frac: float, seed: int) -> np.ndarray:
    rows = catalog.rows_below(folder)
    wanted = max(1, round(frac * len(rows)))
    hashes = np.fromiter(_hashes(catalog, rows, folder, seed), np.int64, len(rows))
    values, counts = np.unique(hashes, return_counts=True)
    before = np.cumsum(counts) - counts  # images held out before this one, or before this group
    return rows[hashes <= values[before < wanted][-1]]


def _hashes(catalog: Catalog, rows: np.ndarray, folder: str, seed: int) -> Iterator[int]:
    """Yield, for each row, the hash of its group where it has one, else of its path relative to the folder."""
    for index, start, stop in zip(catalog.indexes, catalog.starts, catalog.starts[1:]):
        inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start
        prefix = os.path.relpath(folder, index.root) + os.sep  # not that of any path where the whole source is meant
        paths = (path.removeprefix(prefix) for path in index.relative_paths(inside))
        if "group" not in index.columns:
            yield from (_hash(seed, path) for path in paths)
            continue
        groups = index.column("group").take(inside).to_pylist()
        yield from (_hash(seed, f"group {group}" if group else path) for group, path in zip(groups, paths))


def _hash(seed: int, name: str) -> int:
    digest = hashlib.blake2b(os.fsencode(f"{seed}/{name}"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # fits a signed integer


def _save_rows(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Keep rows in files that processes map and share."""
    scratch = folder.with_name(f".{folder.name}-{os.getpid()}-{time.time_ns()}")
    scratch.mkdir(parents=True)
    for name, rows in arrays.items():
        np.save(scratch / f"{name}.npy", rows.astype(np.uint32 if rows.max(initial=0) < 2**32 else np.int64))
    try:
        scratch.rename(folder)
    except OSError:  # another process was faster, with the same rows
        shutil.rmtree(scratch)


def _summarise(catalog: Catalog, selection: _Selection, preserved: list[str], exclude: str) -> DatasetSummary:
    skipped: Counter[str] = Counter()
    for index in catalog.indexes:
        skipped.update(index.skipped)
    return DatasetSummary(
        sources={str(source): len(index) for source, index in zip(catalog.sources, catalog.indexes)},
        folders=sum(index.info["folders"] for index in catalog.indexes),
        skipped=dict(skipped),
        excluded=len(selection.excluded),
        held_out=len(selection.held_out),
        used=len(selection.kept),
        exclude=exclude,
        held_out_of={path: catalog.count_below(path) for path in preserved},
    )


# ---------------------------------------------------------------------------------------------------- with labels


class LabelledDataset(Dataset):
    """Images with one class each, for scoring a model: every image counts, in a fixed order, and none is replaced.

    Args:
        data_path: a folder with one sub-folder per class; a manifest with the columns path and label; shards with
            `.cls` members; or a list of these.
        root: folder that the paths of a manifest start from; by default the manifest's own.
        transform: applied to each image, a PIL image when there are three channels, else an array.
        classes: the class names in the order of their numbers, when those of another data set shall be used.
        in_chans: as for ImageDataset.
        cache_dir: as for ImageDataset.

    Attributes:
        paths: path of each image.
        labels: int64 array, the class number of each image.
        classes: class names; class i is classes[i]. Sorted, as numbers where all are numbers.
        translate_dict: {class number: class name}.
        sources: for each image the manifest's column `source`, or else the name of the folder or manifest.
        groups: for each image the manifest's column `group` (or patient, or slide); "" where there is none.
        skipped: files that are not used, by reason.

    Raises:
        DatasetNotFound: a path does not exist.
        ValueError: no labelled image, none that can be read, or a class that is not in `classes`.
    """

    def __init__(
        self,
        data_path: str | os.PathLike | Mapping | Iterable,
        root: str | os.PathLike | None = None,
        transform: Callable | None = None,
        *,
        classes: Sequence[str] | None = None,
        in_chans: int = 3,
        cache_dir: str | os.PathLike | None = None,
    ):
        self.transform = transform
        self.in_chans = in_chans
        manifest_root = os.fspath(root) if root else None
        catalog = Catalog.open(data_path, manifest_root=manifest_root, cache_dir=cache_dir)
        columns = [_labels_sources_groups(index) for index in catalog.indexes]
        names, sources, groups = (np.concatenate(column) for column in zip(*columns))
        rows = np.flatnonzero(names != "")
        if not len(rows):
            raise ValueError(
                f"no label in {', '.join(map(str, catalog.sources))}: {len(catalog):,} images, none in a folder named "
                "after its class, nor in a manifest with a column `label`"
            )
        names = names[rows]
        self.classes = list(classes) if classes is not None else _sorted_classes(names)
        self.translate_dict = dict(enumerate(self.classes))
        self.labels = _numbers(names, self.classes)
        self.paths = PathList(catalog, rows)
        self.sources = sources[rows].tolist()
        self.groups = groups[rows].tolist()
        self.skipped = Counter({"no label": len(catalog) - len(rows)} if len(catalog) > len(rows) else {})
        for index in catalog.indexes:
            self.skipped.update(index.skipped)
        _refuse_unreadable(self)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.read(index)
        image = Image.fromarray(image) if self.in_chans == 3 else image
        return (self.transform(image) if self.transform else image), int(self.labels[index])

    def read(self, index: int) -> np.ndarray:
        """Return image `index` as an array (height, width, channels); raises UnreadableImage."""
        return _decode(self.paths, index, self.in_chans)

    def get_target(self, index: int) -> int:
        """Return the class number of image `index`."""
        return int(self.labels[index])

    def get_targets(self) -> np.ndarray:
        """Return all class numbers."""
        return self.labels


def _labels_sources_groups(index: Index) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return three columns of text, "" where there is nothing."""

    def column(name: str, otherwise: Iterable[str]) -> np.ndarray:
        values = index.column(name).to_pylist() if name in index.columns else otherwise
        return np.array(list(values), dtype=object)

    # The class of root/class/…/image.jpg; an image that lies in the root itself has none.
    folders = (path.split(os.sep, 1)[0] if os.sep in path else "" for path in index.relative_paths())
    in_folders = folders if index.info["kind"] == "folder" else [""] * len(index)
    name = Path(index.info["paths"][0]).stem if index.info["kind"] == "manifest" else Path(index.root).name
    labels, nothing = column("label", in_folders), [""] * len(index)
    return labels, column("source", [name] * len(index)), column("group", nothing)


def _sorted_classes(names: np.ndarray) -> list[str]:
    classes = sorted(set(names))
    return sorted(classes, key=int) if all(name.isdecimal() for name in classes) else classes


def _numbers(names: np.ndarray, classes: list[str]) -> np.ndarray:
    number = {name: i for i, name in enumerate(classes)}
    if unknown := sorted(set(names) - set(number)):
        raise ValueError(f"class(es) {', '.join(unknown)} are not among the known ones: {', '.join(classes)}")
    return np.array([number[name] for name in names], dtype=np.int64)


def _decode(paths: PathList, position: int, in_chans: int) -> np.ndarray:
    data, path = paths.read(position), paths[position]
    return decode_rgb(data, path=path) if in_chans == 3 else decode_channels(data, path=path, channels=in_chans)
