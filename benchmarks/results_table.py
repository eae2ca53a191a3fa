"""Score a model on real cells in every way that docs/results.md shows, and write its tables and pictures.

    python benchmarks/results_table.py --weights W --data ../shared/data --out runs/scores --write docs/results.md

W is a backbone that `benchmarks/real_cells.py` trained. Each comparison is one `dinov2 evaluate`, with its report in a
folder of --out. The pictures go to the folder images/ beside the file that --write names.
"""

import argparse
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sections import write_section

from dinov2.eval.cross_validation import get_args_parser, run
from dinov2.eval.report import Report
from dinov2.eval.visualize import plot_embedding, reduce_to_2d, save

LABEL_MAP = "docs/label_maps/pbc_raabin.yaml"
WHITE = ("immature_granulocyte", "neutrophil")  # classes of pbc from a scanner with a white background
NAME = "benchmarks/results_table.py"


class Comparison(NamedTuple):
    title: str
    folder: str
    options: Sequence[str]  # of `dinov2 evaluate`, beside the weights


def comparisons(data: Path) -> list[Comparison]:
    pbc, raabin = str(data / "pbc"), str(data / "raabin")
    mapped = ["--label-map", LABEL_MAP]
    without = ["--exclude-classes", *WHITE]
    return [
        Comparison("Five folds of pbc, all 13 classes", "pbc", ["--data", pbc]),
        Comparison("Five folds of pbc without the two classes on white", "pbc_cream", ["--data", pbc, *without]),
        Comparison("Five folds of pbc, the five shared classes", "pbc_shared", ["--data", pbc, *mapped]),
        Comparison("Five folds of raabin", "raabin", ["--data", raabin]),
        Comparison("From pbc to raabin", "pbc_to_raabin", ["--data", pbc, "--test", raabin, *mapped]),
        Comparison("From raabin to pbc", "raabin_to_pbc", ["--data", raabin, "--test", pbc, *mapped]),
        Comparison("Both together", "both", ["--data", pbc, raabin, *mapped]),
    ]


def draw(reports: dict[str, Report], out: Path, images: Path) -> None:
    """The pictures of the report on pbc, and a map of both data sets."""
    best = reports["pbc"].best.outcome.method
    figures = out / "pbc" / "figures"
    for kind, name in {
        "confusion": f"confusion_trained_cls_{best}.png",
        "reliability": "reliability_trained_cls.png",
        "abstention": "abstention_trained_cls.png",
    }.items():
        shutil.copy(figures / name, images / f"real_cells_{kind}.png")
    table = reports["both"].table.select("cls")
    names = {"class": [table.classes[label] for label in table.labels], "source": table.sources}
    save(plot_embedding(reduce_to_2d(table.features), names), images / "real_cells_umap.png", dpi=120)


def as_markdown(options: Sequence[Comparison], reports: dict[str, Report], common: Sequence[str]) -> str:
    shown = ["dinov2 evaluate --weights W " + shlex.join([*common, *c.options]) for c in options]
    lines = ["```", *shown, "```", ""]
    for comparison in options:
        report = reports[comparison.folder]
        if comparison.folder == "both":
            continue
        paired = len(report.splits) == 1
        what = f"{len(report.splits[0].train)} images to learn from, {len(report.splits[0].test)} tested"
        lines += [f"### {comparison.title}", ""]
        lines += [f"{what}; 95 % bootstrap interval.", "", report.interval_table()] if paired else [report.main_table()]
        lines += [""]
    pbc = reports["pbc"]
    o = pbc.best.outcome
    lines += [f"### Classes of pbc: {pbc.method_names[o.method]} on the trained network", ""]
    lines += [pbc.per_class_table(pbc.best), "", "![Confusion matrix](images/real_cells_confusion.png)", ""]
    lines += ["### Calibration and abstention on pbc", "", pbc.calibration_table(), ""]
    lines += ["![Reliability](images/real_cells_reliability.png)", ""]
    lines += ["![Accuracy when the least confident are left out](images/real_cells_abstention.png)", ""]
    lines += ["### Batch effects: pbc and raabin together", "", reports["both"].batch_effect_table(), ""]
    lines += ["![UMAP of the trained network, by class and by source](images/real_cells_umap.png)"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with pbc/ and raabin/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the reports")
    parser.add_argument("--image-size", default="56", help="pixels (default: %(default)s)")
    parser.add_argument("--write", type=Path, required=True, help="Markdown file that keeps the tables")
    args = parser.parse_args()
    common, options = ["--names", "trained", "--image-size", args.image_size], comparisons(args.data)
    reports = {}
    for comparison in options:
        words = ["--weights", args.weights, *common, *comparison.options, "--report", str(args.out / comparison.folder)]
        reports[comparison.folder] = run(get_args_parser().parse_args(words))
        print(f"{comparison.title}\n{reports[comparison.folder].interval_table()}\n", flush=True)
    draw(reports, args.out, args.write.parent / "images")
    write_section(args.write, NAME, as_markdown(options, reports, common))


if __name__ == "__main__":
    main()
