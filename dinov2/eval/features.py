"""Images in, one table of features out: the only place where evaluation runs a backbone over a data set."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dinov2 import distributed
from dinov2.data.decode import UnreadableImage, decode_channels, decode_rgb, read_bytes
from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

logger = logging.getLogger("dinov2")

RESIZE_RATIO = 256 / 224  # DINOv2 resizes the shorter side to 256 and cuts 224 out of the middle
PARTS = ("cls", "patch_mean", "registers", "patches")


class Unreadable(NamedTuple):
    """An image that could not be decoded: its row in the data set, its path and why."""

    row: int
    path: str
    reason: str


@dataclass(frozen=True)
class FeatureTable:
    """Features of the readable images of a data set, in its order.

    Attributes:
        features: float32 (N, D), as the model gives them (after its last LayerNorm, not L2-normalised).
        labels: int64 (N,), positions in `classes`; -1 where an image has no label.
        paths: N strings.
        classes: names of the labels.
        sources: N names of where an image comes from (scanner, folder), or empty when the data set has none.
        groups: N names of what must stay together in a split (patient, slide), or empty when the data set has none.
        sizes: int64 (N, 2), height and width of the image file, pixels.
        columns: first and last+1 column of each part, such as {"cls": (0, 384), "patch_mean": (384, 768)}.
        unreadable: what is missing from the table, with the reason.
    """

    features: np.ndarray
    labels: np.ndarray
    paths: Sequence[str]
    classes: Sequence[str] = ()
    sources: Sequence[str] = ()
    groups: Sequence[str] = ()
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    columns: dict[str, tuple[int, int]] = field(default_factory=dict)
    unreadable: Sequence[Unreadable] = ()

    def __len__(self) -> int:
        return len(self.features)

    def normalised(self) -> FeatureTable:
        """The same table with rows of length 1, as DINOv2's k-NN compares them."""
        return replace(self, features=l2_normalise(self.features))

    def select(self, features: str) -> FeatureTable:
        """The same rows with the columns of one kind of feature, such as "cls" or "cls+patch_mean".

        Raises:
            ValueError: the table was extracted without that part.
        """
        parts = features.split("+")
        if missing := [part for part in parts if part not in self.columns]:
            raise ValueError(f"features {missing} are not in this table; it holds {sorted(self.columns)}")
        blocks = [self.features[:, slice(*self.columns[part])] for part in parts]
        return replace(
            self, features=np.ascontiguousarray(np.concatenate(blocks, axis=1)), columns=_layout(parts, blocks)
        )

    def relabelled(self, classes: Sequence[str]) -> FeatureTable:
        """The same rows with labels counted in another list of classes, which must have all that occur."""
        number = {name: i for i, name in enumerate(classes)}
        used = np.unique(self.labels[self.labels >= 0])
        if missing := [self.classes[i] for i in used if self.classes[i] not in number]:
            raise ValueError(f"classes {missing} are not among {list(classes)}")
        translate = np.array([*(number.get(name, -1) for name in self.classes), -1])  # the last is for label -1
        return replace(self, labels=translate[self.labels].astype(np.int64), classes=list(classes))

    def take(self, rows: np.ndarray) -> FeatureTable:
        """The table of some rows, in the order given."""
        rows = np.asarray(rows)
        pick = lambda names: [names[i] for i in rows] if len(names) else []  # noqa: E731
        return replace(
            self,
            features=self.features[rows],
            labels=self.labels[rows],
            paths=pick(self.paths),
            sources=pick(self.sources),
            groups=pick(self.groups),
            sizes=self.sizes[rows] if len(self.sizes) else self.sizes,
        )

    def save(self, path: str | Path) -> None:
        """Write the table to one `.npz` file (no pickle inside)."""
        text = {
            name: np.asarray(getattr(self, name), dtype=np.str_) for name in ("paths", "classes", "sources", "groups")
        }
        rows = np.asarray([u.row for u in self.unreadable], np.int64)
        why = np.asarray([(u.path, u.reason) for u in self.unreadable], dtype=np.str_).reshape(-1, 2)
        parts = np.asarray(list(self.columns), dtype=np.str_)
        spans = np.asarray(list(self.columns.values()), np.int64).reshape(-1, 2)
        with open(path, "wb") as file:  # a file object, so that numpy does not append ".npz" to the name
            np.savez(
                file,
                features=self.features,
                labels=self.labels,
                sizes=self.sizes,
                unreadable_rows=rows,
                unreadable_why=why,
                parts=parts,
                spans=spans,
                **text,
            )

    @staticmethod
    def load(path: str | Path) -> FeatureTable:
        """Read a table that `save` wrote."""
        with np.load(path, allow_pickle=False) as data:
            return FeatureTable(
                features=data["features"],
                labels=data["labels"],
                **{name: data[name].tolist() for name in ("paths", "classes", "sources", "groups")},
                sizes=data["sizes"],
                columns={str(part): (int(a), int(b)) for part, (a, b) in zip(data["parts"], data["spans"])},
                unreadable=[
                    Unreadable(int(row), str(path), str(reason))
                    for row, (path, reason) in zip(data["unreadable_rows"], data["unreadable_why"])
                ],
            )


def concatenate(tables: Sequence[FeatureTable]) -> FeatureTable:
    """The rows of all tables, with one numbering of the classes: those of the first table, then new ones by name.

    Raises:
        ValueError: the tables hold different kinds of features.
    """
    first = tables[0]
    if any(table.columns != first.columns for table in tables):
        raise ValueError(f"tables of different features: {[sorted(table.columns) for table in tables]}")
    known = list(first.classes)
    classes = known + sorted({name for table in tables for name in table.classes} - set(known))
    join = lambda name: [item for table in tables for item in getattr(table, name)]  # noqa: E731
    return FeatureTable(
        features=np.concatenate([table.features for table in tables]),
        labels=np.concatenate([table.relabelled(classes).labels for table in tables]),
        paths=join("paths"),
        classes=classes,
        sources=join("sources") if all(len(table.sources) for table in tables) else [],
        groups=join("groups") if all(len(table.groups) for table in tables) else [],
        sizes=np.concatenate([table.sizes for table in tables]),
        columns=first.columns,
        unreadable=join("unreadable"),
    )


def l2_normalise(features: np.ndarray) -> np.ndarray:
    """Rows (N, D) scaled to length 1; a row of zeros stays zero."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def parse_features(features: str) -> tuple[str, ...]:
    """The parts in "cls", "patch_mean", "registers", "patches" or any of them joined by "+".

    Raises:
        ValueError: an unknown part.
    """
    parts = tuple(features.split("+"))
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"unknown features {unknown[0]!r} in {features!r}; known: {', '.join(PARTS)}, joined by '+'")
    return parts


def available_features(model: nn.Module) -> str:
    """Every part that the model can give, as the `features` argument of `extract`."""
    return "cls+patch_mean+registers" if getattr(model, "num_register_tokens", 0) else "cls+patch_mean"


def token_features(model: nn.Module, images: Tensor, features: str = "cls") -> dict[str, Tensor]:
    """The parts of `features` for images (B, C, H, W), each (B, width), in the model's precision.

    The registers of an image are laid side by side, (B, R * D), because each has learned a role of its own; so are its
    patches, (B, N * D), row by row of the image.

    Raises:
        ValueError: registers asked of a model that has none.
    """
    tokens = model(images, is_training=True)  # through forward, so that the hooks of a sharded model run
    parts = {}
    for part in parse_features(features):
        if part == "cls":
            parts[part] = tokens["x_norm_clstoken"]
        elif part == "patch_mean":
            parts[part] = tokens["x_norm_patchtokens"].mean(dim=1)
        elif part == "patches":
            parts[part] = tokens["x_norm_patchtokens"].flatten(1)
        else:
            if tokens["x_norm_regtokens"].shape[1] == 0:
                raise ValueError("features 'registers' asked of a model without register tokens")
            parts[part] = tokens["x_norm_regtokens"].flatten(1)
    return parts


def prepare_image(image: np.ndarray, image_size: int) -> Tensor:
    """DINOv2's evaluation view of one image: uint8 (H, W, C) to uint8 (C, image_size, image_size).

    The shorter side is resized to 256/224 of `image_size` (bicubic, antialiased) and the middle is kept. Other types
    than uint8 (microscopy with its own values) become float32.
    """
    if image.dtype != np.uint8:  # as in training: the whole range of an integer type is 0 to 1
        largest = np.iinfo(image.dtype).max if np.issubdtype(image.dtype, np.integer) else 1
        image = image.astype(np.float32) / largest
    image = np.require(image, requirements=["C", "W"])  # a mapped file is copied: torch takes what may be written to
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]  # channels last: the fast kernel
    height, width = image.shape[:2]
    shorter = round(image_size * RESIZE_RATIO)
    scale = shorter / min(height, width)
    # as torchvision: the longer side is cut, not rounded
    size = (shorter, int(shorter * width / height)) if height <= width else (int(shorter * height / width), shorter)
    if scale != 1:
        pixels = nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
    top, left = (round((side - image_size) / 2) for side in pixels.shape[-2:])
    return pixels[0, :, top : top + image_size, left : left + image_size]


def normalise_images(
    images: Tensor, mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD
) -> Tensor:
    """Images (B, C, H, W) to float32 with the model's own mean and deviation; bytes are scaled to 0..1 first."""
    mean_, std_ = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (mean, std))
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    return (pixels - mean_) / std_


@contextlib.contextmanager
def inference(model: nn.Module | None, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Evaluation mode without gradients, in `dtype`; every module gets the mode back that it had."""
    modes = [(module, module.training) for module in model.modules()] if model is not None else []
    if model is not None:
        model.eval()
    autocast = dtype is not None and dtype != torch.float32
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=autocast):
            yield
    finally:
        for module, training in modes:
            module.training = training


class ImageBatch(NamedTuple):
    """Readable images of a run of rows, (B, C, S, S), with their rows and sizes, and what is not readable.

    Without a readable row `images` holds one blank, for the forward passes that all processes make together.
    """

    images: Tensor
    rows: list[int]
    sizes: list[tuple[int, int]]
    unreadable: list[Unreadable]


def iterate_images(
    dataset: Any, batches: Sequence[range], *, image_size: int, num_workers: int
) -> Iterator[ImageBatch]:
    """Decode and resize the rows of each batch, a few batches ahead, with threads (decoder and resize free the GIL)."""
    paths = dataset_paths(dataset)
    blank = torch.zeros(getattr(dataset, "in_chans", 3), image_size, image_size, dtype=torch.uint8)

    def load(row: int) -> tuple[Tensor, tuple[int, int]] | Unreadable:
        try:
            image = dataset.read(row)
        except UnreadableImage as error:
            return Unreadable(row, str(paths[row]), getattr(error, "reason", None) or str(error))
        return prepare_image(image, image_size), (image.shape[0], image.shape[1])

    def assemble(batch: range, loaded: Iterator) -> ImageBatch:
        items = list(loaded)
        unreadable = [item for item in items if isinstance(item, Unreadable)]
        readable = [(row, *item) for row, item in zip(batch, items) if not isinstance(item, Unreadable)]
        images = torch.stack(_on_one_scale([image for _, image, _ in readable] or [blank]))
        return ImageBatch(images, [row for row, *_ in readable], [size for *_, size in readable], unreadable)

    if num_workers == 0:
        for batch in batches:
            yield assemble(batch, map(load, batch))
        return
    with ThreadPoolExecutor(num_workers, thread_name_prefix="dinov2-images") as pool:
        ahead = [pool.map(load, batch) for batch in batches[:2]]
        for i, batch in enumerate(batches):
            if i + 2 < len(batches):
                ahead.append(pool.map(load, batches[i + 2]))
            yield assemble(batch, ahead.pop(0))


def _on_one_scale(images: list[Tensor]) -> list[Tensor]:
    """Bytes as float32 from 0 to 1 where they meet images that are so already."""
    if len({image.dtype for image in images}) == 1:
        return images
    return [image.float() / 255 if image.dtype == torch.uint8 else image for image in images]


class ImageFiles:
    """A list of image paths as a data set without labels.

    Args:
        paths: strings; a list that can `read(row)` the file itself (images in tar shards) is asked to.
        in_chans: 3 reads RGB, any other number that many channels as stored.
        limit: use at most so many of the paths, spread evenly over the list.
    """

    def __init__(self, paths: Sequence[str], in_chans: int = 3, limit: int | None = None):
        self.files, self.in_chans = paths, in_chans
        self.chosen = np.arange(len(paths)) if limit is None or limit >= len(paths) else _spread(len(paths), limit)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def paths(self) -> list[str]:
        """The path of each row."""
        return [self.files[int(i)] for i in self.chosen]

    def read(self, row: int) -> np.ndarray:
        """Image of a row, (H, W, C); raises UnreadableImage."""
        number = int(self.chosen[row])
        path = self.files[number]
        data = self.files.read(number) if hasattr(self.files, "read") else read_bytes(path)
        return (
            decode_rgb(data, path=path)
            if self.in_chans == 3
            else decode_channels(data, path=path, channels=self.in_chans)
        )


def _spread(count: int, limit: int) -> np.ndarray:
    return np.linspace(0, count - 1, limit).astype(np.int64)


def dataset_paths(dataset: Any) -> Sequence[str]:
    """The paths of a data set of files, whatever it calls them."""
    for name in ("paths", "images_list"):
        if (paths := getattr(dataset, name, None)) is not None:
            return paths
    return [str(i) for i in range(len(dataset))]


def default_num_workers() -> int:
    """Threads that decode images: the CPUs of this process, shared among the processes of the machine."""
    from dinov2.data.loaders import resolve_num_workers

    return resolve_num_workers("auto", distributed.get_local_size())


def check_image_size(model: nn.Module, image_size: int) -> None:
    """Refuse a size that the model's patches do not tile."""
    patch = getattr(model, "patch_size", 1)
    if image_size <= 0 or image_size % patch:
        nearest = max(1, round(image_size / patch)) * patch
        raise ValueError(
            f"image_size={image_size} is not a multiple of the model's patch size {patch}; nearest: {nearest}"
        )


def extract(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    image_size: int = 224,
    features: str = "cls",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    progress: bool = False,
) -> FeatureTable:
    """Features of every readable image of `dataset`; all processes share the work and all get the whole table.

    Args:
        model: a backbone; its train/eval mode is left as found.
        dataset: has `__len__` and `read(row) -> uint8 (H, W, 3)`, and `labels`, `classes`, `paths`, `sources`, `groups`
            if it can.
        num_workers: decoding threads; None: as many as this process has CPUs, 0: none.
        device: where the model runs; None: where its parameters are.
        dtype: autocast precision; None: float32.
        image_size: side of the square shown to the model, pixels.
        features: "cls", "patch_mean", "registers", "patches" or several joined by "+".
        mean: per channel, what the model was trained with (images scaled to 0..1).
        std: likewise.
        progress: show a progress bar (main process).

    Raises:
        ValueError: unknown features, a size that does not fit the patches, no image, or none that can be read.
    """
    check_image_size(model, image_size)
    parse_features(features)
    device = torch.device(device) if device is not None else next(model.parameters()).device

    def embed(images: Tensor) -> dict[str, Tensor]:
        return token_features(model, normalise_images(images.to(device, non_blocking=True), mean, std), features)

    show = progress and distributed.is_main_process()
    with inference(model, device, dtype), tqdm(total=len(dataset), unit="img", disable=not show) as bar:
        table = extract_with(
            embed, dataset, batch_size=batch_size, num_workers=num_workers, image_size=image_size, bar=bar
        )
    report_unreadable(table.unreadable, len(dataset))
    return table


def extract_with(
    embed: Callable[[Tensor], dict[str, Tensor]],
    dataset: Any,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    image_size: int = 224,
    bar: tqdm | None = None,
) -> FeatureTable:
    """`extract` for any function from bytes (B, 3, S, S) to named features, such as a colour histogram.

    Each process takes one run of rows, so that gathering in rank order restores the order of the data set. Unreadable
    images are listed in the table; whether that is an error is the caller's business.
    """
    if len(dataset) == 0:
        raise ValueError(f"no image to extract features from in {dataset!r}")
    rank, world = distributed.get_global_rank(), distributed.get_global_size()
    rows = range(len(dataset) * rank // world, len(dataset) * (rank + 1) // world)
    # every process makes the same number of forward passes, because those of a sharded model are collective
    steps = math.ceil(math.ceil(len(dataset) / world) / batch_size)
    batches = [rows[i * batch_size : (i + 1) * batch_size] for i in range(steps)]
    num_workers = default_num_workers() if num_workers is None else num_workers

    blocks, kept, sizes, unreadable, layout = [], [], [], [], {}
    for batch in iterate_images(dataset, batches, image_size=image_size, num_workers=num_workers):
        parts = embed(batch.images)
        layout = _layout(parts, parts.values())
        blocks.append(torch.cat([p.float() for p in parts.values()], dim=1)[: len(batch.rows)].cpu())
        kept += batch.rows
        sizes += batch.sizes
        unreadable += batch.unreadable
        if bar is not None:
            bar.update((len(batch.rows) + len(batch.unreadable)) * world)

    features = distributed.gather_rows(torch.cat(blocks)).numpy()
    kept = np.asarray([row for part in distributed.gather_objects(kept) for row in part], dtype=np.int64)
    sizes = [size for part in distributed.gather_objects(sizes) for size in part]
    unreadable = [Unreadable(*item) for part in distributed.gather_objects(unreadable) for item in part]

    pick = lambda names: [str(names[i]) for i in kept] if names is not None and len(names) else []  # noqa: E731
    labels, groups = getattr(dataset, "labels", None), getattr(dataset, "groups", None)
    return FeatureTable(
        features=features,
        labels=np.asarray(labels, np.int64)[kept] if labels is not None else np.full(len(kept), -1, np.int64),
        paths=pick(dataset_paths(dataset)),
        classes=[str(c) for c in getattr(dataset, "classes", None) or ()],
        sources=pick(getattr(dataset, "sources", None)),
        groups=pick(groups) if groups is not None and any(groups) else [],
        sizes=np.asarray(sizes, np.int64).reshape(-1, 2),
        columns=layout,
        unreadable=unreadable,
    )


def _layout(names, blocks) -> dict[str, tuple[int, int]]:
    """Columns of blocks (N, width) laid side by side."""
    stops = np.cumsum([block.shape[1] for block in blocks]).tolist()
    return {name: (start, stop) for name, start, stop in zip(names, [0, *stops], stops)}


def report_unreadable(unreadable: Sequence[Unreadable], total: int) -> None:
    """Name what is missing; nothing left is an error."""
    if len(unreadable) == total:
        raise ValueError(
            f"none of the {total} images can be read; first: {unreadable[0].path} ({unreadable[0].reason})"
        )
    if unreadable:
        listed = "\n".join(f"  {item.path}: {item.reason}" for item in unreadable[:20])
        more = f"\n  and {len(unreadable) - 20} more" if len(unreadable) > 20 else ""
        logger.warning(f"{len(unreadable)} of {total} images cannot be read and have no features:\n{listed}{more}")
