"""Score frozen features honestly: folds or a fixed test set, several classifiers, intervals, calibration, baselines.

    dinov2 evaluate --weights W --data DIR [--test DIR] [--label-map FILE] [--report DIR]

Features are extracted once and kept in the cache folder. Below `main`, everything reads feature tables, never a model.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import hashlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch import Tensor

from dinov2 import distributed
from dinov2.data import LabelledDataset
from dinov2.data.duplicates import content_hashes
from dinov2.data.manifest import cache_folder, describe_counts
from dinov2.eval.batch_effects import batch_effects
from dinov2.eval.calibration import apply_temperature, fit_temperature
from dinov2.eval.features import FeatureTable, available_features, concatenate, extract, extract_with, parse_features
from dinov2.eval.probes import (
    align_classes,
    choose_C,
    knn_predict,
    linear_probe_predict,
    logistic_regression_predict,
    stratified_share,
)
from dinov2.eval.report import Report, write_report
from dinov2.eval.setup import (
    LoadedModel,
    add_cache_arguments,
    add_extraction_arguments,
    fingerprint,
    load_model,
)
from dinov2.utils.config import default_setup
from dinov2.utils.dtype import as_torch_dtype

logger = logging.getLogger("dinov2")

CACHE_FORMAT = 1  # part of every key: a change of how features are made makes new ones
HISTOGRAM_LEVELS = 8  # per colour: 512 bins


# --------------------------------------------------------------------------- splits


class Split(NamedTuple):
    """Rows to learn from and rows to be scored on."""

    train: np.ndarray
    test: np.ndarray


def make_folds(table: FeatureTable, folds: int, seed: int = 0) -> list[Split]:
    """Stratified folds, with the images of a group (patient, slide) in one fold when the table has groups.

    The folds depend on paths, labels, groups and seed, not on the order of the rows. An image whose group is empty is a
    group of its own.

    Raises:
        ValueError: fewer than two classes, a class with fewer images than folds, or fewer groups than folds.
    """
    counts = np.bincount(table.labels, minlength=len(table.classes))
    if (counts > 0).sum() < 2:
        present = [table.classes[i] for i in np.flatnonzero(counts)]
        raise ValueError(
            f"only one class ({', '.join(present)}): nothing to tell apart; the data needs a sub-folder per class"
        )
    if small := {table.classes[i]: int(counts[i]) for i in np.flatnonzero(counts) if counts[i] < folds}:
        raise ValueError(
            f"classes with fewer images than the {folds} folds: {small}; give fewer --folds, "
            f"or leave them out with --exclude-classes {' '.join(small)}"
        )
    order = np.argsort(np.asarray(table.paths))
    labels = table.labels[order]
    if len(table.groups):
        groups = np.array([table.groups[i] or table.paths[i] for i in order])
        _check_groups(table, folds)
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(order, labels, groups)
    else:
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed).split(order, labels)
    return [Split(np.sort(order[train]), np.sort(order[test])) for train, test in splitter]


def _check_groups(table: FeatureTable, folds: int) -> None:
    count = len({group or path for group, path in zip(table.groups, table.paths)})
    if count < folds:
        raise ValueError(f"{count} groups (patients or slides) cannot make {folds} folds; give fewer --folds")
    for i, name in enumerate(table.classes):
        groups = {table.groups[row] for row in np.flatnonzero(table.labels == i)}
        if 0 < len(groups) < folds:
            logger.warning(
                f"class {name} occurs in {len(groups)} group(s) only: some of the {folds} folds do not test it"
            )


def hold_out(labels: np.ndarray, groups: Sequence[str], share: float) -> np.ndarray:
    """Training rows to choose settings on, as a mask (N,): a share of each class, in whole groups if there are any.

    Settings that were chosen on images of patients that the classifier knows would be too confident about new ones.
    """
    parts = round(1 / share)
    if len(set(groups)) < parts:
        return stratified_share(labels, share, seed=0)
    held = np.zeros(len(labels), bool)
    splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=0)
    held[next(splitter.split(labels, labels, groups))[1]] = True
    return held


# --------------------------------------------------------------------------- classifiers


def method_names(ks: Sequence[int]) -> dict[str, str]:
    """The classifiers and how a table calls them: {"knn_1": "1-NN", ...}."""
    return {**{f"knn_{k}": f"{k}-NN" for k in ks}, "linear": "linear probe", "log_regression": "logistic regression"}


@dataclass(frozen=True)
class Classifier:
    """A method with its settings: predicts the classes of some rows from others."""

    method: str
    num_classes: int
    C: float = 1.0  # of logistic regression

    @staticmethod
    def choose(
        method: str, features: np.ndarray, labels: np.ndarray, groups: Sequence[str], num_classes: int
    ) -> Classifier:
        """The classifier of a name in `method_names`, its settings chosen on these training rows alone."""
        if method != "log_regression":
            return Classifier(method, num_classes)
        return Classifier(
            method, num_classes, C=choose_C(features, labels, num_classes, tune=hold_out(labels, groups, 0.1))
        )

    def predict(self, train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray) -> np.ndarray:
        """Class probabilities (M, C)."""
        data = (train_features, train_labels, test_features)
        if self.method.startswith("knn_"):
            k = self.neighbours
            probabilities: Tensor = knn_predict(*data, [k], num_classes=self.num_classes)[k]
        elif self.method == "linear":
            probabilities = linear_probe_predict(*data, self.num_classes)
        elif self.method == "log_regression":
            probabilities = logistic_regression_predict(*data, self.num_classes, C=self.C)
        else:
            raise ValueError(f"unknown method {self.method!r}; known: knn_K, linear, log_regression")
        return probabilities.double().numpy()

    @property
    def neighbours(self) -> int:
        """The k of k-NN, 0 for others."""
        return int(self.method.removeprefix("knn_")) if self.method.startswith("knn_") else 0

    def smooth(self, probabilities: np.ndarray) -> np.ndarray:
        """Without zeros: k neighbours get one more that is undecided, for a class without a vote may be right."""
        k = self.neighbours
        return (k * probabilities + 1 / self.num_classes) / (k + 1) if k else probabilities


@dataclass(frozen=True)
class Outcome:
    """What one classifier on one kind of features said about every tested image."""

    model: str
    features: str
    method: str
    baseline: bool
    rows: np.ndarray  # (N,) rows of the table, in its order
    folds: np.ndarray  # (N,) the fold that tested a row
    targets: np.ndarray  # (N,)
    probabilities: np.ndarray  # (N, C)
    calibrated: np.ndarray  # (N, C), after temperature scaling
    temperatures: tuple[float, ...]  # one per fold

    @property
    def confidence(self) -> np.ndarray:
        """Probabilities to rank predictions by: calibrated, so that folds compare, if they tell predictions apart."""
        says_nothing = np.ptp(self.probabilities.max(axis=1)) == 0  # 1-NN
        return self.probabilities if says_nothing else self.calibrated


def cross_validate(
    table: FeatureTable,
    splits: Sequence[Split],
    method: str,
    *,
    model: str = "",
    features: str = "",
    baseline: bool = False,
) -> Outcome:
    """Fit on the training rows of every split and predict its test rows, as they come and with a temperature.

    The temperature of a split is fitted on a fifth of its training rows, predicted by a classifier of the same settings
    fitted on the rest: no tested image has a say in its own calibration.
    """
    groups = np.array([group or path for group, path in zip(table.groups, table.paths)], dtype=object)
    parts = []
    for number, split in enumerate(splits):
        x, y, test = table.features[split.train], table.labels[split.train], table.features[split.test]
        own_groups = groups[split.train] if len(groups) else ()
        classifier = Classifier.choose(method, x, y, own_groups, len(table.classes))
        probabilities = classifier.predict(x, y, test)
        held = hold_out(y, own_groups, 0.2)
        inner = classifier.predict(x[~held], y[~held], x[held])
        temperature = fit_temperature(classifier.smooth(inner), y[held])
        calibrated = apply_temperature(classifier.smooth(probabilities), temperature)
        parts.append((split.test, np.full(len(split.test), number), probabilities, calibrated, temperature))
    rows, folds, probabilities, calibrated = (np.concatenate([part[i] for part in parts]) for i in range(4))
    order = np.argsort(rows)
    return Outcome(
        model=model,
        features=features,
        method=method,
        baseline=baseline,
        rows=rows[order],
        folds=folds[order],
        targets=table.labels[rows[order]],
        probabilities=probabilities[order],
        calibrated=calibrated[order],
        temperatures=tuple(part[-1] for part in parts),
    )


# --------------------------------------------------------------------------- label maps


def read_label_map(path: str | Path) -> dict[str, str]:
    """Class names to class names, from YAML (`name: other`) or CSV with the header `from,to`; to nothing: left out.

    Raises:
        ValueError: not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no label map at {path}")
    if path.suffix.lower() == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"from", "to"} <= set(reader.fieldnames or ()):
                raise ValueError(f"{path}: the header must have the columns from,to; it has {reader.fieldnames}")
            return {row["from"].strip(): (row["to"] or "").strip() for row in reader}
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected lines such as `band_neutrophil: Neutrophil`")
    return {str(key): "" if value is None else str(value) for key, value in content.items()}


def apply_label_map(table: FeatureTable, mapping: Mapping[str, str]) -> tuple[FeatureTable, dict[str, int]]:
    """The table with its classes renamed (and perhaps merged), and how many images of which class were left out.

    Classes that the map does not name keep their name.
    """
    renamed = [mapping.get(name, name) for name in table.classes]
    classes = sorted({name for name in renamed if name})
    number = np.array([classes.index(name) if name else -1 for name in renamed])
    labels = number[table.labels]
    counts = np.bincount(table.labels, minlength=len(table.classes))
    left_out = {name: int(n) for name, new, n in zip(table.classes, renamed, counts) if not new and n}
    return replace(table, labels=labels, classes=classes).take(np.flatnonzero(labels >= 0)), left_out


def check_label_map(mapping: Mapping[str, str], tables: Sequence[FeatureTable]) -> None:
    """Refuse a map that names a class that no data set has: a typing error would leave its images unmapped."""
    known = sorted({name for table in tables for name in table.classes})
    for name in mapping:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"the label map (or --exclude-classes) names {name!r}, which is no class of the data: {known}{hint}"
            )


def refuse_shared_images(train: LabelledDataset, test: LabelledDataset) -> None:
    """Refuse an image that is in both data sets: the classifier would know it by heart.

    Raises:
        ValueError: the same file is in both.
    """
    if shared := sorted(set(map(os.path.abspath, train.paths)) & set(map(os.path.abspath, test.paths))):
        raise ValueError(
            f"{len(shared)} images are both in --data and in --test, such as {shared[0]}; give folders without "
            "common images, or --data alone for cross-validation"
        )


# --------------------------------------------------------------------------- features, once


def colour_histogram(images: Tensor) -> dict[str, Tensor]:
    """Square roots of the shares of 8 x 8 x 8 colours in images (B, 3, H, W), bytes: (B, 512).

    The roots make the dot product of two histograms their Bhattacharyya similarity.
    """
    levels = images.long() * HISTOGRAM_LEVELS // 256
    colours = (levels[:, 0] * HISTOGRAM_LEVELS + levels[:, 1]) * HISTOGRAM_LEVELS + levels[:, 2]
    counts = torch.stack([torch.bincount(c.flatten(), minlength=HISTOGRAM_LEVELS**3) for c in colours])
    return {"histogram": (counts.float() / colours[0].numel()).sqrt()}


def cached(key: Mapping[str, Any], dataset: Any, folder: Path | None, compute) -> FeatureTable:
    """What `compute()` gives, or what it gave before for the same key and the same files.

    The key covers path, size and time of change of every file. All processes take part; the main one writes.
    """
    if folder is None:
        return compute()
    path = folder / f"{_digest(key, dataset)}.npz"
    if distributed.broadcast_object(path.is_file()):
        logger.info(f"features from {path}")
        return FeatureTable.load(path)
    table = compute()
    if distributed.is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        table.save(unfinished)
        unfinished.replace(path)
    distributed.barrier()
    return table


def _digest(key: Mapping[str, Any], dataset: Any) -> str:
    digest = hashlib.sha256(json.dumps({"format": CACHE_FORMAT, **key}, sort_keys=True).encode())
    columns = (dataset.paths, dataset.labels, dataset.sources, dataset.groups)
    for path, label, source, group in zip(*columns):
        try:
            state = Path(path).stat()
            stamp = (state.st_size, state.st_mtime_ns)
        except OSError:  # inside a shard, or unreadable: then the path has to do
            stamp = ()
        digest.update(repr((str(path), dataset.classes[label], source, group, stamp)).encode())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Entrant:
    """A row of the result table before it is scored: its name and its features of each data set."""

    name: str
    baseline: bool
    tables: list[FeatureTable]  # of --data and, if given, --test

    def kinds(self, wanted: Sequence[str]) -> list[str]:
        """The kinds of features that are scored: those wanted, or for a baseline without tokens the one it has."""
        return list(wanted) if "cls" in self.tables[0].columns else list(self.tables[0].columns)


def collect_entrants(
    args: argparse.Namespace, models: Mapping[str, LoadedModel], datasets: Sequence[Any]
) -> list[Entrant]:
    """Features of every model and baseline for every data set."""
    folder = None if args.no_cache else cache_folder(args.cache_dir) / "features"
    entrants = [
        Entrant(name, False, [model_features(model, data, args, folder) for data in datasets])
        for name, model in models.items()
    ]
    if not args.no_baselines:
        first = next(iter(models.values()))
        untrained = first.untrained(args.seed)
        name = f"untrained {first.options.get('arch') or 'network'}"
        entrants.append(Entrant(name, True, [model_features(untrained, data, args, folder) for data in datasets]))
        if first.options["in_chans"] == 3:
            histograms = [histogram_features(data, args, folder) for data in datasets]
            entrants.append(Entrant("colour histogram", True, histograms))
    return entrants


def model_features(model: LoadedModel, dataset: Any, args: argparse.Namespace, folder: Path | None) -> FeatureTable:
    """Every part that the model gives, so that other --features need no second pass."""
    if args.image_size != model.image_size:
        logger.info(
            "images are seen at %d pixels, the model learned at %d (--image-size)", args.image_size, model.image_size
        )
    features = available_features(model.backbone)
    dtype = as_torch_dtype(args.dtype)
    key = {
        "model": fingerprint(model.backbone),
        "options": {k: v for k, v in model.options.items() if k.startswith("interpolate")},
        "normalisation": [model.mean, model.std],
        "image_size": args.image_size,
        "dtype": str(dtype),
        "features": features,
    }

    def compute() -> FeatureTable:
        return extract(
            model.backbone,
            dataset,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            dtype=dtype,
            image_size=args.image_size,
            features=features,
            mean=model.mean,
            std=model.std,
            progress=True,
        )

    return cached(key, dataset, folder, compute)


def histogram_features(dataset: Any, args: argparse.Namespace, folder: Path | None) -> FeatureTable:
    """The colour histogram of what a model would see."""
    settings = {"image_size": args.image_size, "num_workers": args.num_workers}
    key = {"model": f"histogram{HISTOGRAM_LEVELS}", "image_size": args.image_size}
    return cached(key, dataset, folder, lambda: extract_with(colour_histogram, dataset, **settings))


def model_names(args: argparse.Namespace) -> list[str]:
    """What the tables call each model: --names, or the file with its folder."""
    if args.names:
        if len(args.names) != len(args.weights):
            raise ValueError(f"{len(args.weights)} --weights need as many --names, got {len(args.names)}")
        return args.names
    names = ["/".join(Path(weights).with_suffix("").parts[-2:]) for weights in args.weights]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def copies_across(splits: Sequence[Split], contents: np.ndarray) -> np.ndarray:
    """Return the sorted rows that are tested in a split that trains on an image with the same content.

    Args:
        splits: rows of training and of testing.
        contents: one hash per row.
    """
    found = [split.test[np.isin(contents[split.test], contents[split.train])] for split in splits]
    return np.unique(np.concatenate(found))


# --------------------------------------------------------------------------- command line


def get_args_parser(
    description: str | None = None,
    parents: list[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """The command line of `dinov2 evaluate`."""
    parser = argparse.ArgumentParser(
        prog="dinov2 evaluate",
        description=description or "Score models on labelled images, with baselines, intervals and calibration.",
        parents=parents or [],
        add_help=add_help,
    )
    add = parser.add_argument
    add("--weights", nargs="+", required=True, help="weights of one model or several, in any known layout")
    add("--names", nargs="+", help="what the tables call them")
    add("--data", nargs="+", required=True, help="folders with a sub-folder per class, or CSV manifests")
    add("--test", nargs="+", help="test on these instead of on folds of --data")
    add("--label-map", help="YAML (`name: other`) or CSV (from,to): renames classes, merges them, or leaves them out")
    add("--exclude-classes", nargs="+", default=[], metavar="CLASS", help="classes to leave out")
    add(
        "--report",
        "--output-dir",
        dest="output_dir",
        default="evaluation",
        help="folder to write (default: %(default)s)",
    )
    add("--folds", type=int, default=5, help="of the cross-validation (default: %(default)s)")
    add(
        "--features",
        nargs="+",
        default=["cls"],
        help="cls, patch_mean, registers, or several joined by + (default: cls)",
    )
    add("--k", nargs="+", type=int, default=[1, 20], help="numbers of neighbours (default: 1 20)")
    add_extraction_arguments(parser)
    add("--seed", type=int, default=0, help="of folds, intervals and the untrained network (default: %(default)s)")
    add("--no-baselines", action="store_true", help="leave out the untrained network and the colour histogram")
    add_cache_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> Report | None:
    """Do what the command line asks for; the report on the main process, None on the others."""
    for features in args.features:
        parse_features(features)
    if min(args.k) < 1:
        raise ValueError(f"--k {min(args.k)}: a vote needs one neighbour or more")
    if args.folds < 2 and not args.test:
        raise ValueError(f"--folds {args.folds}: cross-validation needs two folds or more")
    models = {name: load_model(weights) for name, weights in zip(model_names(args), args.weights)}
    channels = {model.options["in_chans"] for model in models.values()}
    if len(channels) > 1:
        raise ValueError(f"models for images of {sorted(channels)} channels cannot be compared on the same images")
    (in_chans,) = channels
    datasets = [LabelledDataset(data, in_chans=in_chans) for data in (args.data, args.test) if data]
    if args.test:
        refuse_shared_images(*datasets)
    skipped = sum((data.skipped for data in datasets), Counter())
    if skipped:
        logger.warning(f"files that are not scored: {describe_counts(skipped)}")
    entrants = collect_entrants(args, models, datasets)
    if not distributed.is_main_process():
        return None

    mapping = read_label_map(args.label_map) if args.label_map else {}
    mapping |= dict.fromkeys(args.exclude_classes, "")
    check_label_map(mapping, entrants[0].tables)
    tables, left_out = zip(*(apply_label_map(table, mapping) for table in entrants[0].tables))
    if len(tables) == 2:
        align_classes(*tables)
        sizes = [len(table) for table in tables]
        splits = [Split(np.arange(sizes[0]), np.arange(sizes[0], sum(sizes)))]
    else:
        splits = make_folds(tables[0], args.folds, args.seed)
    contents = {path: content for data in datasets for path, content in zip(data.paths, content_hashes(data.paths))}
    copies = copies_across(splits, np.array([contents[path] for table in tables for path in table.paths]))
    if len(copies):
        logger.warning(
            "%d test images are copies, byte for byte, of training images, such as %s: the scores are too good by "
            "them. `dinov2 check --report` lists copies; give them a common `group` in a manifest, or remove them",
            len(copies),
            concatenate(tables).paths[copies[0]],
        )

    outcomes, effects = [], {}
    for entrant in entrants:
        whole = concatenate([apply_label_map(table, mapping)[0] for table in entrant.tables])
        for kind in entrant.kinds(args.features):
            table = whole.select(kind)
            for method in method_names(args.k):
                logger.info(f"{entrant.name}, {kind}: {method}")
                outcomes.append(
                    cross_validate(table, splits, method, model=entrant.name, features=kind, baseline=entrant.baseline)
                )
            if len(set(table.sources)) > 1:
                effects[entrant.name, kind] = batch_effects(table, folds=args.folds, seed=args.seed)
    report = Report(
        table=concatenate(tables),
        splits=splits,
        outcomes=outcomes,
        method_names=method_names(args.k),
        batch_effects=effects,
        left_out=dict(sum(map(Counter, left_out), Counter())),  # of both data sets
        skipped=dict(skipped),
        copies=len(copies),
        settings=vars(args),
        seed=args.seed,
    )
    write_report(report, args.output_dir)
    return report


def main(argv: list[str] | None = None) -> int:
    """`dinov2 evaluate`."""
    args = get_args_parser().parse_args(argv)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    default_setup(args)
    report = run(args)
    if report is not None:
        print(report.main_table())
        print(f"\nReport: {Path(args.output_dir) / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
