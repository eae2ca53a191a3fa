"""Images a second of our ViT-S/14 and of transformers' Dinov2Model with the same weights, on the same pixels.

    taskset -c 0 python benchmarks/feature_extraction.py --batch 8 --write docs/benchmarks.md

All sides take turns in one process, so that other programs of the machine slow them alike; what counts is the ratio in
each turn. Decoding is left out: `benchmarks/embed.py` times the whole job.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from sections import table, write_section

from dinov2.hub.export import huggingface
from dinov2.models.architecture import build_backbone

NAME = "benchmarks/feature_extraction.py"
Forward = Callable[[torch.Tensor], torch.Tensor]  # images -> class tokens


def build() -> tuple[Forward, Forward]:
    """Both models with the same random weights, LayerScale at 1 so that every block counts."""
    torch.manual_seed(0)
    ours = build_backbone({"arch": "vit_small", "patch_size": 14, "img_size": 224, "init_values": 1.0}).eval()
    with tempfile.TemporaryDirectory() as folder:
        huggingface.write(ours, Path(folder), target="hf", run={})
        theirs = transformers.AutoModel.from_pretrained(folder).eval()
    return ours, lambda images: theirs(pixel_values=images).last_hidden_state[:, 0]


def in_bf16(forward: Forward) -> Forward:
    def run(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(images)

    return run


def seconds(forward: Forward, images: torch.Tensor) -> float:
    start = time.perf_counter()
    forward(images)
    return time.perf_counter() - start


@torch.inference_mode()
def measure(batch: int, rounds: int) -> list[list[str]]:
    ours, theirs = build()
    modes: dict[str, Callable[[Forward], Forward]] = {
        "fp32": lambda forward: forward,
        "bf16 (autocast)": in_bf16,
        "fp32, torch.compile": torch.compile,
    }
    images = torch.randn(batch, 3, 224, 224)
    sides = {name: (change(ours), change(theirs)) for name, change in modes.items()}
    difference = {name: float((a(images) - b(images)).abs().max()) for name, (a, b) in sides.items()}  # warms up too
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name, pair in sides.items():
            order = (0, 1) if turn % 2 else (1, 0)
            times = {side: seconds(pair[side], images) for side in order}
            taken[name].append((times[0], times[1]))
    rows = []
    for name, pairs in taken.items():
        fastest = [min(times) for times in zip(*pairs)]
        ratios = [theirs / ours for ours, theirs in pairs]
        rows.append(
            [
                name,
                *(f"{batch / best:.1f}" for best in fastest),
                f"{fastest[1] / fastest[0]:.2f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                f"{difference[name]:.1g}",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of every side (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="Markdown file that keeps the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    head = [
        "",
        "ours, img/s",
        "transformers, img/s",
        "ratio of the fastest",
        "median ratio (range)",
        "largest difference",
    ]
    rows = table(head, measure(args.batch, args.rounds))
    print(rows)
    if args.write:
        section = f"""## Feature extraction

`taskset -c 0 python {NAME} --batch {args.batch} --rounds {args.rounds}`:
ViT-S/14 at 224 pixels with random weights against the `Dinov2Model` of transformers {transformers.__version__}
with the same weights, one thread, torch {torch.__version__}. Batches of {args.batch} images that are in memory; the
sides take turns. Images a second are those of the fastest turn on a machine with a load of {os.getloadavg()[0]:.1f};
ratios above 1 are in our favour. The difference is between the class tokens of both sides.

{rows}
"""
        write_section(args.write, NAME, section)


if __name__ == "__main__":
    main()
