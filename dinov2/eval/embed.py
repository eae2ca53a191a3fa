"""Images in, a table of embeddings on disk out, however many images there are.

    dinov2 embed --weights W --data DIR --out embeddings.parquet

Embeddings are written chunk by chunk into `embeddings.parquet.parts/`, so memory does not grow with the data, and a run
that was stopped goes on with the first missing chunk. At the end the chunks become one file: Parquet (a row group per
chunk), NumPy (`.npz`) or AnnData (`.h5ad`, extra `anndata`).
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from dinov2 import __version__, distributed
from dinov2.data import ImageDataset, LabelledDataset
from dinov2.eval.features import (
    FeatureTable,
    ImageFiles,
    Unreadable,
    check_image_size,
    extract_with,
    inference,
    normalise_images,
    parse_features,
    report_unreadable,
    token_features,
)
from dinov2.eval.report import write_csv
from dinov2.eval.setup import LoadedModel, add_extraction_arguments, fingerprint, load_model
from dinov2.utils.config import default_setup
from dinov2.utils.dtype import as_torch_dtype

logger = logging.getLogger("dinov2")

CHUNK_BYTES = 128 << 20  # of embeddings in memory at a time
MAX_CHUNK_ROWS = 8192
METADATA_KEY = b"dinov2"  # of the Parquet schema: how the embeddings were made, as JSON
TEXT_COLUMNS = ("path", "source", "label", "group")
SUFFIXES = (".parquet", ".npz", ".h5ad")


# --------------------------------------------------------------------------- images


@dataclass
class Images:
    """Some rows of the images to embed, with what is known of each; "" where nothing is."""

    files: ImageFiles
    labels_text: Sequence[str]
    sources: Sequence[str]
    groups: Sequence[str]

    def __len__(self) -> int:
        return len(self.sources)

    @staticmethod
    def open(data: Sequence[str], in_chans: int = 3) -> Images:
        """Every image of folders, manifests or shards, in a fixed order, with its label if it has one."""
        images = ImageDataset(data, in_chans=in_chans)
        count = len(images)
        labels, groups = np.full(count, "", object), np.full(count, "", object)
        sources = np.concatenate([np.full(s.stop - s.start, Path(s.name).name, object) for s in images.spans])
        try:
            labelled = LabelledDataset(data, in_chans=in_chans)
        except ValueError:  # no image has a label
            labelled = None
        if labelled is not None:
            rows = [labelled.paths.row(i) for i in range(len(labelled))]
            labels[rows] = [labelled.classes[label] for label in labelled.labels]
            sources[rows], groups[rows] = labelled.sources, labelled.groups
        return Images(ImageFiles(images.images_list, in_chans), labels, sources, groups)

    def chunk(self, start: int, stop: int) -> Images:
        """The rows from start to stop - 1."""
        files = ImageFiles(self.files.files[start:stop], self.files.in_chans)
        return Images(files, self.labels_text[start:stop], self.sources[start:stop], self.groups[start:stop])

    @property
    def in_chans(self) -> int:
        """Channels per image."""
        return self.files.in_chans

    @property
    def paths(self) -> Sequence[str]:
        """The path of each row."""
        return self.files.paths

    def read(self, row: int) -> np.ndarray:
        """The image of a row, (H, W, C)."""
        return self.files.read(row)


# --------------------------------------------------------------------------- chunks


class ChunkStore:
    """The finished chunks of a run, as Parquet files in a folder that also says what run they belong to."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self.folder = folder
        self.identity = dict(identity)

    def open(self) -> None:
        """Make the folder, or find that of an earlier run of the same kind; chunks of any other run are removed."""
        marker = self.folder / "run.json"
        if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == self.identity:
            logger.info(f"going on with the chunks in {self.folder}")
            return
        if self.folder.exists():
            logger.warning(f"{self.folder} holds chunks of a run with other settings or images: starting anew")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        marker.write_text(json.dumps(self.identity), encoding="utf-8")

    def path(self, number: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"chunk_{number:06d}.parquet"

    def write(self, number: int, table: pa.Table) -> None:
        """Write a chunk whole or not at all."""
        unfinished = self.path(number).with_suffix(".part")
        pq.write_table(table, unfinished, compression="zstd", row_group_size=max(1, table.num_rows))
        unfinished.replace(self.path(number))

    def tables(self) -> Iterator[pa.Table]:
        """The chunks in order, one in memory at a time."""
        for path in sorted(self.folder.glob("chunk_*.parquet")):
            yield pq.read_table(path)

    def unreadable(self) -> list[Unreadable]:
        """What could not be read, of all chunks."""
        found = []
        for path in sorted(self.folder.glob("chunk_*.parquet")):
            described = json.loads(pq.read_schema(path).metadata[METADATA_KEY])
            found += [Unreadable(*item) for item in described["unreadable"]]
        return found


def chunk_table(table: FeatureTable, images: Images, first_row: int, half: bool) -> pa.Table:
    """A chunk as Arrow columns: path, source, label, group, height, width and a fixed-size list per kind of feature."""
    missing = {item.row for item in table.unreadable}
    kept = [row for row in range(len(images)) if row not in missing]
    text = {
        "path": table.paths,
        "source": [images.sources[row] for row in kept],
        "label": [images.labels_text[row] for row in kept],
        "group": [images.groups[row] for row in kept],
    }
    columns = {name: pa.array(values, pa.string()) for name, values in text.items()}
    for i, name in enumerate(("height", "width")):
        columns[name] = pa.array(table.sizes[:, i].astype(np.int32))
    for part, (start, stop) in table.columns.items():
        values = table.features[:, start:stop].astype(np.float16 if half else np.float32)
        columns[part] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), stop - start)
    unreadable = [(first_row + item.row, item.path, item.reason) for item in table.unreadable]
    return pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps({"unreadable": unreadable})})


def embed_images(
    model: LoadedModel,
    images: Images,
    store: ChunkStore,
    *,
    features: str,
    image_size: int,
    batch_size: int,
    chunk_rows: int,
    num_workers: int | None = None,
    dtype: torch.dtype = torch.float32,
    half: bool = False,
    progress: bool = True,
) -> None:
    """Fill the store with the chunks that it lacks; all processes share each chunk, the main one writes it."""
    backbone = model.backbone
    device = next(backbone.parameters()).device

    def embed(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        pixels = pixels.to(device, non_blocking=True)
        return token_features(backbone, normalise_images(pixels, model.mean, model.std), features)

    starts = range(0, len(images), chunk_rows)
    done = distributed.broadcast_object([store.path(i).is_file() for i in range(len(starts))])
    show = progress and distributed.is_main_process()
    with inference(backbone, device, dtype), tqdm(total=len(images), unit="img", disable=not show) as bar:
        for number, start in enumerate(starts):
            chunk = images.chunk(start, min(start + chunk_rows, len(images)))
            if done[number]:
                bar.update(len(chunk))
                continue
            settings = {"batch_size": batch_size, "num_workers": num_workers, "image_size": image_size}
            table = extract_with(embed, chunk, bar=bar, **settings)
            if distributed.is_main_process():
                store.write(number, chunk_table(table, chunk, start, half))
    distributed.barrier()


def rows_per_chunk(width: int, batch_size: int) -> int:
    """Rows of `width` numbers that are held in memory at a time: whole batches, at least one for every process."""
    batches = min(MAX_CHUNK_ROWS, CHUNK_BYTES // (4 * width)) // batch_size
    return max(batches, distributed.get_global_size()) * batch_size


def width_of(model: LoadedModel, features: str, image_size: int) -> int:
    """Numbers per image."""
    backbone = model.backbone
    patches = (image_size // backbone.patch_size) ** 2
    tokens = {"cls": 1, "patch_mean": 1, "registers": backbone.num_register_tokens, "patches": patches}
    return sum(tokens[part] for part in parse_features(features)) * backbone.embed_dim


# --------------------------------------------------------------------------- files


def write_parquet(store: ChunkStore, out: Path, about: Mapping[str, Any]) -> int:
    """Join the chunks into one Parquet file, a row group each; returns the number of rows."""
    writer, rows = None, 0
    for table in store.tables():
        table = table.replace_schema_metadata({METADATA_KEY: json.dumps(about)})
        if writer is None:
            writer = pq.ParquetWriter(out, table.schema, compression="zstd")
        if table.num_rows:
            writer.write_table(table, row_group_size=table.num_rows)
        rows += table.num_rows
    writer.close()
    return rows


def write_npz(store: ChunkStore, out: Path, about: Mapping[str, Any]) -> int:
    """Join the chunks into one NumPy archive: an array per column, `about` as JSON text; vectors are streamed."""
    columns = next(store.tables()).schema
    rows = sum(pq.read_metadata(path).num_rows for path in store.folder.glob("chunk_*.parquet"))
    with zipfile.ZipFile(out, "w", allowZip64=True) as archive:
        for field in columns:
            with archive.open(f"{field.name}.npy", "w", force_zip64=True) as file:
                if pa.types.is_fixed_size_list(field.type):
                    dtype = np.dtype(field.type.value_type.to_pandas_dtype())
                    shape = (rows, field.type.list_size)
                    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_2_0(file, header)
                    for table in store.tables():
                        file.write(_matrix(table.column(field.name)).tobytes())
                    continue
                values = [v for table in store.tables() for v in table.column(field.name).to_pylist()]
                kind = np.str_ if pa.types.is_string(field.type) else np.int32
                np.lib.format.write_array(file, np.asarray(values, dtype=kind), allow_pickle=False)
        with archive.open("about.npy", "w") as file:
            np.lib.format.write_array(file, np.asarray(json.dumps(about)), allow_pickle=False)
    return rows


def write_anndata(store: ChunkStore, out: Path, about: Mapping[str, Any]) -> int:
    """Join the chunks into one AnnData file, in memory: the first feature as X, all as obsm, the rest as obs."""
    try:
        import anndata
        import pandas as pd
    except ImportError as error:
        raise ImportError(".h5ad files need the extra: pip install 'dinov2[anndata]'") from error
    table = pa.concat_tables(list(store.tables()))
    vectors = [f.name for f in table.schema if pa.types.is_fixed_size_list(f.type)]
    obs = pd.DataFrame({name: table.column(name).to_pylist() for name in table.column_names if name not in vectors})
    obs.index = obs["path"]
    result = anndata.AnnData(
        X=_matrix(table.column(vectors[0])).astype(np.float32),
        obs=obs.drop(columns="path"),
        obsm={f"X_{name}": _matrix(table.column(name)) for name in vectors},
        uns={"dinov2": json.dumps(about)},
    )
    result.write_h5ad(out)
    return table.num_rows


WRITERS = {".parquet": write_parquet, ".npz": write_npz, ".h5ad": write_anndata}


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of fixed-size lists as (rows, width)."""
    width = column.type.list_size
    flat = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate([*flat, np.zeros(0, column.type.value_type.to_pandas_dtype())]).reshape(-1, width)


def load_embeddings(path: str | Path, features: str | None = None) -> FeatureTable:
    """Read a `.parquet` or `.npz` file of embeddings.

    Args:
        path: what `dinov2 embed` wrote.
        features: the kinds to read, such as "cls" or "cls+patch_mean"; None: all there are.

    Raises:
        ValueError: another kind of file, or features that it does not hold.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no embeddings at {path}; `dinov2 embed` writes them")
    read = {".parquet": _read_parquet, ".npz": _read_npz}.get(path.suffix)
    if read is None:
        raise ValueError(f"{path}: embeddings are read from .parquet or .npz files")
    text, sizes, vectors = read(path, features.split("+") if features else None)
    names = sorted(set(text["label"]) - {""})
    number = {name: i for i, name in enumerate(names)} | {"": -1}
    stops = np.cumsum([v.shape[1] for v in vectors.values()]).tolist()
    return FeatureTable(
        features=np.concatenate([v.astype(np.float32) for v in vectors.values()], axis=1),
        labels=np.array([number[label] for label in text["label"]], np.int64),
        paths=text["path"],
        classes=names,
        sources=text["source"],
        groups=text["group"] if any(text["group"]) else [],
        sizes=sizes,
        columns=dict(zip(vectors, zip([0, *stops], stops))),
    )


def _choose(path: Path, there: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    if missing := [name for name in wanted or () if name not in there]:
        raise ValueError(f"{path} holds {', '.join(there) or 'no features'}, not {', '.join(missing)}")
    return list(wanted or there)


def _read_parquet(path: Path, wanted: Sequence[str] | None):
    schema = pq.read_schema(path)
    names = _choose(path, [f.name for f in schema if pa.types.is_fixed_size_list(f.type)], wanted)
    table = pq.read_table(path, columns=[*TEXT_COLUMNS, "height", "width", *names])
    text = {name: table.column(name).to_pylist() for name in TEXT_COLUMNS}
    sizes = np.stack([table.column(name).to_numpy() for name in ("height", "width")], axis=1).astype(np.int64)
    return text, sizes, {name: _matrix(table.column(name)) for name in names}


def _read_npz(path: Path, wanted: Sequence[str] | None):
    with np.load(path, allow_pickle=False) as data:
        names = _choose(path, [name for name in data.files if data[name].ndim == 2], wanted)
        text = {name: data[name].tolist() for name in TEXT_COLUMNS}
        sizes = np.stack([data["height"], data["width"]], axis=1).astype(np.int64)
        return text, sizes, {name: data[name] for name in names}


# --------------------------------------------------------------------------- command line


def get_args_parser(
    description: str | None = None,
    parents: list[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """The command line of `dinov2 embed`."""
    parser = argparse.ArgumentParser(
        prog="dinov2 embed",
        description=description or "Turn images into a table of embeddings.",
        parents=parents or [],
        add_help=add_help,
    )
    add = parser.add_argument
    add("--weights", required=True, help="weights of the model, in any known layout")
    add("--data", nargs="+", required=True, help="folders of images, manifests or tar shards; labels are not needed")
    add("--out", required=True, help="file to write: .parquet, .npz or .h5ad (AnnData)")
    add(
        "--features",
        nargs="+",
        default=["cls", "patch_mean"],
        help="cls, patch_mean, registers, patches (default: the first two)",
    )
    add("--half", action="store_true", help="store half precision: half the size")
    add_extraction_arguments(parser, image_size=None)
    add("--overwrite", action="store_true", help="replace the file if it is there")
    add("--output-dir", help="where the log goes (default: the folder of --out)")
    return parser


def run(args: argparse.Namespace) -> Path:
    """Do what the command line asks for; returns the file that was written."""
    out = Path(args.out)
    if out.suffix not in WRITERS:
        raise ValueError(f"--out {out}: the name must end in {', '.join(SUFFIXES)}")
    if distributed.broadcast_object(out.exists()) and not args.overwrite:
        raise FileExistsError(f"{out} exists; --overwrite replaces it")
    features = "+".join(args.features)
    parse_features(features)
    model = load_model(args.weights)
    image_size = args.image_size or model.image_size
    check_image_size(model.backbone, image_size)
    images = Images.open(args.data, model.options["in_chans"])
    about = {
        "dinov2": __version__,
        "weights": str(args.weights),
        "model": fingerprint(model.backbone),
        "options": dict(model.options),
        "mean": model.mean,
        "std": model.std,
        "image_size": image_size,
        "dtype": args.dtype,
        "features": features,
    }
    chunk_rows = rows_per_chunk(width_of(model, features, image_size), args.batch_size)
    identity = {
        **{k: v for k, v in about.items() if k != "weights"},
        "images": len(images),
        "data": [str(Path(path).resolve()) for path in args.data],
        "first_and_last": [images.paths[0], images.paths[-1]],
        "chunk_rows": chunk_rows,
        "half": args.half,
    }
    store = ChunkStore(out.with_name(f"{out.name}.parts"), json.loads(json.dumps(identity)))
    if distributed.is_main_process():
        store.open()
    distributed.barrier()
    embed_images(
        model,
        images,
        store,
        features=features,
        image_size=image_size,
        batch_size=args.batch_size,
        chunk_rows=chunk_rows,
        num_workers=args.num_workers,
        dtype=as_torch_dtype(args.dtype),
        half=args.half,
    )
    if distributed.is_main_process():
        finish(store, out, about, len(images))
    distributed.barrier()
    return out


def finish(store: ChunkStore, out: Path, about: Mapping[str, Any], total: int) -> None:
    """Join the chunks, list what could not be read, and remove the chunks."""
    unreadable = store.unreadable()
    report_unreadable(unreadable, total)
    unfinished = out.with_name(f".{out.name}.part")
    rows = WRITERS[out.suffix](store, unfinished, about)
    unfinished.replace(out)
    if unreadable:
        listing = out.with_name(f"{out.stem}.unreadable.csv")
        write_csv(listing, (item._asdict() for item in unreadable))
        logger.warning(f"{len(unreadable)} images without an embedding: {listing}")
    shutil.rmtree(store.folder)
    logger.info(f"{rows} embeddings: {out}")


def main(argv: list[str] | None = None) -> int:
    """`dinov2 embed`."""
    args = get_args_parser().parse_args(argv)
    args.output_dir = args.output_dir or str(Path(args.out).resolve().parent)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    default_setup(args)
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
