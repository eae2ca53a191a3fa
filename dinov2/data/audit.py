"""`dinov2 check`: read every image of a data set and report what is wrong with it, before a run finds out.

Exit code 0: nothing that would hurt training. 1: something would (see `PROBLEMS`). 2: wrong arguments or no data.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from .datasets.custom_image_datasets import read_path_list
from .decode import UnreadableImage, decode_channels, decode_rgb, read_header, sniff, to_uint8
from .duplicates import groups_of_equals, groups_of_neighbours, perceptual_hash
from .loaders import resolve_num_workers
from .manifest import EMPTY_FILE, Catalog, cache_folder, describe_counts, find_sources, open_index
from .statistics import ChannelStatistics, combine_moments, image_moments

_CHUNK = 32  # images per task
_BLANK_DEVIATION = 2.0  # standard deviation of the brightness, of 255, below which nothing is on an image
_SMALLEST_SIDE = 32  # pixels
_SIZE_FACTOR = 16  # an image of this many times more, or fewer, pixels than the median one is extreme
_ASPECT = 3.0  # longer side over shorter side
_EXTENSIONS = {
    "jpeg": (".jpg", ".jpeg"),
    "png": (".png",),
    "tiff": (".tif", ".tiff"),
    "bmp": (".bmp",),
    "webp": (".webp",),
    "gif": (),
}


class Problem(NamedTuple):
    """A kind of finding."""

    title: str
    hurts: bool  # makes the exit code 1
    exclude: bool  # its images go into the exclude list
    meaning: str


PROBLEMS: dict[str, Problem] = {
    "unreadable": Problem("Unreadable", True, True, "The file gives no pixels; training would skip it each time."),
    "truncated": Problem("Truncated", True, True, "The file ends too early, as after a broken copy. Copy it again."),
    "empty": Problem("Empty files", True, False, "0 bytes: an image was lost. Training never sees these files."),
    "bomb": Problem("Too large to decode", True, True, "More pixels than any cell image has; refused unread."),
    "blank": Problem("Blank", True, True, "One even colour: nothing to learn, and identical features upset KoLeo."),
    "leak": Problem("In training and held out", True, True, "The same image on both sides flatters every score."),
    "duplicate": Problem("Exact duplicates", True, True, "The same bytes again. The first copy is kept."),
    "near_duplicate": Problem(
        "Near duplicates", False, False, "Look alike: re-encoded, rescaled or neighbouring crops."
    ),
    "wrong_extension": Problem("Wrong extension", False, False, "The content is of another format; it is read anyway."),
    "no_end": Problem("No end marker", False, False, "A JPEG without its last two bytes; the pixels are complete."),
    "deep": Problem("More than 8 bits", False, False, "Rescaled to 8 bits when read as RGB; see docs/data.md."),
    "cmyk": Problem("CMYK", False, False, "Meant for print; converted to RGB."),
    "alpha": Problem("Transparency", False, False, "Composited on white."),
    "frames": Problem("Animated or several pages", False, False, "The first frame or page is used."),
    "rotated": Problem("EXIF rotation", False, False, "Turned upright when read."),
    "small": Problem(
        "Very small", False, False, f"A side under {_SMALLEST_SIDE} pixels, or far fewer than the median."
    ),
    "large": Problem("Very large", False, False, f"Over {_SIZE_FACTOR} times the pixels of the median image."),
    "elongated": Problem(
        "Elongated", False, False, f"One side over {_ASPECT:g} times the other; crops will distort it."
    ),
}
_BIT = {code: np.uint32(1 << number) for number, code in enumerate(PROBLEMS)}
NO_PIXELS = ("unreadable", "truncated", "empty", "bomb")  # problems of files that cannot be shown


# ------------------------------------------------------------------------------------------------ one image's record


def record_type(channels: int) -> np.dtype:
    """Return the fixed-size record that is kept of each image."""
    fields = [("row", "<i8"), ("bytes", "<i8"), ("width", "<i4"), ("height", "<i4"), ("flags", "<u4")]
    fields += [("sha256", "<u8", (2,)), ("phash", "<u8"), ("format", "S4")]  # the first 128 bits of the digest
    return np.dtype([*fields, ("mean", "<f4", (channels,)), ("square", "<f4", (channels,))])


def examine(data: bytes, path: str, channels: int = 3) -> tuple[np.ndarray, str]:
    """Return the record of one image file and the reason why it cannot be read, "" where it can."""
    record = np.zeros((), record_type(channels))
    record["bytes"] = len(data)
    record["sha256"] = np.frombuffer(hashlib.sha256(data).digest()[:16], "<u8")
    try:
        header = read_header(data, path=path)
        image = decode(data, path, channels)
    except UnreadableImage as problem:
        record["flags"] = _BIT[_unreadable_kind(data, problem.reason)]
        return record, problem.reason
    preview = to_preview(image)
    record["format"] = header.format
    record["height"], record["width"] = image.shape[:2]
    record["phash"] = perceptual_hash(preview)
    record["mean"], record["square"] = image_moments(image)
    odd = {
        "blank": cv2.meanStdDev(cv2.cvtColor(preview, cv2.COLOR_RGB2GRAY))[1].item() < _BLANK_DEVIATION,
        "wrong_extension": os.path.splitext(path)[1].lower() not in _EXTENSIONS[header.format],
        "no_end": header.format == "jpeg" and b"\xff\xd9" not in data[-64:],
        "deep": header.bits > 8,
        "cmyk": header.mode.startswith(("CMYK", "SEPARATED")),
        "alpha": header.alpha,
        "frames": header.frames > 1 and channels == 3,
        "rotated": header.orientation != 1,
    }
    record["flags"] = sum(int(_BIT[code]) for code, found in odd.items() if found)
    return record, ""


def decode(data: bytes, path: str, channels: int) -> np.ndarray:
    """Decode as RGB for three channels, else with the channels as stored."""
    return decode_rgb(data, path=path) if channels == 3 else decode_channels(data, path=path, channels=channels)


def _unreadable_kind(data: bytes, reason: str) -> str:
    if "bomb" in reason or " GiB" in reason:
        return "bomb"
    kind = sniff(data)
    cut = "truncated" in reason.lower()
    cut |= kind == "png" and b"IEND" not in data[-32:]
    cut |= kind == "webp" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    cut |= kind == "bmp" and int.from_bytes(data[2:6], "little") > len(data)
    return "truncated" if cut else "unreadable"


def to_preview(image: np.ndarray) -> np.ndarray:
    """Return any image as uint8 RGB: itself, its first three channels, or its first one as gray."""
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return image
    planes = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
    return np.ascontiguousarray(to_uint8(planes))


# ------------------------------------------------------------------------------------------------- all images' records


class Records:
    """The records of an audit, appended to files as they come, so that memory stays flat and a stop costs nothing.

    Args:
        folder: where they are kept; it is named after the indexes, so that a changed data set starts afresh.
        channels: per image.
        resume: go on with the records that are there.
    """

    def __init__(self, folder: Path, channels: int, resume: bool):
        self.dtype = record_type(channels)
        self.file, self.reasons_file = folder / f"records-{channels}.bin", folder / f"reasons-{channels}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            self.file.unlink(missing_ok=True)
            self.reasons_file.unlink(missing_ok=True)
        whole = self.file.stat().st_size // self.dtype.itemsize * self.dtype.itemsize if self.file.exists() else 0
        with open(self.file, "ab") as file:
            file.truncate(whole)  # of a record that was being written

    def append(self, records: np.ndarray, reasons: dict[int, str]) -> None:
        """Keep the records of one chunk; the reasons first, so that no record lacks its own."""
        if reasons:
            with open(self.reasons_file, "a", encoding="utf-8") as file:
                file.writelines(json.dumps([row, reason]) + "\n" for row, reason in reasons.items())
        with open(self.file, "ab") as file:
            file.write(records.tobytes())

    def load(self) -> np.ndarray:
        """Return all records, memory-mapped, in the order in which they came."""
        if not self.file.stat().st_size:
            return np.empty(0, self.dtype)
        return np.memmap(self.file, self.dtype, mode="r")

    def reasons(self) -> dict[int, str]:
        """Return {row: why it cannot be read}."""
        if not self.reasons_file.exists():
            return {}
        with open(self.reasons_file, encoding="utf-8") as file:
            return dict(json.loads(line) for line in file if line.endswith("\n"))


_catalog: Catalog | None = None  # of a worker process
_channels = 3


def _start_worker(catalog: Catalog, channels: int) -> None:
    global _catalog, _channels
    _catalog, _channels = catalog, channels
    cv2.setNumThreads(1)


def _examine_rows(rows: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
    records = np.empty(len(rows), record_type(_channels))
    reasons: dict[int, str] = {}
    for place, row in enumerate(rows.tolist()):
        path = _catalog.path(row)
        try:
            records[place], reason = examine(_catalog.read(row), path, _channels)
        except UnreadableImage as problem:  # the system refuses to read the file
            records[place], reason = _unread(), problem.reason
        records[place]["row"] = row
        if reason:
            reasons[row] = reason
    return records, reasons


def _unread() -> np.ndarray:
    record = np.zeros((), record_type(_channels))
    record["flags"] = _BIT["unreadable"]
    return record


def examine_all(catalog: Catalog, rows: np.ndarray, channels: int, workers: int) -> Iterator:
    """Yield (records, reasons) of chunks of rows, examined in `workers` processes, or in this one for 0."""
    chunks = (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))
    _start_worker(catalog, channels)  # here too: it records the files that end a worker
    if workers == 0:
        yield from map(_examine_rows, chunks)
        return
    pending: dict[Future, np.ndarray] = {}
    pool = _new_pool(catalog, channels, workers)
    try:
        while True:
            while len(pending) < 2 * workers and (chunk := next(chunks, None)) is not None:
                pending[pool.submit(_examine_rows, chunk)] = chunk
            if not pending:
                return
            try:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    del pending[future]
                    yield result
            except BrokenProcessPool:
                lost = list(pending.values())
                pending.clear()
                pool.shutdown(wait=False)
                yield from _one_by_one(catalog, channels, np.concatenate(lost))
                pool = _new_pool(catalog, channels, workers)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _one_by_one(catalog: Catalog, channels: int, rows: np.ndarray) -> Iterator:
    """Examine each row alone after a worker process died, to find the file that killed it."""
    pool = _new_pool(catalog, channels, 1)
    for row in rows:
        try:
            yield pool.submit(_examine_rows, np.array([row])).result()
        except BrokenProcessPool:
            pool = _new_pool(catalog, channels, 1)
            record = _unread()
            record["row"] = row
            yield record[None], {int(row): "ends the process that reads it (out of memory?)"}
    pool.shutdown()


def _new_pool(catalog: Catalog, channels: int, workers: int) -> ProcessPoolExecutor:
    # Forked workers share the imported libraries' memory; they run no threads that a fork could lose.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    return ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(catalog, channels))


# ------------------------------------------------------------------------------------------------------- conclusions


@dataclass
class FolderReport:
    """One folder: its images, their sizes and colour."""

    path: str
    images: int
    problems: int
    megabytes: float
    median_size: tuple[int, int]  # width, height, pixels
    mean: list[float]  # per channel, 0..1


@dataclass
class Audit:
    """What an audit found. Rows are those of `catalog`, which the paths of `empty` are not part of."""

    catalog: Catalog
    records: np.ndarray  # sorted by row
    reasons: dict[int, str]
    findings: dict[str, np.ndarray] = field(default_factory=dict)  # code -> sorted rows
    groups: dict[str, list[np.ndarray]] = field(default_factory=dict)  # of duplicate, near_duplicate and leak
    empty: list[str] = field(default_factory=list)
    held_out: np.ndarray | None = None  # sorted rows
    folders: list[FolderReport] = field(default_factory=list)
    statistics: ChannelStatistics | None = None
    seconds: float = 0.0

    @property
    def hurts(self) -> bool:
        """Say whether anything was found that would hurt training."""
        return any(PROBLEMS[code].hurts for code in self.counts)

    @property
    def counts(self) -> dict[str, int]:
        """Images per kind of problem, in the order of PROBLEMS; kinds that were not found are left out."""
        counts = {code: len(rows) for code, rows in self.findings.items()} | {"empty": len(self.empty)}
        return {code: counts[code] for code in PROBLEMS if counts.get(code)}

    def detail(self, code: str, row: int) -> str:
        """Return what is worth saying of one image in a list of problems."""
        if row in self.reasons:
            return self.reasons[row]
        if code in self.groups:
            return f"like {self.catalog.path(self._twins[code][row])}"
        record = self.records[np.searchsorted(self.records["row"], row)]
        size = f"{record['width']} x {record['height']}"
        return f"{record['format'].decode()}, {size}" if code == "wrong_extension" else size

    @cached_property
    def _twins(self) -> dict[str, dict[int, int]]:
        """For each image of a group another one of it."""
        twins: dict[str, dict[int, int]] = {code: {} for code in self.groups}
        for code, groups in self.groups.items():
            for group in groups:
                first, second = int(group[0]), int(group[1])
                twins[code].update({int(row): first for row in group[1:]} | {first: second})
        return twins

    def excluded(self) -> dict[str, np.ndarray]:
        """Return {code: rows} to leave out of training: of duplicates all but the first, of leaks the training side."""
        rows = {code: found for code, found in self.findings.items() if PROBLEMS[code].exclude}
        if "duplicate" in rows:
            rows["duplicate"] = np.sort(np.concatenate([group[1:] for group in self.groups["duplicate"]]))
        if self.held_out is not None:
            rows = {code: np.setdiff1d(found, self.held_out) for code, found in rows.items()}
        return {code: found for code, found in rows.items() if len(found)}


def conclude(
    catalog: Catalog, records: np.ndarray, reasons: dict[int, str], held_out: np.ndarray | None = None
) -> Audit:
    """Turn the records of all images into findings."""
    records = records[np.unique(records["row"], return_index=True)[1]]
    audit = Audit(catalog, records, reasons, held_out=held_out, empty=list(_empty_files(catalog)))
    found = {code: records["row"][(records["flags"] & bit) > 0] for code, bit in _BIT.items()}
    has_pixels = ~np.isin(records["row"], np.concatenate([found[code] for code in NO_PIXELS]))
    seen = records[has_pixels]
    found |= _extreme_sizes(seen)
    audit.groups["duplicate"] = _exact_groups(seen)
    audit.groups["near_duplicate"] = _near_groups(seen, audit.groups["duplicate"], found["blank"])
    if held_out is not None:
        both = [*audit.groups["duplicate"], *audit.groups["near_duplicate"]]
        audit.groups["leak"] = [group for group in both if 0 < np.isin(group, held_out).sum() < len(group)]
    for code, groups in audit.groups.items():
        found[code] = np.unique(np.concatenate([*groups, np.arange(0)]))
    audit.findings = {code: found[code] for code in PROBLEMS if len(found.get(code, ()))}
    if len(seen):
        mean, std = combine_moments(seen["mean"], seen["square"])
        unreadable = len(records) - len(seen)
        audit.statistics = ChannelStatistics(tuple(mean.tolist()), tuple(std.tolist()), len(seen), unreadable)
    audit.folders = _folder_reports(audit)
    return audit


def _extreme_sizes(seen: np.ndarray) -> dict[str, np.ndarray]:
    if not len(seen):
        return {}
    width, height = seen["width"].astype(np.int64), seen["height"].astype(np.int64)
    area, shorter, longer = width * height, np.minimum(width, height), np.maximum(width, height)
    median = np.median(area)
    extreme = {
        "small": (shorter < _SMALLEST_SIDE) | (area * _SIZE_FACTOR < median),
        "large": area > median * _SIZE_FACTOR,
        "elongated": longer > _ASPECT * shorter,
    }
    return {code: seen["row"][mask] for code, mask in extreme.items()}


def _exact_groups(seen: np.ndarray) -> list[np.ndarray]:
    keys = np.ascontiguousarray(seen["sha256"]).view([("high", "<u8"), ("low", "<u8")]).ravel()
    return [seen["row"][group] for group in groups_of_equals(keys)]


def _near_groups(seen: np.ndarray, exact: list[np.ndarray], blank: np.ndarray) -> list[np.ndarray]:
    """Return groups that look alike; of exact copies only the first takes part, blank images do not."""
    copies = np.concatenate([*(group[1:] for group in exact), np.arange(0)])
    candidates = seen[~np.isin(seen["row"], np.concatenate([copies, blank]))]
    return [candidates["row"][group] for group in groups_of_neighbours(candidates["phash"])]


def _empty_files(catalog: Catalog) -> Iterator[str]:
    """Yield the files of 0 bytes, which the index leaves out."""
    for index in catalog.indexes:
        for folder in index.folders() if index.info["kind"] == "folder" and index.skipped.get(EMPTY_FILE) else ():
            if folder.skipped.get(EMPTY_FILE):
                yield from _empty_in(os.path.join(index.root, folder.path))


def _empty_in(folder: str) -> Iterator[str]:
    known = {extension for extensions in _EXTENSIONS.values() for extension in extensions}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if os.path.splitext(entry.name)[1].lower() in known and entry.is_file() and not entry.stat().st_size:
                yield entry.path


def _folder_reports(audit: Audit) -> list[FolderReport]:
    rows = audit.records["row"]
    bad = np.unique(np.concatenate([*audit.findings.values(), np.arange(0)]))
    reports = []
    for index, start in zip(audit.catalog.indexes, audit.catalog.starts):
        for folder in index.folders():
            first, last = np.searchsorted(rows, [start + folder.first, start + folder.first + folder.count])
            records = audit.records[first:last]
            seen = records[records["width"] > 0]
            if len(records):
                reports.append(
                    FolderReport(
                        path=os.path.join(index.root, folder.path).rstrip(os.sep),
                        images=len(records),
                        problems=int(np.isin(records["row"], bad).sum()),
                        megabytes=float(records["bytes"].sum() / 1e6),
                        median_size=tuple(
                            int(np.median(seen[side])) if len(seen) else 0 for side in ("width", "height")
                        ),
                        mean=seen["mean"].mean(0, dtype=np.float64).tolist() if len(seen) else [],
                    )
                )
    return reports


# ---------------------------------------------------------------------------------------------------------- outputs


def summary_lines(audit: Audit) -> Iterator[str]:
    """Yield what the terminal shows."""
    megabytes = audit.records["bytes"].sum(dtype=np.int64) / 1e6
    speed = len(audit.records) / max(audit.seconds, 1e-9)
    what = f"{len(audit.records):,} images, {megabytes:,.0f} MB, in {len(audit.folders):,} folder(s)"
    yield f"{what}, read in {audit.seconds:.1f} s ({speed:,.0f}/s)"
    for index in audit.catalog.indexes:
        if others := {name: count for name, count in index.skipped.items() if name != EMPTY_FILE}:
            yield f"skipped in {index.root}: {describe_counts(others)}"
    for hurts, title in ((True, "would hurt training"), (False, "worth knowing")):
        lines = [(code, count) for code, count in audit.counts.items() if PROBLEMS[code].hurts == hurts]
        if lines:
            yield f"\n{title}:"
        for code, count in lines:
            example = audit.empty[0] if code == "empty" else audit.catalog.path(int(audit.findings[code][0]))
            detail = "" if code == "empty" else f" ({audit.detail(code, int(audit.findings[code][0]))})"
            yield f"  {count:>8,}  {PROBLEMS[code].title.lower():<26} {example}{detail}"
    if not audit.counts:
        yield "nothing is wrong with them"
    if audit.statistics:
        yield f"\nfor the config:\n{audit.statistics}"


def as_dict(audit: Audit) -> dict:
    """Return everything that was found, fit for JSON."""
    paths = audit.catalog.path
    problems = {}
    for code, count in audit.counts.items():
        rows = audit.findings.get(code, np.arange(0)).tolist()
        images = [{"path": paths(row), "detail": audit.detail(code, row)} for row in rows]
        images += [{"path": path, "detail": "0 bytes"} for path in audit.empty if code == "empty"]
        problems[code] = {"hurts": PROBLEMS[code].hurts, "count": count, "images": images}
    return {
        "sources": [str(source) for source in audit.catalog.sources],
        "images": len(audit.records),
        "bytes": int(audit.records["bytes"].sum(dtype=np.int64)),
        "hurts": audit.hurts,
        "problems": problems,
        "groups": {
            code: [[paths(int(row)) for row in group] for group in groups] for code, groups in audit.groups.items()
        },
        "statistics": audit.statistics._asdict() if audit.statistics else None,
        "folders": [vars(folder) for folder in audit.folders],
    }


def write_json(audit: Audit, path: str) -> None:
    """Write everything that was found."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(as_dict(audit), file, indent=1)


def write_csv(audit: Audit, path: str) -> None:
    """Write one line per finding: problem, whether it hurts, path, detail."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["problem", "hurts", "path", "detail"])
        for code, problem in as_dict(audit)["problems"].items():
            writer.writerows(
                [code, int(problem["hurts"]), image["path"], image["detail"]] for image in problem["images"]
            )


def write_exclude_list(audit: Audit, path: str) -> int:
    """Write the images to leave out of training, as `train.exclude` takes them; return how many."""
    written: set[int] = set()
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write("# images to leave out of training, by `dinov2 check`; use it with train.exclude\n")
        for code, rows in audit.excluded().items():
            new = [row for row in rows.tolist() if row not in written]
            file.write(f"# {PROBLEMS[code].title}: {len(new)}\n")
            file.writelines(f"{audit.catalog.path(row)}\n" for row in new)
            written.update(new)
    return len(written)


# ------------------------------------------------------------------------------------------------------------- command


def check(
    folders: Sequence[str],
    *,
    held_out: Sequence[str] = (),
    channels: int = 3,
    workers: int = 0,
    resume: bool = False,
    cache_dir: str | None = None,
) -> Audit:
    """Examine every image of a data set.

    Args:
        folders: whatever `find_sources` takes.
        held_out: folders, or text files of paths, of images that training must not see: those that also occur among
            the others are reported as leaks. They are examined, too.
        channels: 3 reads files as RGB, any other number as that many channels.
        workers: processes; 0 works in this one.
        resume: go on where an interrupted check of the same, unchanged data stopped.
        cache_dir: for the index and the records.

    Raises:
        ValueError: no such folder, or no image in it.
    """
    started = time.time()
    catalog, held_out_rows = _open(folders, held_out, cache_dir)
    key = hashlib.sha256("\n".join(index.folder for index in catalog.indexes).encode()).hexdigest()[:24]
    records = Records(cache_folder(cache_dir) / "audit" / key, channels, resume)
    todo = np.ones(len(catalog), bool)
    todo[records.load()["row"]] = False
    rows = np.flatnonzero(todo)
    results = examine_all(catalog, rows, channels, workers)
    bar = tqdm(total=len(catalog), initial=len(catalog) - len(rows), unit=" images", disable=not sys.stderr.isatty())
    with bar:
        for chunk, reasons in results:
            records.append(chunk, reasons)
            bar.update(len(chunk))
    audit = conclude(catalog, records.load(), records.reasons(), held_out_rows)
    audit.seconds = time.time() - started
    return audit


def _open(folders: Sequence[str], held_out: Sequence[str], cache_dir: str | None) -> tuple[Catalog, np.ndarray | None]:
    """Return one catalog of everything, and the rows that are held out."""
    sources = find_sources(folders)
    lists = [path for path in held_out if path.endswith(".txt")]
    for source in find_sources([path for path in held_out if path not in lists]) if len(held_out) > len(lists) else ():
        if not any(_within(source.paths[0], known.paths[0]) for known in sources):
            sources.append(source)
    catalog = Catalog(sources, [open_index(source, cache_dir=cache_dir) for source in sources])
    if not held_out:
        return catalog, None
    rows = [catalog.rows_named(read_path_list(path)) for path in lists]
    rows += [catalog.rows_below(os.path.abspath(path)) for path in held_out if path not in lists]
    return catalog, np.unique(np.concatenate(rows))


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + os.sep)


def get_args_parser(
    add_help: bool = True, parents: Iterable[argparse.ArgumentParser] | None = None
) -> argparse.ArgumentParser:
    """Return the parser of `dinov2 check`."""
    parser = argparse.ArgumentParser(
        "dinov2 check",
        description="Read every image of a data set and report what is wrong with it. Exit code 1: something was found "
        "that would hurt training.",
        add_help=add_help,
        parents=list(parents or []),
    )
    add = parser.add_argument
    add("data", nargs="+", metavar="DIR", help="folders, manifests (.csv, .parquet) or shards (.tar) of images")
    add("--held-out", nargs="+", default=[], metavar="DIR", help="folders or lists of images kept out of training")
    add("--report", metavar="FILE", help="write a page to look at, with pictures (.html)")
    add("--json", nargs="?", const="check.json", metavar="FILE", help="write everything found (default: %(const)s)")
    add("--csv", nargs="?", const="check.csv", metavar="FILE", help="write one line per finding (default: %(const)s)")
    add("--exclude-list", metavar="FILE", help="write the images to leave out, for train.exclude")
    add("--workers", type=int, default=None, metavar="N", help="processes (default: one per CPU; 0: this one)")
    add("--resume", action="store_true", help="go on where an interrupted check stopped")
    add("--show-crops", type=int, default=0, metavar="N", help="draw what the model sees of N images into the report")
    add("--config-file", metavar="FILE", help="training config whose crops and augmentations --show-crops draws")
    add("--in-chans", type=int, default=3, metavar="C", help="channels to read, as student.in_chans (default: 3)")
    add("--cache-dir", metavar="DIR", help="for index and results (default: $DINOV2_CACHE or ~/.cache/dinov2)")
    return parser


def _prepare(args: argparse.Namespace) -> None:
    """Find out that something cannot be written or drawn before hours of reading, not after."""
    for path in filter(None, (args.report, args.json, args.csv, args.exclude_list)):
        Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    if args.config_file:
        from .report import make_augmentation  # imports what the check itself does not need

        make_augmentation(args.config_file)


def main(argv: list[str] | None = None) -> int:
    """Run `dinov2 check` and return its exit code."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    try:
        _prepare(args)
        audit = check(
            args.data,
            held_out=args.held_out,
            channels=args.in_chans,
            workers=resolve_num_workers("auto") if args.workers is None else args.workers,
            resume=args.resume,
            cache_dir=args.cache_dir,
        )
    except ValueError as error:
        parser.exit(2, f"dinov2 check: {error}\n")
    print("\n".join(summary_lines(audit)).encode(errors="backslashreplace").decode())  # names need not be UTF-8
    if args.report or args.show_crops:
        from .report import write_report

        path = args.report or "check.html"
        write_report(audit, path, show_crops=args.show_crops, config_file=args.config_file)
        print(f"\nreport: {path}")
    if args.json:
        write_json(audit, args.json)
    if args.csv:
        write_csv(audit, args.csv)
    if args.exclude_list:
        print(
            f"{write_exclude_list(audit, args.exclude_list):,} images to leave out: train.exclude={args.exclude_list}"
        )
    return int(audit.hurts)
