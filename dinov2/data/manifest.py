"""Which images there are: folders, CSV or Parquet manifests and tar shards, as one memory-mapped index.

A source is scanned once. The index is a folder of Arrow files under the cache folder that every process maps, so that
100 million paths open at once and cost each process megabytes. It is refreshed when a folder's modification time has
changed; only changed folders are listed again.

    index.json          what was scanned and what was skipped
    directories.arrow   path, modification time, first row, rows, sub-folders, skipped files of each folder
    files.arrow         directory number and name of each image; label, source, group; offset and size in its shard
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import shutil
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from tqdm import tqdm

from .decode import UnreadableImage, read_bytes

logger = logging.getLogger("dinov2")

EMPTY_FILE = "empty file (0 bytes)"  # why a file is skipped

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")  # in any case
MANIFEST_EXTENSIONS = (".csv", ".tsv", ".parquet", ".pq")

_FORMAT = 1  # part of every cache key: a change of the layout makes new indexes
_ROWS_PER_BATCH = 1 << 18
_LOOKAHEAD = 64  # folders listed ahead of the one being written
_SETTLED_NS = 2_000_000_000  # a folder that changed less than this before its scan may change again within one tick
_KEEP_OLD_SECONDS = 7 * 24 * 3600  # another run may still read an index that was replaced

_EXTENSIONS = frozenset(extension.encode() for extension in IMAGE_EXTENSIONS)
_EXTENSION_PATTERN = r"(?i)\.(jpe?g|png|tiff?|bmp|webp)$"
_GROUP_COLUMNS = ("group", "patient", "slide")


class DatasetNotFound(FileNotFoundError, ValueError):
    """A path given as a data set that does not exist."""


@dataclass(frozen=True)
class Source:
    """Where images come from: one folder, one manifest, or the tar shards that belong together."""

    kind: str  # "folder", "manifest" or "shards"
    paths: tuple[str, ...]
    weight: float = 1.0  # how often each of its images is drawn, relative to those of other sources

    def __str__(self) -> str:
        return self.paths[0] if len(self.paths) == 1 else f"{self.paths[0]} … ({len(self.paths)} shards)"


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """Return where indexes are kept: `cache_dir`, else $DINOV2_CACHE, else ~/.cache/dinov2."""
    return Path(cache_dir or os.environ.get("DINOV2_CACHE") or "~/.cache/dinov2").expanduser()


# ------------------------------------------------------------------------------------------------------- sources


def find_sources(root: str | os.PathLike | Mapping | Iterable) -> list[Source]:
    """Turn what a user gives as a data set into sources.

    Args:
        root: a folder, a `.csv`, `.tsv` or `.parquet` manifest, a `.tar` shard, a glob of any of these, a mapping
            `{path: …, weight: …}`, or a list of them. Shards of equal weight make one source.

    Raises:
        DatasetNotFound: a path does not exist, or a glob matches nothing.
        ValueError: something that is none of these, or a weight that is not positive.
    """
    entries = [root] if isinstance(root, (str, os.PathLike, Mapping)) else list(root)
    if not entries:
        raise ValueError("the data set is an empty list; give at least one folder of images")
    sources: list[Source] = []
    shards: dict[float, list[str]] = {}
    for entry in entries:
        path, weight = (entry.get("path"), entry.get("weight", 1.0)) if isinstance(entry, Mapping) else (entry, 1.0)
        if not path:
            raise ValueError(f"{entry!r} names no data set; give a folder, or a mapping with `path` and `weight`")
        if not weight > 0:
            raise ValueError(f"weight {weight} of {path} is not positive; to leave a source out, remove it")
        for match in _expand(os.fspath(path)):
            if match.endswith(".tar"):
                shards.setdefault(float(weight), []).append(match)
            else:
                sources.append(Source(_kind(match), (match,), float(weight)))
    return sources + [Source("shards", tuple(sorted(paths)), weight) for weight, paths in shards.items()]


def _expand(pattern: str) -> list[str]:
    path = os.path.abspath(os.path.expanduser(pattern))
    if os.path.exists(path):
        return [path]
    matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []
    if not matches:
        parent = next((folder for folder in Path(path).parents if folder.is_dir()), Path("/"))
        what = "no file or folder matches" if glob.has_magic(path) else "no such file or folder:"
        raise DatasetNotFound(f"{what} {pattern} (the part that exists is {parent})")
    return matches


def _kind(path: str) -> str:
    if os.path.isdir(path):
        return "folder"
    if path.lower().endswith(MANIFEST_EXTENSIONS):
        return "manifest"
    if path.lower().endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")):
        raise ValueError(f"{path}: a compressed shard has no random access; decompress it to a plain .tar")
    raise ValueError(f"{path} is neither a folder, nor a {', '.join(MANIFEST_EXTENSIONS)} manifest, nor a .tar shard")


# --------------------------------------------------------------------------------------------------------- index


class IndexedFolder(NamedTuple):
    """One folder or shard of an index: the rows first..first+count-1."""

    path: str  # relative to the root of the source, "" for the root itself
    first: int
    count: int
    skipped: dict[str, int]  # files by reason


class Index:
    """The images of one source, in a fixed order, read from a memory-mapped index folder.

    Folders come in the order of their sorted relative paths, each with its files sorted by name; manifests keep their
    own order; shards come sorted, each in the order of its members. Pickles as the path of the index folder.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = os.fspath(folder)
        self.info: dict[str, Any] = json.loads(Path(folder, "index.json").read_text())
        self.root: str = self.info["root"]
        self.skipped: dict[str, int] = self.info["skipped"]
        self._root = os.fsencode(self.root)
        self._reader = _map_arrow(os.path.join(self.folder, "files.arrow"))
        self._batches = [self._reader.get_batch(i) for i in range(self._reader.num_record_batches)]
        self._codes, self._names = ([batch.column(column) for batch in self._batches] for column in (0, 1))
        self._directories = _map_arrow(os.path.join(self.folder, "directories.arrow")).read_all()
        self._directory_paths = self._directories.column("path").combine_chunks()
        self._in_shards = "offset" in self.columns

    def __reduce__(self):
        return Index, (self.folder,)

    def __len__(self) -> int:
        return self.info["images"]

    @property
    def columns(self) -> list[str]:
        """Names of the columns there are: directory, name, and what the source adds."""
        return self._reader.schema.names

    def column(self, name: str) -> pa.ChunkedArray:
        """Return one column, still memory-mapped."""
        number = self._reader.schema.get_field_index(name)
        chunks = [batch.column(number) for batch in self._batches]
        return pa.chunked_array(chunks, type=self._reader.schema.field(number).type)

    def relative_path(self, row: int) -> str:
        """Return the path of an image relative to the source's root; in a shard: shard/member."""
        return os.fsdecode(self._relative(row))

    def path(self, row: int) -> str:
        """Return the absolute path of an image; in a shard: shard/member."""
        return os.fsdecode(os.path.join(self._root, self._relative(row)))

    def relative_paths(self, rows: np.ndarray | None = None) -> Iterator[str]:
        """Yield the relative paths of all rows, or of sorted `rows`, a batch at a time."""
        directories = self._directory_paths
        for first, batch in zip(range(0, len(self), _ROWS_PER_BATCH), self._batches):
            if rows is not None:
                start, stop = np.searchsorted(rows, (first, first + batch.num_rows))
                batch = batch.take(pa.array(rows[start:stop] - first))
            folders = directories.take(batch.column(0)).to_pylist()
            for folder, name in zip(folders, batch.column(1).to_pylist()):
                yield os.fsdecode(os.path.join(folder, name))

    def read(self, row: int) -> bytes:
        """Return the content of an image file; raises UnreadableImage where the system refuses."""
        if not self._in_shards:
            return read_bytes(self.path(row))
        batch, place = divmod(row, _ROWS_PER_BATCH)
        shard = os.path.join(self._root, self._directory_paths[self._codes[batch][place].as_py()].as_py())
        offset, size = (self._batches[batch].column(name)[place].as_py() for name in ("offset", "size"))
        try:
            with open(shard, "rb", buffering=0) as file:
                content = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise UnreadableImage(self.path(row), error.strerror or str(error)) from error
        if len(content) < size:
            raise UnreadableImage(self.path(row), f"the shard ends {size - len(content)} bytes too early")
        return content

    def folders(self) -> Iterator[IndexedFolder]:
        """Yield the folders or shards, in the order of their rows; a manifest is one folder."""
        count_of = len(self) if self.info["kind"] == "manifest" else None
        for folder in self._directories.select(["path", "first", "count", "skipped"]).to_pylist():
            skipped = json.loads(folder["skipped"])
            count = folder["count"] if count_of is None else count_of
            yield IndexedFolder(os.fsdecode(folder["path"]), folder["first"], count, skipped)

    def rows_below(self, path: str) -> np.ndarray:
        """Return the sorted rows of the images in a folder, a shard, or (its own path) the whole source."""
        if self._is_whole(path):
            return np.arange(len(self))
        if self.info["kind"] == "manifest":
            return self._listed_below(os.fsencode(path))
        first, count = self._folders_below(path)
        return np.concatenate([np.arange(a, a + n) for a, n in zip(first, count)] or [np.arange(0)])

    def _listed_below(self, path: bytes) -> np.ndarray:
        """The rows of a manifest below a folder; its paths may be relative, absolute, or wind through `..`."""
        folders = pc.replace_substring_regex(self.column("name"), "[^/]*$", "").combine_chunks().dictionary_encode()
        absolute = [os.path.normpath(os.path.join(self._root, folder)) for folder in folders.dictionary.to_pylist()]
        is_below = np.array(
            [os.path.join(folder, b"").startswith(os.path.join(path, b"")) for folder in absolute], bool
        )
        return np.flatnonzero(is_below[folders.indices.to_numpy()])

    def count_below(self, path: str) -> int:
        """Return the number of `rows_below(path)`, without listing them where that can be avoided."""
        if self._is_whole(path):
            return len(self)
        if self.info["kind"] == "manifest":
            return len(self.rows_below(path))
        return int(self._folders_below(path)[1].sum())

    def _is_whole(self, path: str) -> bool:
        return path == self.root or (self.info["kind"] == "manifest" and path in self.info["paths"])

    def _prefix(self, path: str) -> bytes:
        return os.fsencode(os.path.relpath(path, self.root))

    def _folders_below(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (first row, rows) of the folders or shards at `path` and below it."""
        paths, prefix = self._directory_paths, self._prefix(path)
        below = pc.or_(pc.equal(paths, prefix), pc.starts_with(paths, prefix + b"/")).to_numpy(zero_copy_only=False)
        first, count = (self._directories.column(name).to_numpy()[below] for name in ("first", "count"))
        return first, count

    def rows_named(self, paths: Iterable[str]) -> np.ndarray:
        """Return the sorted rows of absolute `paths`; those that are not in the index are left out."""
        wanted = {os.fsencode(path) for path in paths}
        names = {os.path.basename(path) for path in wanted}
        if self.info["kind"] == "manifest":  # a name may hold folders, and may be absolute
            names = wanted | {os.fsencode(os.path.relpath(os.fsdecode(path), self.root)) for path in wanted}
        candidates = np.flatnonzero(
            pc.is_in(self.column("name"), value_set=pa.array(sorted(names), pa.binary())).to_numpy()
        )
        found = [os.path.join(self._root, os.fsencode(name)) in wanted for name in self.relative_paths(candidates)]
        return candidates[np.array(found, bool)]

    def is_fresh(self) -> bool:
        """Say whether every folder, manifest or shard still has the modification time that was recorded."""
        if self.info["kind"] == "manifest":
            return _modified(os.fsencode(self.info["paths"][0])) == self.info["mtime_ns"]
        paths = (os.path.join(self._root, path) for path in self._directory_paths.to_pylist())
        recorded = self._directories.column("mtime_ns").to_pylist()
        with ThreadPoolExecutor(_threads()) as pool:
            now = pool.map(_modified, paths, chunksize=256)
            return all(mtime == before for mtime, before in zip(now, recorded))

    def listings(self) -> dict[bytes, _Listing]:
        """Return what each folder held, by relative path: what a refresh need not list again."""
        names, extras = self.column("name"), self.columns[2:]
        found = {}
        for directory in self._directories.to_pylist():
            rows = slice(directory["first"], directory["first"] + directory["count"])
            found[directory["path"]] = _Listing(
                names=_one_chunk(names[rows]),
                extras={name: _one_chunk(self.column(name)[rows]) for name in extras},
                children=directory["children"],
                skipped=Counter(json.loads(directory["skipped"])),
                mtime_ns=directory["mtime_ns"],
                identity=directory["identity"],
            )
        return found

    def _relative(self, row: int) -> bytes:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of an index of {len(self)} images")
        batch, place = divmod(row, _ROWS_PER_BATCH)
        directory = self._directory_paths[self._codes[batch][place].as_py()].as_py()
        return os.path.join(directory, self._names[batch][place].as_py())


def _map_arrow(path: str) -> pa.ipc.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(path))


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _modified(path: bytes) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1


def _settled(mtime_ns: int, start_ns: int) -> int:
    """Return 0, which equals no modification time, for one so recent that a later change might not show in it."""
    return mtime_ns if mtime_ns < start_ns - _SETTLED_NS else 0


def _threads() -> int:
    return min(32, 4 * (os.cpu_count() or 1))  # waiting for a network file system, not computing


# ------------------------------------------------------------------------------------------------------- opening


def open_index(source: Source, *, root: str | None = None, cache_dir: str | os.PathLike | None = None) -> Index:
    """Open the index of a source, scanning it first where there is none yet or something changed.

    Args:
        source: from `find_sources`.
        root: folder that the paths of a manifest start from; by default the manifest's own.
        cache_dir: see `cache_folder`.

    Raises:
        ValueError: the source holds no image; the message says what it holds instead.
    """
    root = _root_of(source, root)
    shelf = cache_folder(cache_dir) / "index" / _shelf_name(source, root)
    old = _current(shelf)
    if old is not None and old.is_fresh():
        return old
    started = time.time()
    try:
        shelf.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot keep the index of {source} in {shelf} ({error}); set $DINOV2_CACHE") from error
    index = Index(_build(source, root, shelf, old))
    logger.info("%s: indexed %s images in %.1f s", source, f"{len(index):,}", time.time() - started)
    _refuse_empty(index, source)
    return index


def _root_of(source: Source, root: str | None) -> str:
    if source.kind == "folder":
        return source.paths[0]
    if source.kind == "manifest":
        return os.path.abspath(os.path.expanduser(root)) if root else os.path.dirname(source.paths[0])
    return os.path.commonpath([os.path.dirname(path) for path in source.paths])


def _shelf_name(source: Source, root: str) -> str:
    key = json.dumps([_FORMAT, source.kind, root, *source.paths])
    name = "".join(letter if letter.isalnum() else "-" for letter in Path(root).name)[:40]
    return f"{name}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}"


def _current(shelf: Path) -> Index | None:
    try:
        return Index(shelf / (shelf / "current").read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:  # ArrowInvalid and JSONDecodeError are ValueErrors
        logger.warning("the index in %s is damaged (%s) and is built again", shelf, error)
        return None


def _build(source: Source, root: str, shelf: Path, old: Index | None) -> Path:
    """Write a new index beside the old one and make it the current one, last and atomically."""
    stamp = f"{time.time_ns()}-{os.getpid()}"
    folder = shelf / f".{stamp}"
    folder.mkdir()
    try:
        with _Writer(folder, source, root) as writer:
            _SCANNERS[source.kind](source, root, writer, old)
        folder = folder.rename(shelf / stamp)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    pointer = shelf / f".current-{stamp}"
    pointer.write_text(stamp)
    pointer.replace(shelf / "current")
    _remove_outdated(shelf, folder)
    return folder


def _remove_outdated(shelf: Path, current: Path) -> None:
    for other in shelf.iterdir():
        with contextlib.suppress(FileNotFoundError):  # other processes build, rename and remove here, too
            if other.is_dir() and other != current and other.stat().st_mtime < time.time() - _KEEP_OLD_SECONDS:
                shutil.rmtree(other, ignore_errors=True)


def _refuse_empty(index: Index, source: Source) -> None:
    if len(index):
        return
    found = describe_counts(index.skipped) or "it is empty"
    hint = f"; for shards give {index.root}/*.tar" if index.skipped.get(".tar") else ""
    raise ValueError(f"no image in {source}: found {found}{hint}. Images are {' '.join(IMAGE_EXTENSIONS)}, in any case")


def describe_counts(counts: Mapping[str, int]) -> str:
    """Return counts as a phrase, the largest first: `.txt 12, .dcm 3`."""
    largest_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count:,}" for name, count in largest_first)


# ------------------------------------------------------------------------------------------------------- writing


@dataclass
class _Listing:
    """What one folder or shard holds."""

    names: pa.Array  # binary: file names as the system stores them, sorted
    extras: dict[str, pa.Array] = field(default_factory=dict)
    children: list[bytes] = field(default_factory=list)  # sub-folders, sorted
    skipped: Counter[str] = field(default_factory=Counter)  # files by reason
    mtime_ns: int = -1
    identity: str = ""  # device and inode: equal for two ways to the same folder


class _Writer:
    """Write files.arrow in batches of exactly _ROWS_PER_BATCH rows, so that a row number gives its batch."""

    def __init__(self, folder: Path, source: Source, root: str):
        self.folder, self.source, self.root = folder, source, root
        self.directories: list[dict] = []
        self.images = 0
        self.mtime_ns = 0  # of a manifest
        self.skipped: Counter[str] = Counter()
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._file: pa.ipc.RecordBatchFileWriter | None = None
        self._progress = tqdm(unit=" images", desc=f"scanning {source}", disable=not sys.stderr.isatty(), leave=False)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._progress.close()
        if error is None:
            self._finish()

    def add(self, path: bytes, listing: _Listing) -> None:
        """Append one folder or shard."""
        self.directories.append(
            {
                "path": path,
                "mtime_ns": listing.mtime_ns,
                "first": self.images,
                "count": len(listing.names),
                "children": listing.children,
                "skipped": json.dumps(listing.skipped),
                "identity": listing.identity,
            }
        )
        self.skipped.update(listing.skipped)
        self.add_rows(len(self.directories) - 1, listing.names, listing.extras)

    def add_rows(self, directory: int, names: pa.Array, extras: dict[str, pa.Array]) -> None:
        """Append images to a directory that was added."""
        codes = pa.array(np.full(len(names), directory, np.int32))
        table = pa.table({"directory": codes, "name": names, **extras})
        self.images += len(names)
        self._progress.update(len(names))
        self._pending.append(table)
        self._pending_rows += len(names)
        if self._pending_rows >= _ROWS_PER_BATCH:
            self._flush()

    def _flush(self, last: bool = False) -> None:
        table = pa.concat_tables(self._pending).combine_chunks()
        if self._file is None:
            self._file = pa.ipc.new_file(str(self.folder / "files.arrow"), table.schema)
        stop = table.num_rows if last else table.num_rows // _ROWS_PER_BATCH * _ROWS_PER_BATCH
        self._file.write_table(table.slice(0, stop), max_chunksize=_ROWS_PER_BATCH)
        rest = table.slice(stop)
        self._pending, self._pending_rows = [rest], rest.num_rows

    def _finish(self) -> None:
        self._flush(last=True)
        self._file.close()
        schema = pa.schema(
            [
                ("path", pa.large_binary()),
                ("mtime_ns", pa.int64()),
                ("first", pa.int64()),
                ("count", pa.int64()),
                ("children", pa.list_(pa.binary())),
                ("skipped", pa.string()),
                ("identity", pa.string()),
            ]
        )
        with pa.ipc.new_file(str(self.folder / "directories.arrow"), schema) as file:
            file.write_table(pa.Table.from_pylist(self.directories, schema))
        info = {
            "kind": self.source.kind,
            "paths": list(self.source.paths),
            "root": self.root,
            "images": self.images,
            "folders": sum(directory["count"] > 0 for directory in self.directories),
            "skipped": dict(self.skipped.most_common()),
            "mtime_ns": self.mtime_ns,
        }
        (self.folder / "index.json").write_text(json.dumps(info, indent=1))


# ------------------------------------------------------------------------------------------------------ scanning


def _scan_folder(source: Source, root: str, writer: _Writer, old: Index | None) -> None:
    known = old.listings() if old is not None else {}
    start_ns = time.time_ns()

    def list_again(relative: bytes) -> _Listing:
        path = os.path.join(os.fsencode(root), relative)
        before = known.get(relative)
        if before is not None and _modified(path) == before.mtime_ns:
            return before
        return _list_folder(path, start_ns)

    for relative, listing in _walk(list_again):
        writer.add(relative, listing)


def _walk(list_folder: Callable[[bytes], _Listing]) -> Iterator[tuple[bytes, _Listing]]:
    """Yield folders depth first in sorted order, listing the next ones ahead in threads.

    A folder that symbolic links reach a second time is passed over: loops end, and no image counts twice.
    """
    seen: set[str] = set()
    stack: list[tuple[bytes, Future | None]] = [(b"", None)]
    with ThreadPoolExecutor(_threads()) as pool:
        while stack:
            for place in range(max(0, len(stack) - _LOOKAHEAD), len(stack)):
                relative, future = stack[place]
                if future is None:
                    stack[place] = (relative, pool.submit(list_folder, relative))
            relative, future = stack.pop()
            listing = future.result()
            if listing.identity in seen:
                continue
            seen.add(listing.identity)
            yield relative, listing
            stack.extend((os.path.join(relative, child), None) for child in reversed(listing.children))


def _list_folder(path: bytes, start_ns: int) -> _Listing:
    names: list[bytes] = []
    children: list[bytes] = []
    skipped: Counter[str] = Counter()
    try:
        status = os.stat(path)
        with os.scandir(path) as entries:
            for entry in entries:
                reason = _classify(entry, children)
                if reason:
                    skipped[reason] += 1
                elif reason is None:
                    names.append(entry.name)
    except OSError as error:
        logger.warning("folder %s is left out: %s", os.fsdecode(path), error.strerror)
        skipped = Counter({"unreadable folder": 1})
        return _Listing(pa.array([], pa.binary()), skipped=skipped, identity=os.fsdecode(path))
    return _Listing(
        names=pa.array(sorted(names), pa.binary()),
        children=sorted(children),
        skipped=skipped,
        mtime_ns=_settled(status.st_mtime_ns, start_ns),
        identity=f"{status.st_dev}:{status.st_ino}",
    )


def _classify(entry: os.DirEntry, children: list[bytes]) -> str | None:
    """Return None for an image, "" for a folder (kept in `children`), or the reason to skip the entry."""
    if entry.name.startswith(b"."):  # editors' and systems' own: .ipynb_checkpoints, ._cell.jpg
        return "hidden"
    if entry.is_dir():
        children.append(entry.name)
        return ""
    extension = os.path.splitext(entry.name)[1].lower()
    if extension not in _EXTENSIONS:
        return _extension_name(extension)
    try:
        return None if entry.stat().st_size else EMPTY_FILE
    except OSError:
        return "broken link"


def _extension_name(extension: bytes) -> str:
    if not extension:
        return "no extension"
    return os.fsdecode(extension) if len(extension) <= 8 and not extension[1:].isdigit() else "other"


def _scan_shards(source: Source, root: str, writer: _Writer, old: Index | None) -> None:
    known = old.listings() if old is not None else {}
    start_ns = time.time_ns()
    for path in source.paths:
        relative = os.fsencode(os.path.relpath(path, root))
        before = known.get(relative)
        fresh = before is not None and _modified(os.fsencode(path)) == before.mtime_ns
        writer.add(relative, before if fresh else _list_shard(path, start_ns))


def _list_shard(path: str, start_ns: int) -> _Listing:
    """List the images of a tar file in the webdataset layout: `key.jpg` and, for its label, `key.cls`."""
    mtime_ns = os.stat(path).st_mtime_ns
    members: list[tuple[str, int, int]] = []
    classes: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                extension = os.path.splitext(member.name)[1].lower()
                if not member.isreg() or os.path.basename(member.name).startswith("."):
                    skipped["hidden or no file"] += not member.isdir()
                elif extension == ".cls":
                    classes[_key(member.name)] = shard.extractfile(member).read(1024).decode(errors="replace").strip()
                elif extension not in IMAGE_EXTENSIONS:
                    skipped[_extension_name(extension.encode())] += 1
                elif member.size == 0:
                    skipped[EMPTY_FILE] += 1
                else:
                    members.append((member.name, member.offset_data, member.size))
                shard.members = []  # tarfile remembers every member otherwise
    except tarfile.TarError as error:
        logger.warning("shard %s is damaged after %d images: %s", path, len(members), error)
        skipped["damaged shard"] += 1
    names, offsets, sizes = zip(*members) if members else ((), (), ())
    return _Listing(
        names=pa.array([os.fsencode(name) for name in names], pa.binary()),
        extras={
            "offset": pa.array(offsets, pa.int64()),
            "size": pa.array(sizes, pa.int64()),
            "label": pa.array([classes.get(_key(name), "") for name in names], pa.string()),
        },
        skipped=skipped,
        mtime_ns=_settled(mtime_ns, start_ns),
        identity=path,
    )


def _key(member: str) -> str:
    """Return what the files of one sample share: the path up to the first dot of the name."""
    folder, name = os.path.split(member)
    return os.path.join(folder, name.split(".", 1)[0])


def _scan_manifest(source: Source, root: str, writer: _Writer, old: Index | None) -> None:
    path = source.paths[0]
    writer.mtime_ns = _settled(_modified(os.fsencode(path)), time.time_ns())
    columns = [name for name in _manifest_columns(path).values() if name != "path"]
    writer.add(b"", _Listing(pa.array([], pa.binary()), {name: pa.array([], pa.string()) for name in columns}))
    for batch in read_manifest(path):
        names = batch["path"].cast(pa.binary())
        is_image = pc.match_substring_regex(batch["path"], _EXTENSION_PATTERN)
        for name in names.filter(pc.invert(is_image)).to_pylist():
            writer.skipped[_extension_name(os.path.splitext(name)[1].lower()) if name else "empty path"] += 1
        extras = {name: column.filter(is_image) for name, column in batch.items() if name != "path"}
        writer.add_rows(0, names.filter(is_image), extras)


def read_manifest(path: str | os.PathLike) -> Iterator[dict[str, pa.Array]]:
    """Yield the columns `path` and, where there are any, `label`, `source` and `group`, as text, a batch at a time.

    Column names count in any case; `group` may also be called `patient` or `slide`. The delimiter of a CSV (comma,
    semicolon, tab or bar) is found from its header.

    Raises:
        ValueError: no column called path, or a row that does not fit the header.
    """
    path = os.fspath(path)
    try:
        columns = _manifest_columns(path)
        if path.lower().endswith((".parquet", ".pq")):
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(columns=list(columns))
        else:
            batches = pyarrow.csv.open_csv(
                path,
                parse_options=pyarrow.csv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True),
                convert_options=pyarrow.csv.ConvertOptions(
                    include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string())
                ),
            )
        for batch in batches:
            yield {name: pc.fill_null(batch.column(given).cast(pa.string()), "") for given, name in columns.items()}
    except pa.ArrowException as error:
        raise ValueError(f"{path}: {error}") from error


def _manifest_columns(path: str) -> dict[str, str]:
    """Return {name in the file: our name} for the columns that count."""
    if path.lower().endswith((".parquet", ".pq")):
        given = pyarrow.parquet.read_schema(path).names
    else:
        given = _header(path).split(_delimiter(path))
    lowered = {name.strip().strip('"').lower(): name.strip("\r\n").strip('"') for name in given}
    if "path" not in lowered:
        raise ValueError(f"{path}: no column `path`; its columns are {', '.join(map(str.strip, given))}")
    group = next((name for name in _GROUP_COLUMNS if name in lowered), None)
    wanted = {"path": "path", "label": "label", "source": "source", **({group: "group"} if group else {})}
    return {lowered[name]: ours for name, ours in wanted.items() if name in lowered}


def _header(path: str) -> str:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.readline()


def _delimiter(path: str) -> str:
    header = _header(path)
    return max(",;\t|", key=header.count)


_SCANNERS = {"folder": _scan_folder, "shards": _scan_shards, "manifest": _scan_manifest}


# ------------------------------------------------------------------------------------------------- several sources


class Catalog:
    """The images of several sources, numbered through in the order of the sources."""

    def __init__(self, sources: Sequence[Source], indexes: Sequence[Index]):
        self.sources, self.indexes = list(sources), list(indexes)
        self.starts = np.cumsum([0, *(len(index) for index in indexes)])

    @classmethod
    def open(cls, root, *, manifest_root: str | None = None, cache_dir: str | os.PathLike | None = None) -> Catalog:
        """Open or build the index of every source of `root`; see `find_sources` and `open_index`."""
        sources = find_sources(root)
        return cls(sources, [open_index(source, root=manifest_root, cache_dir=cache_dir) for source in sources])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, row: int) -> tuple[Index, int]:
        """Return the index that holds a row, and the row within it."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.indexes[number], int(row - self.starts[number])

    def path(self, row: int) -> str:
        """Return the absolute path of an image."""
        index, row = self.locate(row)
        return index.path(row)

    def read(self, row: int) -> bytes:
        """Return the content of an image file."""
        index, row = self.locate(row)
        return index.read(row)

    def rows_below(self, path: str) -> np.ndarray:
        """Return the sorted rows of the images in a folder, shard or source."""
        return self._gather(lambda index: index.rows_below(path))

    def count_below(self, path: str) -> int:
        """Return the number of images in a folder, shard or source."""
        return sum(index.count_below(path) for index in self.indexes)

    def rows_named(self, paths: Iterable[str]) -> np.ndarray:
        """Return the sorted rows of absolute paths."""
        paths = list(paths)
        return self._gather(lambda index: index.rows_named(paths))

    def _gather(self, rows_of: Callable[[Index], np.ndarray]) -> np.ndarray:
        return np.concatenate([rows_of(index) + start for index, start in zip(self.indexes, self.starts)])


class PathList(Sequence[str]):
    """The absolute paths of some rows of a catalog: a sequence that reads each path when it is asked for.

    Args:
        catalog: where the rows are.
        rows: sorted row numbers, or the `.npy` file that holds them, which is mapped and pickles as its path;
            None stands for all rows.
    """

    def __init__(self, catalog: Catalog, rows: np.ndarray | Path | None = None):
        self.catalog = catalog
        self.rows = np.load(rows, mmap_mode="r") if isinstance(rows, Path) else rows
        self._file = rows if isinstance(rows, Path) else None

    def __reduce__(self):
        return PathList, (self.catalog, self._file or self.rows)

    def __len__(self) -> int:
        return len(self.catalog) if self.rows is None else len(self.rows)

    def __getitem__(self, item):
        if isinstance(item, slice):
            rows = np.arange(len(self))[item] if self.rows is None else self.rows[item]
            return PathList(self.catalog, rows)
        return self.catalog.path(self.row(item))

    def __repr__(self) -> str:
        return f"<{len(self):,} paths{f', the first {self[0]!r}' if len(self) else ''}>"

    def row(self, item: int) -> int:
        """Return the row of the catalog that position `item` stands for."""
        position = range(len(self))[item]  # negative positions, and the IndexError
        return position if self.rows is None else int(self.rows[position])

    def read(self, item: int) -> bytes:
        """Return the content of the image file at position `item`."""
        return self.catalog.read(self.row(item))
