"""The index at scale: what 10^5 to 10^8 paths cost to scan, to open, to look up and to shuffle.

    python benchmarks/index.py --largest 8 --write docs/benchmarks.md

Two things are measured apart. Scanning reads real folders of (hard-linked) files on the local disk. Growth uses the
same code with listings that are made up, so that 10^8 paths need no 10^8 files. Memory is that of a fresh process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa
from sections import table, write_section

from dinov2.data import manifest
from dinov2.data.manifest import Catalog, PathList, find_sources, open_index
from dinov2.data.samplers import PermutedStream

FILES_PER_FOLDER = 10_000
LOOKUPS = 20_000


def megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


class Took(NamedTuple):
    """Seconds on the clock, and of all CPUs: the second does not grow when other programs run."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:.3g} s ({self.cpu:.2g})"


def timed(function: Callable) -> tuple[Took, object]:
    started, cpu_started = time.perf_counter(), time.process_time()
    result = function()
    return Took(time.perf_counter() - started, time.process_time() - cpu_started), result


def names_of(folder: int) -> list[str]:
    return [f"cell_{folder:05d}_{i:05d}.jpg" for i in range(FILES_PER_FOLDER)]


def made_up_listing(folders: int) -> Callable:
    """Return a stand-in for the reading of a folder: a root with `folders` sub-folders of FILES_PER_FOLDER names."""

    def list_folder(path: bytes, start_ns: int) -> manifest._Listing:
        name = os.path.basename(path)
        if not name.startswith(b"slide_"):
            children = [f"slide_{i:05d}".encode() for i in range(folders)]
            return manifest._Listing(pa.array([], pa.binary()), children=children, mtime_ns=1, identity="root")
        names = pa.array([name.encode() for name in names_of(int(name[6:]))], pa.binary())
        return manifest._Listing(names, mtime_ns=1, identity=name.decode())

    return list_folder


def in_process(function: Callable, *arguments, fork: bool = False) -> dict[str, float]:
    """Call a function in a fresh (or forked) process; return its seconds and what it added to that process's memory."""
    context = multiprocessing.get_context("fork" if fork else "spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (function, *arguments))


def _measure(function: Callable, *arguments) -> dict[str, float]:
    before, private_before = psutil.Process().memory_full_info().uss, private_dirty()
    seconds, kept = timed(lambda: function(*arguments))
    return {
        "seconds": seconds.cpu,
        "uss": max(0, psutil.Process().memory_full_info().uss - before),
        "dirty": max(0, private_dirty() - private_before),
        "kept": kept is not None,
    }


def look_up(pickled: bytes, count: int) -> None:
    paths = pickle.loads(pickled)
    for row in np.random.default_rng(0).integers(0, count, LOOKUPS).tolist():
        paths[row]


def draw_from_stream(count: int) -> None:
    stream = PermutedStream(count, seed=0)
    for start in range(0, 64_000, 64):
        stream[np.arange(start, start + 64)]


def permute(count: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(count)


def read_list(_: int) -> None:
    sum(map(len, the_list))


the_list: list[str] = []


def private_dirty() -> int:
    """Memory of this process that nobody shares and that cannot be dropped, bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))


def scan_real_files(work: Path, count: int) -> list[str]:
    """Time the first scan, the check for changes and the refresh of `count` real files."""
    root = work / "files"
    folders = count // 1000
    root.mkdir()
    for folder in range(folders):
        inside = root / f"slide_{folder:05d}"
        inside.mkdir()
        original = work / f"cell_{folder // 50}.jpg"  # file systems limit the links to one file
        original.write_bytes(b"x")
        for i in range(1000):
            os.link(original, inside / f"cell_{folder:05d}_{i:05d}.jpg")
    for path in (root, *root.iterdir()):
        os.utime(path, (time.time() - 3600,) * 2)
    source = find_sources(root)[0]
    scan, _ = timed(lambda: open_index(source))
    check, _ = timed(lambda: open_index(source))
    (root / "slide_00000" / "new.jpg").write_bytes(b"x")
    refresh, _ = timed(lambda: open_index(source))
    shutil.rmtree(root)
    return [f"{count:,}", f"{folders:,}", str(scan), str(check), str(refresh)]


def grow(work: Path, count: int) -> list[str]:
    """Measure one size of a made-up data set."""
    root = work / f"made_up_{count}"
    root.mkdir()
    source = find_sources(root)[0]
    with mock.patch.object(manifest, "_list_folder", made_up_listing(count // FILES_PER_FOLDER)):
        build, index = timed(lambda: open_index(source))
    size = sum(file.stat().st_size for file in Path(index.folder).iterdir())
    folder = index.folder
    del index
    opened, index = timed(lambda: manifest.Index(folder))
    paths = PathList(Catalog([source], [index]))
    worker = in_process(look_up, pickle.dumps(paths), count)
    shuffle = in_process(draw_from_stream, count)
    shutil.rmtree(Path(folder).parent)
    return [
        f"{count:,}",
        str(build),
        megabytes(size),
        f"{size / count:.0f} B",
        f"{1e3 * opened.wall:.1f} ms",
        f"{1e6 * worker['seconds'] / LOOKUPS:.1f} µs",
        megabytes(worker["dirty"]),
        megabytes(worker["uss"]),
        f"{len(pickle.dumps(paths)):,} B",
        megabytes(shuffle["dirty"]),
    ]


def python_list(count: int) -> list[str]:
    """Measure the same paths as a list of strings, and a forked worker that reads all of them."""
    before = psutil.Process().memory_full_info().uss
    folders = range(count // FILES_PER_FOLDER)
    build, _ = timed(
        lambda: the_list.extend(f"/data/slide_{folder:05d}/{name}" for folder in folders for name in names_of(folder))
    )
    main = psutil.Process().memory_full_info().uss - before
    worker = in_process(read_list, 0, fork=True)
    permutation = in_process(permute, count)
    the_list.clear()
    memory = (main, worker["dirty"], permutation["dirty"])
    return [f"{count:,}", str(build), *map(megabytes, memory)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=7, help="exponent of the largest made-up data set (default: 7)")
    parser.add_argument("--files", type=int, default=1_000_000, help="real files to scan (default: 1000000)")
    parser.add_argument("--write", type=Path, help="Markdown file that keeps the tables")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dinov2-index-", dir=os.environ.get("TMPDIR")) as folder:
        work = Path(folder)
        os.environ["DINOV2_CACHE"] = str(work / "cache")
        growth = [grow(work, 10**power) for power in range(5, args.largest + 1)]
        lists = [python_list(10**power) for power in (5, 6, 7) if power <= args.largest]
        scanned = [scan_real_files(work, args.files)]
    command = f"python benchmarks/index.py --largest {args.largest} --files {args.files}"
    versions = f"Python {platform.python_version()}, pyarrow {pa.__version__}, numpy {np.__version__}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    right = partial(table, rule="---:")
    section = f"""## Index

`{command}`, {time.strftime("%Y-%m-%d")}, {versions},
{os.cpu_count()} cores with a load of {os.getloadavg()[0]:.1f} at the end, peak memory of the whole run {peak:.1f} GB.

Paths of {len("slide_00000/cell_00000_00000.jpg")} characters below the root, {FILES_PER_FOLDER:,} to a folder;
{LOOKUPS:,} random lookups in a fresh worker, which gets the list of paths pickled. "Private" is memory that only this
process has and the system cannot drop; "touched" adds the mapped pages of the index that it read and that no other
process has read, which the system drops when memory is short. The last column is the shuffled stream of the trainer,
which computes its permutation instead of keeping it. In brackets, and for the lookup: CPU time, because the machine was
busy with other work.

{right(["paths", "build", "on disk", "per path", "open", "lookup", "private", "touched", "pickled", "shuffle"], growth)}

The same as a Python list of strings, read by one forked worker, with a permutation by numpy:

{right(["paths", "build", "main process", "each worker", "permutation"], lists)}

Real files on the local disk, warm:

{right(["files", "folders", "first scan", "nothing changed", "one folder changed"], scanned)}
"""
    print(section)
    if args.write:
        write_section(args.write, "benchmarks/index.py", section)


if __name__ == "__main__":
    sys.exit(main())
