"""One web page to look through all cells by their features: a map, pictures under the pointer, lists to save.

    dinov2 explore --embeddings FILE.npz --out cells.html
    dinov2 explore --weights W --data DIR --out cells.html

The page is one file that needs no server and fetches nothing: the map is drawn by plotly.js, which the Python package
plotly (extra `explore`) brings along, and the pictures are inside.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from dinov2.data.decode import UnreadableImage
from dinov2.eval.features import FeatureTable, l2_normalise
from dinov2.eval.visualize import inputs
from dinov2.eval.visualize.figures import MissingExtra, group_styles, square
from dinov2.eval.visualize.neighbors import find_neighbours
from dinov2.eval.visualize.umap import METHODS, reduce_to_2d

logger = logging.getLogger("dinov2")

TEMPLATE = Path(__file__).with_name("explorer.html")
SHEET = 16  # thumbnails in a row and in a column of a sheet
PLOTLY_MARKERS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
}
Read = Callable[[int], np.ndarray]  # row -> image, uint8 (H, W, 3)


# --------------------------------------------------------------------------- what the page shows


def cluster(features: np.ndarray, clusters: int, seed: int = 0) -> list[str]:
    """Names "cluster 01", … of k-means clusters of the directions of the rows (N, D), the largest first."""
    from sklearn.cluster import MiniBatchKMeans

    clusters = min(clusters, len(features))
    model = MiniBatchKMeans(clusters, random_state=seed, n_init=3, batch_size=4096)
    found = model.fit_predict(l2_normalise(features))
    rank = np.empty(clusters, np.int64)
    rank[np.argsort(-np.bincount(found, minlength=clusters), kind="stable")] = np.arange(clusters)
    width = len(str(clusters))
    return [f"cluster {rank[i] + 1:0{width}d}" for i in found]


def predict_by_neighbours(table: FeatureTable, neighbours: np.ndarray) -> list[str]:
    """Class that most of the neighbours (N, k) of each row have, the nearer ones first in a tie.

    No row has a say in its own prediction. Unlabelled neighbours do not vote.
    """
    votes = np.zeros((len(table), len(table.classes)), np.float64)
    for place in range(neighbours.shape[1]):
        labels = table.labels[neighbours[:, place]]
        rows = np.flatnonzero(labels >= 0)
        votes[rows, labels[rows]] += 1 - 1e-3 * place
    best = votes.argmax(axis=1)
    return [table.classes[i] if votes[row, i] else inputs.UNLABELLED for row, i in enumerate(best)]


def groupings(cells: inputs.Cells, neighbours: np.ndarray, clusters: int, seed: int) -> dict[str, list[str]]:
    """Everything to colour by: class, source, prediction, agreement of label and prediction, cluster."""
    table = cells.table
    found = {name: values for name, values in cells.groupings.items() if name != "images"}
    if "class" in found:
        found["prediction"] = predict_by_neighbours(table, neighbours)
        found["agreement"] = [
            "unlabelled" if given == inputs.UNLABELLED else "agrees" if given == said else "differs"
            for given, said in zip(found["class"], found["prediction"])
        ]
    found["cluster"] = cluster(table.features, clusters, seed)
    return found


def thumbnail_size(count: int) -> int:
    """Side in pixels, so that the page stays below about 100 MB."""
    return 96 if count <= 3000 else 64 if count <= 20_000 else 40


def thumbnail_sheets(read: Read, count: int, size: int, *, num_workers: int = 2, progress: bool = True) -> list[str]:
    """Pictures of `count` rows on WebP sheets of 16 x 16, base64; an unreadable one is grey."""

    def thumbnail(row: int) -> np.ndarray:
        try:
            return square(read(row), size)
        except UnreadableImage as error:
            logger.warning(f"no thumbnail: {error}")
            return np.full((size, size, 3), 128, np.uint8)

    sheets = []
    per_sheet = SHEET * SHEET
    with (
        ThreadPoolExecutor(max(1, num_workers)) as pool,
        tqdm(total=count, desc="thumbnails", unit="img", disable=not progress) as bar,
    ):
        for start in range(0, count, per_sheet):
            rows = range(start, min(start + per_sheet, count))
            sheet = np.full((size * math.ceil(len(rows) / SHEET), size * SHEET, 3), 255, np.uint8)
            for place, picture in enumerate(pool.map(thumbnail, rows)):
                top, left = place // SHEET * size, place % SHEET * size
                sheet[top : top + size, left : left + size] = picture
            _, data = cv2.imencode(".webp", sheet[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, 75])
            sheets.append(base64.b64encode(data).decode())
            bar.update(len(rows))
    return sheets


# --------------------------------------------------------------------------- the page


def write_explorer(
    path: str | Path,
    points: np.ndarray,
    columns: Mapping[str, Sequence[str]],
    paths: Sequence[str],
    neighbours: np.ndarray,
    sheets: Sequence[str],
    *,
    size: int,
    title: str = "Cells",
) -> Path:
    """Write the page.

    Args:
        path: the HTML file.
        points: (N, 2).
        columns: what to colour by, each N names; the first is shown at the start.
        paths: N.
        neighbours: (N, k) rows, nearest first.
        sheets: of `thumbnail_sheets`.
        size: of a thumbnail.
        title: of the page.

    Raises:
        ValueError: lengths that do not fit.
        MissingExtra: plotly is not installed.
    """
    lengths = {"paths": len(paths), "neighbours": len(neighbours), **{k: len(v) for k, v in columns.items()}}
    if wrong := {name: n for name, n in lengths.items() if n != len(points)}:
        raise ValueError(f"{len(points)} points do not fit {wrong}")
    prefix = os.path.commonpath([os.path.dirname(p) for p in paths]) if all(map(os.path.isabs, paths)) else ""
    data = {
        "count": len(points),
        "x": _pack(points[:, 0], np.float32),
        "y": _pack(points[:, 1], np.float32),
        "columns": [_column(name, values) for name, values in columns.items()],
        "prefix": prefix,
        "paths": [p[len(prefix) :] for p in paths],
        "neighbours": {"k": neighbours.shape[1], "rows": _pack(neighbours, np.int32)},
        "thumbnails": {"size": size, "across": SHEET, "sheets": list(sheets)},
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    parts = {
        "@@TITLE@@": html.escape(title),
        # no text of ours may end the script element that it stands in
        "@@DATA@@": json.dumps(data, separators=(",", ":")).replace("</", "<\\/"),
        "@@PLOTLY@@": _plotly_source(),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for piece in re.split("(@@[A-Z]+@@)", page):  # in one pass, so that inserted text is never searched
            file.write(parts.get(piece, piece))
    return path


def _pack(values: np.ndarray, dtype: type) -> str:
    """Little-endian bytes as base64: a tenth of the time that JSON numbers take to read."""
    return base64.b64encode(np.ascontiguousarray(values, np.dtype(dtype).newbyteorder("<")).tobytes()).decode()


def _column(name: str, values: Sequence[str]) -> dict:
    names, codes = np.unique(np.asarray(values), return_inverse=True)
    styles = [group_styles(names.tolist())[group] for group in names.tolist()]
    return {
        "name": name,
        "names": names.tolist(),
        "codes": _pack(codes, np.uint16),
        "colours": [colour for colour, _ in styles],
        "symbols": [PLOTLY_MARKERS[marker] for _, marker in styles],
    }


def _plotly_source() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtra("plotly", "explore", "the explorer page") from error
    return get_plotlyjs()


# --------------------------------------------------------------------------- command line


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """The command line of `dinov2 explore`."""
    parser = argparse.ArgumentParser(
        "dinov2 explore",
        description="Write one web page to look through images by their features.",
        add_help=add_help,
    )
    parser.add_argument("--out", default="explorer.html", help="page to write (default: %(default)s)")
    inputs.add_table_arguments(parser)
    add = parser.add_argument
    add("--title", default="Cells", help="of the page")
    add("--method", default="umap", choices=METHODS, help="how to get two dimensions (default: %(default)s)")
    add("--points", metavar="FILE.npy", help="coordinates made before (`dinov2 visualize umap --save-points`)")
    add("--k", type=int, default=12, help="neighbours of a cell (default: %(default)s)")
    add("--clusters", type=int, help="groups by k-means (default: as many as classes, or 10)")
    add("--thumbnail", type=int, help="side of a picture, pixels (default: 96 to 40, the more cells the smaller)")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`dinov2 explore`."""
    args = get_args_parser().parse_args(argv)
    _plotly_source()  # missing? say so before minutes of work
    cells = inputs.load_cells(args)
    table = cells.table
    if args.points:
        points = np.load(args.points)
        if points.shape != (len(table), 2):
            raise ValueError(f"{args.points} has the shape {points.shape}; {(len(table), 2)} is needed")
    else:
        points = reduce_to_2d(table.features, method=args.method, seed=args.seed)
    neighbours, _ = find_neighbours(table.features, min(args.k, len(table) - 1))
    columns = groupings(cells, neighbours, args.clusters or max(len(table.classes), 2) or 10, args.seed)
    size = args.thumbnail or thumbnail_size(len(table))
    sheets = thumbnail_sheets(
        lambda row: cells.read_path(table.paths[row]), len(table), size, num_workers=args.num_workers or 2
    )
    path = write_explorer(args.out, points, columns, list(table.paths), neighbours, sheets, size=size, title=args.title)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB, {len(table)} cells): open it in a browser")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
