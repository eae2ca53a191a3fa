"""A check and three trainings over real cells of which one file in twenty is damaged, in ten ways.

    python benchmarks/damaged_run.py --data ../shared/data --out runs/damaged

What a user meets: the default stops and says why, with its checkpoint saved; a larger `train.max_unreadable_share`
trains to the end; so does the list of what `dinov2 check` would leave out. The table goes to docs/data.md by hand.
"""

import argparse
import csv
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

TRAINING = [
    *("--config-file=train/demo", "train.OFFICIAL_EPOCH_LENGTH=20", "optim.epochs=2", "train.device=cpu"),
    *("evaluation.eval_period_iterations=0", "checkpoint.period_iterations=20"),
]


def flip_bits(data: bytes, chance: random.Random) -> bytes:
    """Sixty bits of the picture itself."""
    damaged = bytearray(data)
    for _ in range(60):
        damaged[chance.randrange(700, len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def hole(data: bytes, chance: random.Random) -> bytes:
    """Zeros in place of 4 KiB, as a lost block of a disk."""
    start = chance.randrange(700, max(701, len(data) - 4096))
    return data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda data, chance: b"",
    "cut in half": lambda data, chance: data[: len(data) // 2],
    "cut after 30 bytes": lambda data, chance: data[:30],
    "last byte missing": lambda data, chance: data[:-1],
    "first half missing": lambda data, chance: data[len(data) // 2 :],
    "random bytes": lambda data, chance: chance.randbytes(len(data)),
    "a web page": lambda data, chance: b"<html><body>404 Not Found</body></html>",
    "header overwritten": lambda data, chance: data[:2] + bytes(38) + data[40:],
    "sixty bits flipped": flip_bits,
    "4 KiB of zeros": hole,
}


def damage(data: Path, out: Path) -> dict[str, str]:
    """Copy the images, every twentieth damaged; return the damage by path."""
    if out.exists():
        shutil.rmtree(out)
    shutil.copytree(data, out)
    chance = random.Random(0)
    images = sorted(path for path in out.rglob("*") if path.suffix.lower() in (".jpg", ".png"))
    chosen = chance.sample(images, len(images) // 20)
    ways = list(DAMAGES)
    done = {}
    for number, path in enumerate(chosen):
        way = ways[number % len(ways)]
        path.write_bytes(DAMAGES[way](path.read_bytes(), chance))
        done[str(path)] = way
    return done


def dinov2(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dinov2", *words]
    return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def check(cells: Path, out: Path, done: dict[str, str]) -> Path:
    """Print, for each way of damage, how many files the check would leave out; return its list."""
    exclude = out / "exclude.txt"
    code = dinov2("check", str(cells), "--csv", str(out / "check.csv"), "--exclude-list", str(exclude)).returncode
    left_out = {line for line in exclude.read_text().splitlines() if line and not line.startswith("#")}
    files, found = Counter(done.values()), Counter(way for path, way in done.items() if path in left_out)
    print(f"dinov2 check: exit code {code}; {len(left_out)} files left out, {len(left_out - done.keys())} undamaged\n")
    print("| damage | files | left out by the check |\n| --- | ---: | ---: |")
    for way in DAMAGES:
        print(f"| {way} | {files[way]} | {found[way]} |")
    with (out / "check.csv").open() as file:
        kinds = Counter(row["problem"] for row in csv.DictReader(file))
    print(f"\nfindings by kind: {dict(kinds)}")
    return exclude


def train(cells: Path, out: Path, name: str, *options: str) -> None:
    """Print how a training ends."""
    run = out / name
    if run.exists():
        shutil.rmtree(run)
    done = dinov2("train", f"--output-dir={run}", *TRAINING, f"train.dataset_path={cells}", *options)
    named = len(set(re.findall(r"(\S+) cannot be read \(", done.stdout)))
    lines = done.stdout.strip().splitlines()
    last = next((line for line in lines if "images tried could not be read" in line), lines[-1])
    kept = len(list(run.glob("checkpoints/model_*")))
    print(f"\n{name}: exit code {done.returncode}, {named} unreadable files named, {kept} checkpoint(s)\n  {last}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    cells = (args.out / "cells").resolve()
    done = damage(args.data, cells)
    exclude = check(cells, args.out, done)
    train(cells, args.out, "default")
    train(cells, args.out, "larger-share", "train.max_unreadable_share=0.1")
    train(cells, args.out, "excluded", f"train.exclude={exclude}")


if __name__ == "__main__":
    main()
