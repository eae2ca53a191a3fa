"""What the pictures are made of: images as a model sees them, its tokens, tables of features."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.data import ImageDataset, LabelledDataset
from dinov2.data.decode import read_rgb
from dinov2.data.manifest import cache_folder
from dinov2.eval.cross_validation import model_features
from dinov2.eval.embed import load_embeddings
from dinov2.eval.features import FeatureTable, ImageFiles, check_image_size, normalise_images, prepare_image
from dinov2.eval.setup import LoadedModel, add_cache_arguments, add_extraction_arguments, load_model
from dinov2.eval.visualize.figures import square

UNLABELLED = "unlabelled"


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--weights and --data."""
    add = parser.add_argument
    add("--weights", required=required, help="weights of a model, in any known layout")
    add("--data", nargs="+", required=required, help="folders with a sub-folder per class, or CSV manifests")
    add("--unlabelled", action="store_true", help="--data are folders of images without classes")


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """--embeddings, or a model and data to make them from."""
    parser.add_argument(
        "--embeddings", metavar="FILE", help="what `dinov2 embed` wrote, instead of --weights and --data"
    )
    add_model_arguments(parser, required=False)
    add = parser.add_argument
    add("--features", default="cls", help="cls, patch_mean, registers, or several joined by + (default: cls)")
    add("--limit", type=int, help="use so many images at most, spread evenly over the data")
    add_extraction_arguments(parser)
    add_cache_arguments(parser)


def open_dataset(args: argparse.Namespace, in_chans: int = 3) -> Any:
    """The images of --data, with their classes unless --unlabelled."""
    if not args.unlabelled:
        return LabelledDataset(args.data, in_chans=in_chans)
    return ImageFiles(ImageDataset(args.data, frac=0.0).images_list, in_chans=in_chans)


class Cells:
    """A feature table and the pictures of its rows.

    Attributes:
        table: of the chosen features.
        read: row -> image as uint8 (size, size, 3), the middle of it.
    """

    def __init__(self, table: FeatureTable, read_path: Callable[[str], np.ndarray], size: int = 160):
        self.table, self.read_path, self.size = table, read_path, size

    def read(self, row: int) -> np.ndarray:
        """The picture of a row."""
        return square(self.read_path(self.table.paths[row]), self.size)

    @property
    def names(self) -> list[str]:
        """Name of the class of every row."""
        return [self.table.classes[label] if label >= 0 else UNLABELLED for label in self.table.labels]

    @property
    def groupings(self) -> dict[str, list[str]]:
        """Names to colour the rows by: class, and source where there are several."""
        found = {}
        if len(self.table.classes) and (self.table.labels >= 0).any():
            found["class"] = self.names
        if len(set(self.table.sources)) > 1:
            found["source"] = list(self.table.sources)
        return found or {"images": [UNLABELLED] * len(self.table)}


def load_cells(args: argparse.Namespace) -> Cells:
    """The table that --embeddings holds, or that --weights give for --data.

    Raises:
        ValueError: neither or both are given, or the file is not a table.
    """
    if bool(args.embeddings) == bool(args.weights and args.data):
        raise ValueError("give either --embeddings FILE, or --weights FILE and --data FOLDER")
    if args.embeddings:
        table, read = read_table(args.embeddings), read_rgb
    else:
        model = load_model(args.weights)
        dataset = open_dataset(args, model.options["in_chans"])
        if args.unlabelled and not args.no_cache:
            args = argparse.Namespace(**vars(args) | {"no_cache": True})  # the key of the cache needs classes
        folder = None if args.no_cache else cache_folder(args.cache_dir) / "features"
        table = model_features(model, dataset, args, folder)
        rows = {str(path): row for row, path in enumerate(dataset.paths)}
        read = lambda path: dataset.read(rows[path])  # noqa: E731
    if args.limit and args.limit < len(table):
        table = table.take(np.linspace(0, len(table) - 1, args.limit).astype(np.int64))
    return Cells(table.select(args.features) if table.columns else table, read)


def read_table(path: str | Path) -> FeatureTable:
    """A table that `dinov2 embed` (.parquet, .npz) or `FeatureTable.save` (.npz) wrote.

    Raises:
        ValueError: no such file, or not such a table.
    """
    if not Path(path).is_file():
        raise ValueError(f"no embeddings at {path}; `dinov2 embed` writes them")
    try:
        if zipfile.is_zipfile(path) and "features.npy" in zipfile.ZipFile(path).namelist():
            return FeatureTable.load(path)
        return load_embeddings(path)
    except (KeyError, OSError) as error:
        raise ValueError(f"{path} is not a table that `dinov2 embed` wrote: {error}") from error


# --------------------------------------------------------------------------- images and tokens


def model_views(images: Sequence[np.ndarray], image_size: int) -> np.ndarray:
    """What a model sees of images: uint8 (N, image_size, image_size, 3)."""
    return np.stack([prepare_image(image, image_size).permute(1, 2, 0).numpy() for image in images])


def to_model(views: np.ndarray, model: LoadedModel) -> Tensor:
    """Views (N, S, S, 3) as the normalised batch (N, 3, S, S) that the backbone takes, on its device."""
    device = next(model.backbone.parameters()).device
    pixels = torch.from_numpy(np.ascontiguousarray(views)).permute(0, 3, 1, 2).to(device)
    return normalise_images(pixels, model.mean, model.std)


@torch.no_grad()
def patch_tokens(model: LoadedModel, views: np.ndarray, batch_size: int = 8) -> np.ndarray:
    """Normalised patch tokens of views (N, S, S, 3), float32 (N, h, w, D).

    Raises:
        ValueError: a side that the patches do not tile.
    """
    backbone = model.backbone
    for side in views.shape[1:3]:
        check_image_size(backbone, side)
    grid = tuple(side // backbone.patch_size for side in views.shape[1:3])
    parts = [
        backbone(to_model(views[start : start + batch_size], model), is_training=True)["x_norm_patchtokens"]
        for start in range(0, len(views), batch_size)
    ]
    return torch.cat(parts).float().unflatten(1, grid).cpu().numpy()


def choose_cells(labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """`count` different rows, drawn in turn from every class; sorted by class."""
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    turns = [(turn, group, row) for group, rows in enumerate(shuffled) for turn, row in enumerate(rows[:count])]
    # with fewer pictures than classes, which classes are shown is a matter of the draw, not of the alphabet
    rank = rng.permutation(len(shuffled))
    chosen = sorted(turns, key=lambda item: (item[0], rank[item[1]]))[:count]
    return np.array([row for _, _, row in sorted(chosen, key=lambda item: (item[1], item[0]))], np.int64)
