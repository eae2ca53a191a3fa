"""The page of `dinov2 check --report`: one HTML file with its pictures inside, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from string import Template

import cv2
import numpy as np
from omegaconf import OmegaConf
from torch import Tensor

from .audit import NO_PIXELS, PROBLEMS, Audit, decode, to_preview
from .augmentations import DataAugmentationDINO
from .decode import UnreadableImage
from .manifest import EMPTY_FILE, describe_counts

_EXAMPLES = 24  # pictures per problem
_GROUPS = 8  # groups of duplicates shown
_GROUP_EXAMPLES = 4
_FOLDERS = 200
_THUMBNAIL = 248  # pixels: twice what the page shows, for sharp screens
_CROPS = {"global_crops_scale": (0.32, 1.0), "local_crops_scale": (0.05, 0.32), "local_crops_number": 8}


def write_report(audit: Audit, path: str, *, show_crops: int = 0, config_file: str | None = None) -> None:
    """Write the page.

    Args:
        audit: what was found.
        path: of the page.
        show_crops: images whose crops are drawn, spread over the data set.
        config_file: a training config (YAML); its sections `crops` and `augmentations` say how they are drawn.
    """
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    crops = _crops(audit, show_crops, config_file) if show_crops else ""
    page = template.substitute(
        title="Data check",
        sources="<br>".join(_text(source) for source in audit.catalog.sources),
        verdict_class="bad" if audit.hurts else "good",
        verdict=_verdict(audit),
        tiles="".join(f"<div class=tile><b>{value}</b><span>{name}</span></div>" for name, value in _tiles(audit)),
        overview=_overview(audit),
        problems=f"<div class=problems>{''.join(_problem(audit, code) for code in audit.counts)}</div>",
        charts=_charts(audit),
        folders=_folders(audit),
        config=_config(audit),
        crops=crops,
        footer=f"dinov2 check, {time.strftime('%Y-%m-%d %H:%M')}, {audit.seconds:.1f} s",
    )
    Path(path).write_text(page, encoding="utf-8", errors="replace")


def _text(value: object) -> str:
    return html.escape(str(value))


def _verdict(audit: Audit) -> str:
    hurting = [code for code in audit.counts if PROBLEMS[code].hurts]
    if not hurting:
        return "Nothing here would hurt training."
    names = ", ".join(PROBLEMS[code].title.lower() for code in hurting)
    return f"{len(hurting)} kind{'s' * (len(hurting) > 1)} of problem would hurt training: {_text(names)}."


def _tiles(audit: Audit) -> Iterator[tuple[str, str]]:
    records = audit.records
    seen = records[records["width"] > 0]
    excluded = sum(len(rows) for rows in audit.excluded().values())
    yield "images", f"{len(records):,}"
    yield "megabytes", f"{records['bytes'].sum(dtype=np.int64) / 1e6:,.0f}"
    yield "folders", f"{len(audit.folders):,}"
    if len(seen):
        yield "median size, pixels", f"{np.median(seen['width']):.0f} × {np.median(seen['height']):.0f}"
    yield "findings to exclude", f"{excluded:,}"
    if audit.held_out is not None:
        yield "held out", f"{len(audit.held_out):,}"


def _overview(audit: Audit) -> str:
    skipped = [
        f"<p class=soft>Skipped in <span class=path>{_text(index.root)}</span>: {_text(describe_counts(others))}</p>"
        for index in audit.catalog.indexes
        if (others := {name: count for name, count in index.skipped.items() if name != EMPTY_FILE})
    ]
    if not audit.counts:
        return "".join(skipped)
    largest = max(audit.counts.values())
    rows = "".join(
        f"<tr><td><a href='#{code}'>{PROBLEMS[code].title}</a></td><td>{_badge(code)}</td>"
        f"<td class=number>{count:,}</td><td style='width:28%'><span class='bar{' bad' * PROBLEMS[code].hurts}' "
        f"style='width:{100 * count / largest:.1f}%'></span></td>"
        f"<td class=soft>{_text(PROBLEMS[code].meaning)}</td></tr>"
        for code, count in audit.counts.items()
    )
    return f"<h2>Findings</h2><div class='panel scroll'><table>{rows}</table></div>{''.join(skipped)}"


def _badge(code: str) -> str:
    return "<span class='badge bad'>hurts</span>" if PROBLEMS[code].hurts else "<span class='badge note'>note</span>"


# ------------------------------------------------------------------------------------------------------ contact sheets


def _problem(audit: Audit, code: str) -> str:
    problem, count = PROBLEMS[code], audit.counts[code]
    wide = code in NO_PIXELS or code in audit.groups or count > 2
    if code == "empty":
        files = [(path, "0 bytes") for path in audit.empty[:_EXAMPLES]]
        body, shown = _file_list(files), len(files)
    elif code in NO_PIXELS:
        rows = _spread(audit.findings[code], _EXAMPLES).tolist()
        body, shown = _file_list((audit.catalog.path(row), audit.reasons[row]) for row in rows), len(rows)
    elif code in audit.groups:
        groups = audit.groups[code][:_GROUPS]
        body = _sheet(f"<div class=group>{''.join(_group_cards(audit, group))}</div>" for group in groups)
        shown = sum(min(len(group), _GROUP_EXAMPLES) for group in groups)
    else:
        rows = _spread(audit.findings[code], _EXAMPLES).tolist()
        body, shown = _sheet(_card(audit, row, audit.detail(code, row)) for row in rows), len(rows)
    more = f" · {shown:,} shown" if shown < count else ""
    return (
        f"<section class='problem panel{' wide' * wide}' id={code}>"
        f"<div class=head><h3>{problem.title}</h3>{_badge(code)}"
        f"<span class=soft>{count:,}{more}</span></div><p class=soft>{_text(problem.meaning)}</p>{body}</section>"
    )


def _file_list(files: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><td class=path>{_text(path)}</td><td class=soft>{_text(why)}</td></tr>" for path, why in files)
    return f"<div class=scroll><table class=files>{rows}</table></div>"


def _sheet(cards: Iterable[str]) -> str:
    return f"<div class=sheet>{''.join(cards)}</div>"


def _group_cards(audit: Audit, group: np.ndarray) -> Iterator[str]:
    for row in group[:_GROUP_EXAMPLES].tolist():
        yield _card(audit, row, Path(audit.catalog.path(row)).parent.name)
    if len(group) > _GROUP_EXAMPLES:
        yield f"<figure><div class=hole>+{len(group) - _GROUP_EXAMPLES}</div></figure>"


def _card(audit: Audit, row: int, detail: str) -> str:
    path, image = audit.catalog.path(row), _read(audit, row)
    picture = f"<img src='{_data_uri(_thumbnail(image))}' alt=''>" if image is not None else "<div class=hole>✕</div>"
    mark = "<b class=held>held out</b> " if audit.held_out is not None and row in audit.held_out else ""
    caption = f"{mark}{_text(Path(path).name)}<span>{_text(detail)}</span>"
    return f"<figure title='{_text(path)}'>{picture}<figcaption>{caption}</figcaption></figure>"


def _read(audit: Audit, row: int) -> np.ndarray | None:
    path, channels = audit.catalog.path(row), audit.records["mean"].shape[1]
    try:
        return to_preview(decode(audit.catalog.read(row), path=path, channels=channels))
    except UnreadableImage:
        return None


def _thumbnail(image: np.ndarray) -> np.ndarray:
    factor = min(1.0, _THUMBNAIL / max(image.shape[:2]))
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA) if factor < 1 else image


def _data_uri(image: np.ndarray) -> str:
    data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])[1]
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    return rows if len(rows) <= count else rows[np.linspace(0, len(rows) - 1, count).astype(int)]


# -------------------------------------------------------------------------------------------------- charts and tables


def _charts(audit: Audit) -> str:
    seen = audit.records[audit.records["width"] > 0]
    if not len(seen):
        return ""
    longest = np.maximum(seen["width"], seen["height"])
    brightness = 100 * seen["mean"].mean(1)
    spread = 100 * np.sqrt(np.maximum(seen["square"] - seen["mean"] ** 2, 0)).mean(1)
    charts = [
        _histogram("Longest side, pixels", longest),
        _histogram("Brightness, % of white", brightness, (0, 100)),
        _histogram("Contrast, standard deviation in %", spread, (0, max(50.0, float(spread.max())))),
    ]
    return f"<h2>Images</h2><div class=charts>{''.join(charts)}</div>"


def _histogram(title: str, values: np.ndarray, limits: tuple[float, float] | None = None, bins: int = 40) -> str:
    low, high = limits or (float(values.min()), float(values.max()))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    counts, _ = np.histogram(values.clip(low, high), bins, (low, high))
    width, height = 360, 110
    step, scale = width / bins, (height - 8) / max(counts.max(), 1)
    bars = "".join(
        f"<rect x='{i * step:.1f}' y='{height - count * scale:.1f}' width='{step - 1:.1f}' "
        f"height='{count * scale:.1f}' rx=1 fill='var(--accent)'><title>{count:,}</title></rect>"
        for i, count in enumerate(counts)
        if count
    )
    axis = f"<line x1=0 y1={height} x2={width} y2={height} stroke='var(--line)'/>"
    labels = "".join(
        f"<text x='{x}' y='{height + 15}' text-anchor='{anchor}'>{value:,.0f}</text>"
        for x, anchor, value in ((0, "start", low), (width / 2, "middle", (low + high) / 2), (width, "end", high))
    )
    svg = f"<svg viewBox='0 0 {width} {height + 20}' role=img>{bars}{axis}{labels}</svg>"
    return f"<div class=panel><p class=soft style='margin:0 0 8px'>{title}</p>{svg}</div>"


def _folders(audit: Audit) -> str:
    folders = sorted(audit.folders, key=lambda folder: -folder.images)
    rows = "".join(
        f"<tr><td class=path>{_text(folder.path)}</td><td class=number>{folder.images:,}</td>"
        f"<td class=number>{folder.problems or '–'}</td><td class=number>{folder.megabytes:,.1f}</td>"
        f"<td class=number>{folder.median_size[0]} × {folder.median_size[1]}</td><td>{_swatch(folder.mean)}</td></tr>"
        for folder in folders[:_FOLDERS]
    )
    head = "".join(
        f"<th{' class=number' * (0 < i < 5)}>{name}</th>"
        for i, name in enumerate(("Folder", "Images", "With findings", "MB", "Median size", "Mean colour"))
    )
    more = f"<p class=soft>The {_FOLDERS} largest of {len(folders):,} folders.</p>" if len(folders) > _FOLDERS else ""
    return f"<h2>Folders</h2><div class='panel scroll'><table><tr>{head}</tr>{rows}</table></div>{more}"


def _swatch(mean: Iterable[float]) -> str:
    levels = [round(255 * value) for value in mean]
    colour = levels[:3] if len(levels) >= 3 else levels[:1] * 3
    if not colour:
        return ""
    text = " ".join(f"{value:.2f}" for value in mean)
    return f"<span class=swatch style='background:rgb({','.join(map(str, colour))})' title='{text}'></span>"


def _config(audit: Audit) -> str:
    if audit.statistics is None:
        return ""
    return (
        "<h2>For the config</h2><div class=panel><p class=soft style='margin:0 0 8px'>Channel means and deviations of "
        f"{audit.statistics.images:,} images, scaled to 0..1</p><pre>{_text(audit.statistics)}</pre></div>"
    )


# -------------------------------------------------------------------------------------------------------------- crops


def make_augmentation(config_file: str | None) -> DataAugmentationDINO:
    """Return the augmentation of a training config; what it does not say keeps DINOv2's values.

    Raises:
        ValueError: the file cannot be read, or an option is unknown or out of its range.
    """
    try:
        config = OmegaConf.to_container(OmegaConf.load(config_file), resolve=True) if config_file else {}
        return DataAugmentationDINO(**{**_CROPS, **config.get("crops", {}), **config.get("augmentations", {})})
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{config_file}: {error}") from error


def _crops(audit: Audit, count: int, config_file: str | None) -> str:
    augmentation = make_augmentation(config_file)
    rows = audit.records["row"][audit.records["width"] > 0]
    strips = []
    for row in _spread(rows, count).tolist():
        image = _read(audit, row)
        crops = augmentation(image, np.random.default_rng(row))
        views = [*crops["global_crops"], *crops["local_crops"]]
        names = ["global 1", "global 2", *(f"local {i + 1}" for i in range(len(views) - 2))]
        pictures = [_crop("image", image), *map(_crop, names, (_levels(view, augmentation) for view in views))]
        strips.append(f"<div class=crops>{''.join(pictures)}</div>")
    source = f"the sections crops and augmentations of <span class=path>{_text(config_file)}</span>"
    return (
        f"<h2>What the model sees</h2><div class=panel><p class=soft>Crops drawn with "
        f"{source if config_file else 'the recipe of DINOv2'}, before masking.</p>{''.join(strips)}</div>"
    )


def _levels(view: Tensor, augmentation: DataAugmentationDINO) -> np.ndarray:
    """Undo the normalisation of a crop."""
    values = view.numpy().transpose(1, 2, 0) * augmentation.std + augmentation.mean
    return np.rint(255 * values).clip(0, 255).astype(np.uint8)


def _crop(name: str, picture: np.ndarray) -> str:
    height = min(picture.shape[0], 150) if name == "image" else max(48, round(picture.shape[0] * 0.6))
    return f"<div><img src='{_data_uri(_thumbnail(picture))}' height={height} alt=''>{name}</div>"
