"""Images per second of the multi-crop data path against plain PIL + torchvision, one core, interleaved.

    python benchmarks/multicrop.py ../shared/data/pbc ../shared/data/raabin --write docs/benchmarks.md

Both sides do the recipe of the DINOv2 paper (2 x 224 + 8 x 98 pixels, every augmentation) from encoded bytes in memory
to a collated, masked, cast batch. The baseline is written out below; it draws its own parameters.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np
import torch
from PIL import Image
from sections import write_section
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from dinov2.data.augmentations import CropRenderer, DataAugmentationDINO, UintCrops
from dinov2.data.cache import CachedImages
from dinov2.data.collate import collate_data_and_cast, draw_masks
from dinov2.data.decode import decode_rgb
from dinov2.data.masking import MaskingGenerator
from dinov2.data.multicrop import MultiCropLoader

BATCH = 64
LARGE, SMALL, LOCALS = 224, 98, 8
TOKENS = 16 * 16
GLOBAL_SCALE, LOCAL_SCALE = (0.32, 1.0), (0.05, 0.32)
MASKS = {
    "mask_ratio_tuple": (0.1, 0.5),
    "mask_probability": 0.5,
    "n_tokens": TOKENS,
    "mask_generator": MaskingGenerator((16, 16), max_num_patches=TOKENS // 2),
}


class Encoded(Dataset):
    """Image files in memory, repeated to fill batches."""

    def __init__(self, folder: Path, limit: int = 256):
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        chosen = np.random.default_rng(0).permutation(len(paths))[:limit]
        self.files = [paths[i].read_bytes() for i in chosen]
        self.paths = [str(paths[i]) for i in chosen]

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> np.ndarray:
        return decode_rgb(self.files[index])


# ----------------------------------------------------------------------------------------------- the baseline


def plain_view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(0.5),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([transforms.GaussianBlur(9, (0.1, 2.0))], p=blur),
            transforms.RandomSolarize(128, p=solarize),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


class Plain(Dataset):
    """The recipe with PIL and torchvision, one sample at a time."""

    def __init__(self, encoded: Encoded):
        self.encoded = encoded
        self.views = [plain_view(LARGE, GLOBAL_SCALE, 1.0, 0.0), plain_view(LARGE, GLOBAL_SCALE, 0.1, 0.2)]
        self.local_view = plain_view(SMALL, LOCAL_SCALE, 0.5, 0.0)

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> dict:
        image = Image.open(io.BytesIO(self.encoded.files[index % len(self.encoded)])).convert("RGB")
        return {
            "global_crops": [view(image) for view in self.views],
            "local_crops": [self.local_view(image) for _ in range(LOCALS)],
        }


def plain_batches(encoded: Encoded) -> Iterator[None]:
    samples, collate = Plain(encoded), partial(collate_data_and_cast, dtype=torch.float16, **MASKS)
    for start in itertools.count(0, BATCH):
        collate([samples[start + i] for i in range(BATCH)])
        yield


# ------------------------------------------------------------------------------------------------------- ours


def make_augmentation() -> DataAugmentationDINO:
    return DataAugmentationDINO(GLOBAL_SCALE, LOCAL_SCALE, LOCALS, LARGE, SMALL)


def make_loader(dataset, num_workers: int = 0, dtype: torch.dtype = torch.float16, **options) -> MultiCropLoader:
    settings = {"batch_size": BATCH, "dtype": dtype, "num_workers": num_workers, "seed": 0, **MASKS}
    return MultiCropLoader(dataset, make_augmentation(), **settings | options)


# --------------------------------------------------------------------------------------------------- measuring


def interleave(sides: dict[str, Iterator], repeats: int) -> dict[str, tuple[list[float], list[float]]]:
    """Milliseconds per image, wall and CPU, of one batch of each side in turn."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in sides}
    for batches in sides.values():
        next(batches)
    for _ in range(repeats):
        for name, batches in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            next(batches)
            times[name][0].append((time.perf_counter() - wall) * 1e3 / BATCH)
            times[name][1].append((time.process_time() - cpu) * 1e3 / BATCH)
    return times


def stage_times(stages: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Least milliseconds per image of each stage over a batch."""
    least = dict.fromkeys(stages, float("inf"))
    for stage in stages.values():
        stage()
    for _ in range(repeats):
        for name, stage in stages.items():
            started = time.process_time()
            stage()
            least[name] = min(least[name], (time.process_time() - started) * 1e3 / BATCH)
    return least


def our_stages(encoded: Encoded) -> dict[str, Callable[[], None]]:
    augmentation = make_augmentation()
    files = encoded.files[:BATCH]
    images = [decode_rgb(data) for data in files]
    drawn = [augmentation.draw(*image.shape[:2], np.random.default_rng(i)) for i, image in enumerate(images)]
    global_crops = torch.empty(2 * BATCH, 3, LARGE, LARGE, dtype=torch.float16)
    local_crops = torch.empty(LOCALS * BATCH, 3, SMALL, SMALL, dtype=torch.float16)
    renderer = CropRenderer(augmentation, global_crops, local_crops)
    uint8 = UintCrops.empty(augmentation, BATCH)

    def each(work: Callable[[int], object]) -> Callable[[], None]:
        def run() -> None:
            for i in range(BATCH):
                work(i)

        return run

    return {
        "decode": each(lambda i: decode_rgb(files[i])),
        "draw parameters": each(lambda i: augmentation.draw(*images[i].shape[:2], np.random.default_rng(i))),
        "crop and resize": each(lambda i: uint8.resize(images[i], drawn[i], i)),
        "resize, colour, blur, normalise, cast": each(lambda i: renderer.render(images[i], drawn[i], i)),
        "masks": lambda: draw_masks(2 * BATCH, TOKENS, (0.1, 0.5), 0.5, MASKS["mask_generator"], rng=random.Random(0)),
    }


def worker_rates(encoded: Encoded, workers: int, seconds: float, rounds: int) -> dict[str, tuple[list[float], float]]:
    """Images per second with worker processes, alternately, and the mean PSS of a worker in MB."""
    sides = {"baseline": partial(plain_workers, encoded, workers), "ours": partial(our_workers, encoded, workers)}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    memory: dict[str, float] = {}
    for _ in range(rounds):
        for name, make in sides.items():
            batches = make()
            for _ in range(2 * workers + 1):  # what was made ahead while the workers started
                next(batches)
            started, count = time.perf_counter(), 0
            while time.perf_counter() - started < seconds:
                next(batches)
                count += 1
            rates[name].append(count * BATCH / (time.perf_counter() - started))
            memory[name] = statistics.mean(proportional_set_sizes())
            del batches
    return {name: (rates[name], memory[name]) for name in sides}


def plain_workers(encoded: Encoded, workers: int) -> Iterator:
    collate = partial(collate_data_and_cast, dtype=torch.float16, **MASKS)
    return iter(DataLoader(Plain(encoded), BATCH, num_workers=workers, collate_fn=collate))


def our_workers(encoded: Encoded, workers: int) -> Iterator:
    return iter(make_loader(encoded, workers))


def proportional_set_sizes() -> list[float]:
    """PSS of this process's children, MB."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    sizes = []
    for pid in children:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        sizes.append(sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3)
    return sizes


# ----------------------------------------------------------------------------------------------------- report


def report(folder: Path, args: argparse.Namespace) -> Iterator[str]:
    """Lines of Markdown for the images of one folder."""
    encoded = Encoded(folder)
    side = statistics.median(max(decode_rgb(data).shape[:2]) for data in encoded.files)
    kilobytes = statistics.mean(map(len, encoded.files)) / 1e3
    yield f"### {folder.name}: {len(encoded)} files, mostly {side:.0f} pixels, {kilobytes:.0f} KB"
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    yield from report_one_core(encoded, args)
    os.sched_setaffinity(0, cores)
    if args.rounds:
        yield from report_workers(encoded, args)


def report_one_core(encoded: Encoded, args: argparse.Namespace) -> Iterator[str]:
    scratch = Path(args.scratch) / f"multicrop-{os.getpid()}.pixels"
    cached = CachedImages(encoded, scratch, 1 << 30)
    baseline, fast = "PIL + torchvision", "all on the CPU, float16"
    times = interleave(
        {
            baseline: plain_batches(encoded),
            fast: iter(make_loader(encoded)),
            "all on the CPU, float32": iter(make_loader(encoded, dtype=torch.float32)),
            "all on the CPU, float16, decoded images cached": iter(make_loader(cached)),
            "worker's part with `augment_on: device`": iter(make_loader(encoded, augment_on="device")),
            "the same, decoded images cached": iter(make_loader(cached, augment_on="device")),
        },
        args.repeats,
    )
    scratch.unlink()
    yield f"One core, {args.repeats} batches of {BATCH} images each in turn; CPU time is what the process itself used."
    yield (
        "| | CPU ms per image, min / median | faster, min / median | wall ms per image, min / median | "
        "faster, min / median | images/s, from the median |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, (wall, cpu) in times.items():
        cells = [name]
        for own, base in ((cpu, times[baseline][1]), (wall, times[baseline][0])):
            low, middle = min(own), statistics.median(own)
            cells.append(f"{low:.2f} / {middle:.2f}")
            cells.append(f"{min(base) / low:.1f} / {statistics.median(base) / middle:.1f}")
        cells.append(f"{1e3 / statistics.median(wall):.0f}")
        yield f"| {' | '.join(cells)} |"
    yield "| stage | CPU ms per image, min |\n| --- | --- |"
    for name, milliseconds in stage_times(our_stages(encoded), args.repeats).items():
        yield f"| {name} | {milliseconds:.3f} |"


def report_workers(encoded: Encoded, args: argparse.Namespace) -> Iterator[str]:
    yield (
        "| workers | PIL + torchvision, images/s | ours, images/s | faster | MB per worker (PSS), theirs / ours |\n"
        "| --- | --- | --- | --- | --- |"
    )
    for workers in (1, 2):
        rates = worker_rates(encoded, workers, args.seconds, args.rounds)
        (plain, plain_mb), (fast, fast_mb) = rates["baseline"], rates["ours"]
        ratio = statistics.median(fast) / statistics.median(plain)
        yield (
            f"| {workers} | {statistics.median(plain):.0f} ({min(plain):.0f} to {max(plain):.0f}) | "
            f"{statistics.median(fast):.0f} ({min(fast):.0f} to {max(fast):.0f}) | {ratio:.1f} | "
            f"{plain_mb:.0f} / {fast_mb:.0f} |"
        )


def report_gpu(encoded: Encoded, repeats: int) -> str:
    """The copy and the photometric step of a batch on the GPU."""
    loader = make_loader(encoded, augment_on="device", pin_memory=True)
    device = torch.device("cuda")
    milliseconds = []
    for batch in itertools.islice(loader, repeats + 3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        loader.to_device(batch, device)
        torch.cuda.synchronize()
        milliseconds.append((time.perf_counter() - started) * 1e3)
    name = torch.cuda.get_device_name()
    return f"Copy and photometrics on {name}: {min(milliseconds[3:]):.1f} ms per batch of {BATCH} images"


def as_markdown(lines: list[str]) -> str:
    """Rows of a table one under the other, everything else as paragraphs."""
    parts = [lines[0]]
    for before, line in itertools.pairwise(lines):
        parts += ["\n" if line.startswith("| ") and before.startswith("| ") and "\n" not in line else "\n\n", line]
    return "".join(parts)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of images")
    parser.add_argument("--repeats", type=int, default=9, help="batches per alternative on one core")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side with workers; 0 for none")
    parser.add_argument("--seconds", type=float, default=15, help="length of a turn")
    parser.add_argument("--scratch", default="/tmp", help="folder for the file of decoded images")
    parser.add_argument("--write", type=Path, help="Markdown file that keeps the tables")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    torch.set_num_threads(1)
    lines = [
        "## Multi-crop data path",
        f"`python benchmarks/multicrop.py {' '.join(folder.name for folder in args.folders)}`: from encoded bytes to a "
        f"masked batch of 2 x {LARGE} + {LOCALS} x {SMALL} pixels; {os.cpu_count()} CPUs, load "
        f"{os.getloadavg()[0]:.1f} at the start, torch {torch.__version__}, Python {platform.python_version()}.",
    ]
    for folder in args.folders:
        for line in report(folder, args):
            print(line, flush=True)
            lines.append(line)
    lines.append(
        report_gpu(Encoded(args.folders[0]), args.repeats)
        if torch.cuda.is_available()
        else "No GPU here: the device's part of `augment_on: device` is not in these figures."
    )
    if args.write:
        write_section(args.write, "benchmarks/multicrop.py", as_markdown(lines))


if __name__ == "__main__":
    main()
