"""Images per second of `dinov2 embed` against Hugging Face transformers doing the same job, side by side.

    python benchmarks/embed.py ../shared/data --write docs/benchmarks.md

The job: image files in, a Parquet file of class tokens and mean patches out, ViT-S/14 with random weights at 224
pixels, on one core. Both sides have the same weights (an export of ours) and take the same files in turn; models are
loaded before. Transformers does it as its documentation says: Pillow opens the files, `AutoImageProcessor` prepares a
batch, `AutoModel` embeds it. "The model alone" is our forward pass over images that are there already: what no data
path can beat.
"""

import argparse
import csv
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image
from sections import table, write_section

from dinov2.data import ImageDataset
from dinov2.eval import embed
from dinov2.eval.features import normalise_images, token_features
from dinov2.eval.setup import load_model
from dinov2.hub.export import export
from dinov2.models.vision_transformer import vit_small

SIZE, BATCH = 224, 16
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
Side = Callable[[list[str], torch.dtype], None]


def batches(paths: list[str]) -> Iterator[list[str]]:
    """Runs of at most BATCH paths."""
    return (paths[start : start + BATCH] for start in range(0, len(paths), BATCH))


def theirs(model_folder: Path, out: Path) -> Side:
    """Files to Parquet with transformers."""
    processor = transformers.AutoImageProcessor.from_pretrained(model_folder)
    model = transformers.AutoModel.from_pretrained(model_folder).eval()

    @torch.inference_mode()
    def run(paths: list[str], dtype: torch.dtype) -> None:
        columns: dict[str, list] = {"cls": [], "patch_mean": []}
        for batch in batches(paths):
            images = [Image.open(path).convert("RGB") for path in batch]
            inputs = processor(images, return_tensors="pt")
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                tokens = model(**inputs).last_hidden_state.float()
            columns["cls"] += tokens[:, 0].numpy().tolist()
            columns["patch_mean"] += tokens[:, 1:].mean(dim=1).numpy().tolist()
        pq.write_table(pa.table({"path": paths, **columns}), out)

    return run


def ours(weights: Path, out: Path) -> Side:
    """`dinov2 embed`, from the list of files to the finished Parquet file."""
    model = load_model(weights)
    listing = out.with_suffix(".csv")

    def run(paths: list[str], dtype: torch.dtype) -> None:
        with listing.open("w", newline="") as file:
            csv.writer(file).writerows([["path"], *([path] for path in paths)])
        images = embed.Images.open([str(listing)])
        store = embed.ChunkStore(out.with_name(f"{out.name}.parts"), {})
        store.open()
        how = {"features": "cls+patch_mean", "image_size": SIZE, "batch_size": BATCH, "dtype": dtype}
        embed.embed_images(model, images, store, chunk_rows=len(paths), progress=False, **how)
        embed.finish(store, out, {}, len(images))

    return run


def alone(weights: Path) -> Side:
    """The forward passes of our model and nothing else."""
    model = load_model(weights)
    pixels = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)

    @torch.inference_mode()
    def run(paths: list[str], dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            for batch in batches(paths):
                token_features(model.backbone, normalise_images(pixels[: len(batch)]), "cls+patch_mean")

    return run


def agreement(a: Path, b: Path) -> float:
    """Mean cosine between the class tokens of two Parquet files."""
    first, second = (np.array(pq.read_table(path, columns=["cls"])["cls"].to_pylist()) for path in (a, b))
    dots = (first * second).sum(axis=1)
    return float((dots / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)).mean())


def measure(sides: dict[str, Side], paths: list[str], chunk: int, rounds: int) -> dict[str, list[float]]:
    """Images per second of each side and precision over the same chunks of files, in turn; one turn warms up."""
    rates: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        files = [paths[(number * chunk + i) % len(paths)] for i in range(chunk)]
        for (precision, dtype), (name, side) in itertools.product(PRECISIONS.items(), sides.items()):
            start = time.perf_counter()
            side(files, dtype)
            if number:
                rates.setdefault(f"{name}, {precision}", []).append(chunk / (time.perf_counter() - start))
    return rates


def report(rates: dict[str, list[float]], likeness: float, args: argparse.Namespace) -> str:
    """The section of docs/benchmarks.md."""
    rows = []
    for name, own in rates.items():
        base = rates[f"transformers, {name.rpartition(' ')[2]}"]
        ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
        rows.append([name, f"{statistics.median(own):.1f}", f"{min(own):.1f} to {max(own):.1f}", f"{ratio:.2f}"])
    about = [
        f"`python benchmarks/embed.py {' '.join(map(str, args.folders))}`: files in, Parquet out, ViT-S/14 at {SIZE}",
        f"pixels, one core, batches of {BATCH}; {args.rounds} rounds of {args.chunk} files in turn.",
        f"Torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}, load at the end",
        f"{os.getloadavg()[0]:.1f}. A ratio is the median over the rounds of that to transformers in the same round.",
        f"Class tokens of both sides have a mean cosine of {likeness:.4f}.",
    ]
    head = ["", "images/s, median", "least to most", "x transformers"]
    return "\n".join(["## Embedding files", "", *about, "", table(head, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of images")
    parser.add_argument("--chunk", type=int, default=32, help="files per turn")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side")
    parser.add_argument("--write", type=Path, help="Markdown file that keeps the table")
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    images = ImageDataset([str(folder) for folder in args.folders]).images_list
    paths = [images[i] for i in np.random.default_rng(0).permutation(len(images))]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = vit_small(patch_size=14, img_size=SIZE, init_values=1.0, block_chunks=0).eval()
        for target in ("hf", "safetensors"):
            export(model, target, folder / target)
        tables = [folder / "theirs.parquet", folder / "ours.parquet"]
        sides = {
            "transformers": theirs(folder / "hf", tables[0]),
            "`dinov2 embed`": ours(folder / "safetensors" / "model.safetensors", tables[1]),
            "the model alone": alone(folder / "safetensors" / "model.safetensors"),
        }
        for name in ("transformers", "`dinov2 embed`"):
            sides[name](paths[: args.chunk], torch.float32)
        likeness = agreement(*tables)
        rates = measure(sides, paths, args.chunk, args.rounds)
    print(text := report(rates, likeness, args))
    if args.write:
        write_section(args.write, "benchmarks/embed.py", text)


if __name__ == "__main__":
    main()
