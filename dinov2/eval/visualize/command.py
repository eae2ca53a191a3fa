"""Pictures of what a model sees, one command each: `dinov2 visualize umap|pca|attention|neighbors`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dinov2.eval.features import dataset_paths
from dinov2.eval.setup import LoadedModel, load_model
from dinov2.eval.visualize import attention, figures, inputs, neighbors, pca_rgb, umap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """The command line of `dinov2 visualize`."""
    parser = argparse.ArgumentParser("dinov2 visualize", description="Draw what a model sees.", add_help=add_help)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="umap|pca|attention|neighbors")
    for name, (what, add_arguments, draw) in _KINDS.items():
        child = kinds.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        child.add_argument("--out", required=True, help="picture to write; .png, .pdf or .svg")
        child.add_argument("--title", default="", help="above the picture")
        child.add_argument("--dpi", type=int, default=150, help="pixels per inch (default: %(default)s)")
        child.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
        add_arguments(child)
        child.set_defaults(draw=draw)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what the command line asks for."""
    args = get_args_parser().parse_args(argv)
    path = figures.save(args.draw(args), args.out, args.dpi)
    print(path)
    return 0


# --------------------------------------------------------------------------- UMAP


def _umap_arguments(parser: argparse.ArgumentParser) -> None:
    inputs.add_table_arguments(parser)
    add = parser.add_argument
    add("--method", default="umap", choices=umap.METHODS, help="how to get two dimensions (default: %(default)s)")
    add("--neighbors", type=int, default=15, help="that UMAP keeps together (default: %(default)s)")
    add("--min-dist", type=float, default=0.1, help="between points of a UMAP (default: %(default)s)")
    add("--save-points", metavar="FILE.npy", help="also write the coordinates")


def _draw_umap(args: argparse.Namespace) -> Figure:
    cells = inputs.load_cells(args)
    points = umap.reduce_to_2d(
        cells.table.features, method=args.method, seed=args.seed, neighbours=args.neighbors, min_dist=args.min_dist
    )
    if args.save_points:
        np.save(args.save_points, points)
    return umap.plot_embedding(points, cells.groupings, title=args.title, axis_name=args.method.upper())


# --------------------------------------------------------------------------- PCA and attention


class _Chosen(NamedTuple):
    """A few cells for a picture."""

    model: LoadedModel
    views: np.ndarray  # uint8 (N, S, S, 3)
    names: list[str]


def _cell_arguments(parser: argparse.ArgumentParser) -> None:
    inputs.add_model_arguments(parser)
    add = parser.add_argument
    add("--image-size", type=int, default=224, help="side of the square shown to the model, pixels (default: 224)")
    add("--count", type=int, default=8, help="cells to show, of all classes (default: %(default)s)")
    add("--images", nargs="+", metavar="PATH", help="show these images of --data")


def _choose(args: argparse.Namespace) -> _Chosen:
    if args.count < 1:
        raise ValueError(f"--count must be at least 1, got {args.count}")
    model = load_model(args.weights)
    dataset = inputs.open_dataset(args)
    labels = getattr(dataset, "labels", np.zeros(len(dataset), np.int64))
    if args.images:
        rows = _rows_of(args.images, dataset_paths(dataset))
    else:
        rows = inputs.choose_cells(labels, args.count, args.seed)
    views = inputs.model_views([dataset.read(int(row)) for row in rows], args.image_size)
    classes = getattr(dataset, "classes", [""])
    return _Chosen(model, views, [classes[labels[row]] for row in rows])


def _rows_of(wanted: Sequence[str], paths: Sequence[str]) -> np.ndarray:
    """Rows of paths, which may be given by their end alone."""
    rows = []
    for name in wanted:
        found = [row for row, path in enumerate(paths) if str(path) == name or Path(path).match(name)]
        if len(found) != 1:
            raise ValueError(
                f"{name} is {'not' if not found else f'{len(found)} times'} in the data; give its whole path"
            )
        rows += found
    return np.array(rows, np.int64)


def _pca_arguments(parser: argparse.ArgumentParser) -> None:
    _cell_arguments(parser)
    add = parser.add_argument
    add("--threshold", type=float, help="of the foreground, in deviations of the first component (default: Otsu's)")
    add("--smooth", action="store_true", help="blend between patches")


def _draw_pca(args: argparse.Namespace) -> Figure:
    chosen = _choose(args)
    tokens = inputs.patch_tokens(chosen.model, chosen.views)
    colours = pca_rgb.fit_patch_pca(tokens, args.threshold).transform(tokens)
    title = args.title or "First three principal components of the patch tokens, one basis for all cells"
    return pca_rgb.plot_pca(chosen.views, colours, names=chosen.names, title=title, smooth=args.smooth)


def _attention_arguments(parser: argparse.ArgumentParser) -> None:
    _cell_arguments(parser)
    parser.add_argument("--block", type=int, default=-1, help="of the network, -1 is the last (default: %(default)s)")
    parser.add_argument("--heads", action="store_true", help="show every head of one cell instead of means of many")


def _draw_attention(args: argparse.Namespace) -> Figure:
    chosen = _choose(args)
    maps = attention.attention_maps(chosen.model.backbone, inputs.to_model(chosen.views, chosen.model), args.block)
    if args.heads:
        title = args.title or f"Attention in block {maps.block}: {chosen.names[0] or 'one cell'}".replace("_", " ")
        return attention.plot_attention_heads(chosen.views[0], maps, 0, title=title)
    return attention.plot_attention_tokens(chosen.views, maps, names=chosen.names, title=args.title)


# --------------------------------------------------------------------------- neighbours


def _neighbor_arguments(parser: argparse.ArgumentParser) -> None:
    inputs.add_table_arguments(parser)
    add = parser.add_argument
    add(
        "--show",
        default="neighbors",
        choices=["neighbors", "typical", "labels"],
        help="neighbours of cells, typical and odd cells, or labels that look wrong (with a CSV file beside --out)",
    )
    add("--images", nargs="+", metavar="PATH", help="cells whose neighbours are shown (default: one of each class)")
    add("--k", type=int, default=8, help="neighbours of a cell (default: %(default)s)")
    add("--count", type=int, default=0, help="cells to show: queries, or per class, or labels (default: what fits)")


def _draw_neighbors(args: argparse.Namespace) -> Figure:
    cells = inputs.load_cells(args)
    table = cells.table
    if args.show == "typical":
        count = args.count or 4
        return neighbors.plot_typical(
            cells.read, table.features, table.labels, table.classes, count=count, title=args.title
        )
    if args.show == "labels":
        issues = neighbors.label_issues_of(table, seed=args.seed)
        neighbors.write_label_issues(Path(args.out).with_suffix(".csv"), issues, table)
        return neighbors.plot_label_issues(
            cells.read, issues, table.labels, table.classes, count=args.count or 24, title=args.title
        )
    if args.images:
        queries = _rows_of(args.images, table.paths)
    else:
        queries = inputs.choose_cells(table.labels, args.count or max(len(table.classes), 1), args.seed)
    found, cosines = neighbors.find_neighbours(table.features, min(args.k, len(table) - 1), queries)
    return neighbors.plot_neighbours(cells.read, queries.tolist(), found, cosines, cells.names, title=args.title)


_KINDS = {
    "umap": ("a map of all cells, coloured by class and by source", _umap_arguments, _draw_umap),
    "pca": ("the patches of cells as colours, by their principal components", _pca_arguments, _draw_pca),
    "attention": ("where the class token and the registers look", _attention_arguments, _draw_attention),
    "neighbors": ("nearest, typical and odd cells, and labels that look wrong", _neighbor_arguments, _draw_neighbors),
}
