"""Maps of many embeddings in two dimensions, coloured by class, source or anything else that has names."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov2.eval.features import l2_normalise
from dinov2.eval.visualize.figures import MissingExtra, group_styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("umap", "pca")


def reduce_to_2d(
    features: np.ndarray, *, method: str = "umap", seed: int = 0, neighbours: int = 15, min_dist: float = 0.1
) -> np.ndarray:
    """Two coordinates for each row; the same features and seed give the same map.

    Args:
        features: (N, D); compared by cosine, as DINOv2's k-NN does.
        method: "umap", or "pca" for the two widest directions (linear, no extra to install).
        seed: of UMAP, which then runs on one core.
        neighbours: how many neighbours UMAP keeps together; larger shows more of the whole, smaller more detail.
        min_dist: how close UMAP puts points.

    Returns:
        float32 (N, 2).

    Raises:
        ValueError: fewer than 4 rows, rows that are not finite, or an unknown method.
        MissingExtra: umap-learn is not installed.

    Source: McInnes et al., "UMAP: Uniform Manifold Approximation and Projection", 2018.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    features = np.asarray(features, np.float32)
    if len(features) < 4:
        raise ValueError(f"a map needs at least 4 images, got {len(features)}")
    if not np.isfinite(features).all():
        raise ValueError(f"{int((~np.isfinite(features).all(axis=1)).sum())} rows of the features are not finite")
    if method == "pca":
        return _pca(l2_normalise(features))
    try:
        import umap
    except ImportError as error:
        raise MissingExtra("umap-learn", "umap", "a UMAP") from error

    reducer = umap.UMAP(
        n_neighbors=min(neighbours, len(features) - 1),
        min_dist=min_dist,
        metric="cosine",
        random_state=seed,
        n_jobs=1,
        # the spectral start needs more rows than dimensions of its own
        init="spectral" if len(features) > 10 else "random",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="umap|sklearn")
        return np.ascontiguousarray(reducer.fit_transform(features), np.float32)


def _pca(features: np.ndarray) -> np.ndarray:
    centred = features - features.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:2]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], axis=1)
    return (centred @ (directions * np.sign(largest)).T).astype(np.float32)


def plot_embedding(
    points: np.ndarray, colour_by: Mapping[str, Sequence[str]], *, title: str = "", axis_name: str = "UMAP"
) -> Figure:
    """The same points once for each way to colour them, side by side, legends outside.

    Args:
        points: (N, 2).
        colour_by: name of each panel to N names, such as {"class": [...], "source": [...]}.
        title: above all.
        axis_name: of the coordinates.

    Raises:
        ValueError: nothing to colour by, or a number of names that is not N.
    """
    from matplotlib.figure import Figure

    if not colour_by:
        raise ValueError("colour_by is empty: give at least one list of names")
    for name, values in colour_by.items():
        if len(values) != len(points):
            raise ValueError(f"{len(points)} points but {len(values)} names to colour them by {name!r}")
    figure = Figure(figsize=(6.2 * len(colour_by), 5.0), layout="constrained", facecolor="white")
    if title:
        figure.suptitle(title, fontsize=12, weight="bold")
    panels = figure.subplots(1, len(colour_by), squeeze=False)[0]
    for axes, (name, values) in zip(panels, colour_by.items()):
        _scatter(axes, points, np.asarray(values), name)
        axes.set(xticks=[], yticks=[], xlabel=f"{axis_name} 1", ylabel=f"{axis_name} 2")
        axes.set_aspect("equal", adjustable="datalim")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _scatter(axes: Any, points: np.ndarray, values: np.ndarray, name: str) -> None:
    """One panel; points are drawn in random order, so that no group hides another."""
    names, codes = np.unique(values, return_inverse=True)
    styles = group_styles(names.tolist())
    size = float(np.clip(600 / math.sqrt(max(len(points), 1)), 2, 36))
    order = np.random.default_rng(0).permutation(len(points))
    for chunk in np.array_split(order, min(8, max(1, len(order) // 50))):
        for code, group in enumerate(names):
            rows = chunk[codes[chunk] == code]
            colour, marker = styles[group]
            axes.scatter(*points[rows].T, s=size, c=colour, marker=marker, alpha=0.75, linewidths=0, rasterized=True)
    counts = np.bincount(codes, minlength=len(names))
    handles = [
        axes.scatter([], [], s=36, c=styles[group][0], marker=styles[group][1], label=f"{group} ({count})")
        for group, count in zip(names, counts)
    ]
    columns = math.ceil(len(names) / 22)
    axes.legend(
        handles=handles,
        title=name,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=8,
        title_fontsize=9,
        alignment="left",
        handletextpad=0.3,
        ncols=columns,
    )
