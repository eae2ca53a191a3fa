"""Draw plausible stained blood cells with labels: the embedded data of `make demo`, the tests and the notebooks.

A picture is made as a microscope makes it. Cells are maps of stain concentration (nuclear purple, eosin, azure blue,
haemoglobin) drawn in micrometres and supersampled; light passing through them is dimmed by the Beer-Lambert law
with the absorption of each stain, which differs a little between images and a lot between sources; lamp, focus, sensor
noise and JPEG follow. Shape, not colour, tells the classes apart: nucleus, granules, size, nucleus against cytoplasm.

No patient image went into it. The pictures are for testing software, not for studying blood.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

logger = logging.getLogger("dinov2")

NUCLEAR, EOSIN, AZURE, HAEM = range(4)  # rows of every stain map
Range = tuple[float, float]

# Optical density per unit of stain in R, G, B (natural log), read off typical May-Grünwald-Giemsa colours.
_ABSORPTION = np.array(
    [
        [1.22, 1.86, 0.52],  # nuclear: deep purple
        [0.16, 0.66, 0.62],  # eosin: salmon
        [0.56, 0.48, 0.15],  # azure: grey-blue
        [0.28, 0.40, 0.24],  # haemoglobin: dusty pink
    ],
    dtype=np.float32,
)


@dataclass(frozen=True)
class Look:
    """How one source (microscope, camera, stain batch) renders a smear. Ranges are drawn per image."""

    background: tuple[int, int, int]  # colour of the empty field, RGB
    field: float = 33.0  # side of the picture, micrometres
    tint: tuple[tuple[float, float, float], ...] = ((1.0, 1.0, 1.0),) * 4  # factor on each stain's R, G, B absorption
    strength: Range = (0.85, 1.15)  # of all stains
    blur: Range = (0.04, 0.14)  # focus, sigma in micrometres
    noise: Range = (0.8, 2.0)  # sensor noise, 8-bit levels
    vignette: Range = (0.0, 0.06)  # loss of light towards a corner
    quality: tuple[int, int] = (85, 96)  # JPEG


_LOOKS = (
    Look((253, 228, 202)),  # automated scanner, cream background
    Look(  # slide scanner, white-lilac background, cool stain
        (225, 219, 233),
        field=30.0,
        tint=((0.95, 1.05, 0.62), (0.9, 0.9, 0.6), (1.1, 0.9, 0.6), (0.85, 1.05, 0.5)),
        blur=(0.06, 0.2),
    ),
    Look(  # camera on an eyepiece, warm pink light, magenta nuclei
        (224, 190, 184),
        field=29.0,
        tint=((0.62, 1.1, 0.75), (0.9, 1.0, 0.8), (0.7, 1.1, 0.6), (1.0, 1.25, 0.75)),
        blur=(0.1, 0.26),
        noise=(1.5, 3.5),
        vignette=(0.04, 0.2),
        quality=(70, 90),
    ),
    Look(  # greenish halogen light, blue stain
        (190, 205, 190),
        field=31.0,
        tint=((1.25, 1.0, 0.3), (0.8, 0.9, 0.7), (1.2, 0.8, 0.3), (1.2, 0.9, 0.7)),
        blur=(0.1, 0.3),
        noise=(1.5, 3.0),
        vignette=(0.04, 0.2),
        quality=(75, 92),
    ),
)


def look_of(source: int) -> Look:
    """Look of a source: four hand-made ones, then an endless, reproducible supply of drawn ones."""
    if source < 0:
        raise ValueError(f"source must be 0 or more, got {source}")
    if source < len(_LOOKS):
        return _LOOKS[source]
    rng = np.random.default_rng([0xCE11, source])
    tint = rng.uniform([0.7, 0.85, 0.4], [1.2, 1.2, 1.0], (4, 3))
    return Look(
        background=tuple(int(v) for v in rng.uniform([195, 190, 175], [252, 235, 235])),
        field=float(rng.uniform(28, 35)),
        tint=tuple(map(tuple, tint.tolist())),
        blur=(0.05, float(rng.uniform(0.15, 0.3))),
        noise=(0.8, float(rng.uniform(1.5, 3.5))),
        vignette=(0.0, float(rng.uniform(0.05, 0.2))),
        quality=(int(rng.integers(70, 86)), int(rng.integers(88, 97))),
    )


# --------------------------------------------------------------------------------------------------------------------
# Drawing: masks are float32 in [0, 1] on a square patch whose middle is the middle of the cell; lengths in pixels.


def _noise(rng: np.random.Generator, side: int, grain: float) -> np.ndarray:
    """Smooth noise of unit deviation whose blobs are about `grain` pixels wide, (side, side)."""
    cells = max(2, math.ceil(side / max(grain, 1.0)) + 1)
    noise = rng.standard_normal((cells, cells), dtype=np.float32)
    noise = cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC)
    return noise / (float(noise.std()) + 1e-6)


def _blur(mask: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(mask, (0, 0), sigma) if sigma > 0.2 else mask


def _rounded(mask: np.ndarray, sigma: float) -> np.ndarray:
    """Melt the parts of a mask together and round its corners, as surface tension does; keeps a soft edge."""
    mask = np.clip((_blur(mask, sigma) - 0.5) * (0.8 + 0.5 * sigma) + 0.5, 0.0, 1.0)
    return mask * mask * (3.0 - 2.0 * mask)


def _outline(rng: np.random.Generator, radius: float, stretch: float, wobble: float) -> np.ndarray:
    """Closed contour (64, 2) around the origin: an ellipse of area pi radius^2 with low harmonics of size `wobble`."""
    angle = np.linspace(0.0, 2 * np.pi, 64, endpoint=False)
    distance = np.full(64, radius)
    for harmonic in range(2, 7):
        amplitude = radius * wobble * rng.standard_normal() / harmonic
        distance += amplitude * np.cos(harmonic * angle + rng.uniform(0, 2 * np.pi))
    points = np.stack([distance * np.cos(angle) * stretch, distance * np.sin(angle) / stretch], axis=1)
    return points @ _rotation(rng.uniform(0, 2 * np.pi))


def _rotation(angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def _fill(side: int, points: np.ndarray) -> np.ndarray:
    """Filled contour, anti-aliased. `points` are relative to the middle of the patch."""
    canvas = np.zeros((side, side), np.uint8)
    fixed = np.rint((points + (side - 1) / 2) * 16).astype(np.int32)
    cv2.fillPoly(canvas, [fixed], 255, cv2.LINE_AA, shift=4)
    return canvas.astype(np.float32) / 255.0


def _discs(side: int, centres: np.ndarray, radii: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
    """Anti-aliased discs, the later ones on top. `values` in [0, 1], default 1."""
    canvas = np.zeros((side, side), np.uint8)
    fixed = np.rint((centres + (side - 1) / 2) * 16).astype(int).tolist()
    sizes = np.maximum(1, np.rint(radii * 16)).astype(int).tolist()
    levels = [255] * len(fixed) if values is None else np.rint(values * 255).astype(int).tolist()
    for centre, radius, level in zip(fixed, sizes, levels):
        cv2.circle(canvas, centre, radius, level, -1, cv2.LINE_AA, shift=4)
    return canvas.astype(np.float32) / 255.0


# --------------------------------------------------------------------------------------------------------------------
# Nuclei: (rng, side of the patch, radius of the cell) -> mask


def _round_nucleus(
    rng: np.random.Generator, side: int, radius: float, *, share: Range, stretch: float = 0.12, wobble: float = 0.06
) -> np.ndarray:
    """One round to oval nucleus with a radius of `share` of the cell's, pushed to one side as far as it fits."""
    size = radius * rng.uniform(*share)
    points = _outline(rng, size, 1 + rng.uniform(0, stretch), wobble)
    room = max(0.0, radius - size) * rng.uniform(0.1, 0.95)
    direction = rng.uniform(0, 2 * np.pi)
    return _rounded(_fill(side, points + room * np.array([math.cos(direction), math.sin(direction)])), 1.5)


def _centre_line(rng: np.random.Generator, steps: int, turn: float, sway: float) -> np.ndarray:
    """Curve (steps, 2) of length 1 that turns by `turn` radians on its way, with an S-shaped `sway` on top."""
    t = np.linspace(0.0, 1.0, steps)
    heading = rng.uniform(0, 2 * np.pi) + turn * t + sway * np.sin(2 * np.pi * t)
    curve = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0) / steps
    return curve - curve.mean(axis=0)


def _fit(curve: np.ndarray, reach: float) -> np.ndarray:
    """Shrink a curve about its middle so that no point is further out than `reach`."""
    curve = curve - (curve.max(axis=0) + curve.min(axis=0)) / 2
    return curve * min(1.0, reach / (np.linalg.norm(curve, axis=1).max() + 1e-6))


def _curved_nucleus(
    rng: np.random.Generator, side: int, radius: float, *, length: Range, width: Range, turn: Range, sway: float = 0.0
) -> np.ndarray:
    """Bean, kidney, horseshoe or band: a bent tube. `length` and `width` (radius of the tube) in cell radii."""
    half = radius * rng.uniform(*width)
    curve = _centre_line(rng, 28, rng.uniform(*turn), rng.normal(0, sway) if sway else 0.0)
    curve = _fit(curve * radius * rng.uniform(*length), 0.9 * radius - half)
    curve = curve + rng.normal(0, 0.05 * radius, 2)
    t = np.linspace(0.0, 1.0, 28)
    ends = 1 + rng.uniform(-0.05, 0.22) * np.abs(2 * t - 1) ** 2  # bands are a little thicker at their ends
    uneven = 1 + 0.1 * np.sin(2 * np.pi * (t * rng.uniform(0.8, 2.0) + rng.uniform()))
    return _rounded(_discs(side, curve, half * ends * uneven), 0.12 * half + 1.0)


def _lobed_nucleus(
    rng: np.random.Generator, side: int, radius: float, *, lobes: Sequence[int], size: Range, bridge: Range
) -> np.ndarray:
    """Chain of lobes joined by filaments. `size` of a lobe and width of a `bridge` in cell radii."""
    count = int(rng.choice(lobes))
    radii = radius * rng.uniform(*size, count) * (3.4 / (count + 0.6)) ** 0.4
    turn = rng.uniform(0.7, 1.5) * (1 if rng.random() < 0.5 else -1)
    heading, centres = rng.uniform(0, 2 * np.pi), [np.zeros(2)]
    for index in range(1, count):
        step = (radii[index - 1] + radii[index]) * rng.uniform(0.9, 1.2)
        centres.append(centres[-1] + step * np.array([math.cos(heading), math.sin(heading)]))
        if rng.random() < 0.25:  # sometimes the chain zigzags instead of curling up
            turn = -turn
        heading += turn * rng.uniform(0.7, 1.3)
    middles = _fit(np.array(centres), 0.86 * radius - radii.max()) + rng.normal(0, 0.04 * radius, 2)
    canvas = np.zeros((side, side), np.uint8)
    fixed = np.rint((middles + (side - 1) / 2) * 16).astype(np.int32)
    for index in range(count):
        outline = _outline(rng, radii[index], rng.uniform(1.0, 1.25), 0.08) + middles[index]
        cv2.fillPoly(canvas, [np.rint((outline + (side - 1) / 2) * 16).astype(np.int32)], 255, cv2.LINE_AA, shift=4)
    for start, end in zip(fixed[:-1].tolist(), fixed[1:].tolist()):
        width = max(2, round(radius * rng.uniform(*bridge)))
        cv2.line(canvas, start, end, 255, width, cv2.LINE_AA, shift=4)
    return _rounded(canvas.astype(np.float32) / 255.0, 0.035 * radius + 0.8)


Nucleus = Callable[[np.random.Generator, int, float], np.ndarray]


@dataclass(frozen=True)
class Granules:
    """Grains in the cytoplasm; `stains` is the concentration that each one adds."""

    diameter: Range  # micrometres
    cover: Range  # summed area of the grains over the area of the cell
    stains: dict[int, float]
    over_nucleus: float = 0.0  # share of a grain's stain that shows on top of the nucleus
    paleness: float = 0.35  # how much fainter than the darkest a grain may be


@dataclass(frozen=True)
class CellType:
    """What makes a kind of cell: sizes in micrometres, stains as concentrations (1 = a dense nucleus for NUCLEAR)."""

    diameter: Range
    nuclei: tuple[Nucleus, ...]
    density: Range  # of the nucleus
    chromatin: tuple[float, float]  # grain in micrometres, contrast
    cytoplasm: dict[int, Range]
    wobble: float = 0.04
    granules: tuple[Granules, ...] = ()
    vacuoles: tuple[int, int] = (0, 0)
    nucleoli: tuple[int, int] = (0, 0)
    rim: float = 0.0  # extra azure towards the edge of the cell


_FINE = Granules((0.22, 0.4), (0.25, 0.55), {NUCLEAR: 0.14, EOSIN: 0.12}, paleness=0.7)
_COARSE = Granules((0.3, 0.6), (0.15, 0.45), {NUCLEAR: 0.42, EOSIN: 0.1}, over_nucleus=0.35, paleness=0.6)
_GRANULOCYTE = {EOSIN: (0.14, 0.30), AZURE: (0.05, 0.22), NUCLEAR: (0.02, 0.07)}

_CELL_TYPES: dict[str, CellType] = {
    "neutrophil": CellType(
        diameter=(11.0, 14.0),
        nuclei=(partial(_lobed_nucleus, lobes=(2, 3, 3, 3, 4, 4, 5), size=(0.25, 0.34), bridge=(0.07, 0.2)),),
        density=(0.85, 1.15),
        chromatin=(0.8, 0.16),
        cytoplasm=_GRANULOCYTE,
        granules=(_FINE,),
    ),
    "band_neutrophil": CellType(
        diameter=(11.0, 14.5),
        nuclei=(
            partial(_curved_nucleus, length=(1.5, 2.6), width=(0.17, 0.25), turn=(2.2, 4.6), sway=0.25),
            partial(_curved_nucleus, length=(1.5, 2.2), width=(0.17, 0.25), turn=(-0.6, 0.8), sway=1.3),
        ),
        density=(0.8, 1.1),
        chromatin=(0.8, 0.16),
        cytoplasm=_GRANULOCYTE,
        granules=(_FINE,),
    ),
    "eosinophil": CellType(
        diameter=(11.5, 14.5),
        nuclei=(partial(_lobed_nucleus, lobes=(2, 2, 2, 3), size=(0.30, 0.38), bridge=(0.08, 0.3)),),
        density=(0.75, 1.05),
        chromatin=(0.9, 0.14),
        cytoplasm={EOSIN: (0.2, 0.4), AZURE: (0.0, 0.15)},
        granules=(Granules((0.65, 0.95), (0.9, 1.5), {EOSIN: 0.5, HAEM: 0.3}, over_nucleus=0.12, paleness=0.45),),
    ),
    "basophil": CellType(
        diameter=(10.0, 13.5),
        nuclei=(
            partial(_lobed_nucleus, lobes=(2, 3), size=(0.36, 0.44), bridge=(0.3, 0.5)),
            partial(_round_nucleus, share=(0.55, 0.75), wobble=0.15),
        ),
        density=(0.5, 0.75),
        chromatin=(1.2, 0.12),
        cytoplasm={EOSIN: (0.1, 0.3), AZURE: (0.05, 0.25), NUCLEAR: (0.02, 0.15)},
        granules=(Granules((0.45, 1.0), (0.45, 1.1), {NUCLEAR: 0.85, AZURE: 0.2}, over_nucleus=0.6, paleness=0.5),),
        wobble=0.05,
    ),
    "lymphocyte": CellType(
        diameter=(7.8, 11.5),
        nuclei=(partial(_round_nucleus, share=(0.74, 0.92), stretch=0.15, wobble=0.08),),
        density=(0.9, 1.2),
        chromatin=(1.4, 0.2),
        cytoplasm={AZURE: (0.3, 0.85), EOSIN: (0.0, 0.12)},
        rim=0.2,
        wobble=0.07,
    ),
    "monocyte": CellType(
        diameter=(13.0, 18.0),
        nuclei=(
            partial(_curved_nucleus, length=(0.7, 1.3), width=(0.38, 0.5), turn=(1.0, 3.4), sway=0.4),
            partial(_lobed_nucleus, lobes=(2, 3), size=(0.36, 0.46), bridge=(0.45, 0.65)),
            partial(_round_nucleus, share=(0.55, 0.72), stretch=0.3, wobble=0.16),
        ),
        density=(0.62, 0.92),
        chromatin=(0.9, 0.24),
        cytoplasm={AZURE: (0.4, 0.75), EOSIN: (0.05, 0.2), NUCLEAR: (0.0, 0.05)},
        granules=(Granules((0.2, 0.35), (0.1, 0.3), {NUCLEAR: 0.12}, paleness=0.7),),
        vacuoles=(0, 8),
        rim=0.1,
        wobble=0.12,
    ),
    "erythroblast": CellType(
        diameter=(7.5, 11.0),
        nuclei=(partial(_round_nucleus, share=(0.45, 0.68), stretch=0.06, wobble=0.02),),
        density=(1.15, 1.5),
        chromatin=(1.1, 0.2),
        cytoplasm={AZURE: (0.1, 0.8), HAEM: (0.3, 1.1)},
        wobble=0.06,
    ),
    "platelet": CellType(
        diameter=(2.6, 5.2),
        nuclei=(),
        density=(0.0, 0.0),
        chromatin=(1.0, 0.0),
        cytoplasm={AZURE: (0.2, 0.5), EOSIN: (0.1, 0.25), NUCLEAR: (0.08, 0.25)},
        granules=(Granules((0.3, 0.55), (0.35, 0.9), {NUCLEAR: 0.3, EOSIN: 0.15}, paleness=0.7),),
        wobble=0.12,
    ),
    "metamyelocyte": CellType(
        diameter=(11.5, 15.0),
        nuclei=(partial(_curved_nucleus, length=(0.7, 1.15), width=(0.34, 0.44), turn=(1.2, 2.8)),),
        density=(0.8, 1.05),
        chromatin=(0.9, 0.17),
        cytoplasm=_GRANULOCYTE,
        granules=(_FINE,),
    ),
    "myelocyte": CellType(
        diameter=(12.0, 16.0),
        nuclei=(partial(_round_nucleus, share=(0.52, 0.68), stretch=0.25, wobble=0.07),),
        density=(0.75, 1.0),
        chromatin=(0.8, 0.17),
        cytoplasm={EOSIN: (0.1, 0.28), AZURE: (0.15, 0.4), NUCLEAR: (0.02, 0.08)},
        granules=(_FINE, Granules((0.3, 0.5), (0.05, 0.2), {NUCLEAR: 0.35, EOSIN: 0.1}, over_nucleus=0.3)),
        wobble=0.05,
    ),
    "promyelocyte": CellType(
        diameter=(13.0, 18.0),
        nuclei=(partial(_round_nucleus, share=(0.68, 0.82), stretch=0.2, wobble=0.08),),
        density=(0.62, 0.85),
        chromatin=(0.6, 0.16),
        cytoplasm={AZURE: (0.45, 0.9), EOSIN: (0.05, 0.2)},
        granules=(_COARSE,),
        nucleoli=(0, 2),
        rim=0.15,
        wobble=0.07,
    ),
    "blast": CellType(
        diameter=(11.0, 17.0),
        nuclei=(partial(_round_nucleus, share=(0.8, 0.92), stretch=0.12, wobble=0.07),),
        density=(0.58, 0.82),
        chromatin=(0.45, 0.12),
        cytoplasm={AZURE: (0.5, 1.0), EOSIN: (0.0, 0.1)},
        nucleoli=(1, 4),
        rim=0.18,
        wobble=0.07,
    ),
}

CLASSES: tuple[str, ...] = tuple(_CELL_TYPES)


# --------------------------------------------------------------------------------------------------------------------
# Cells and smears: stain maps (4, side, side)


def _granule_map(rng: np.random.Generator, granules: Granules, side: int, body: np.ndarray, scale: float) -> np.ndarray:
    """Strength in [0, 1] of a layer of granules inside a cell body; `scale` in pixels per micrometre."""
    low, high = granules.diameter
    mean_area = math.pi * ((low + high) / 4 * scale) ** 2
    area = float(body.sum())
    inside = np.flatnonzero(body.ravel() > 0.6)
    count = int(rng.uniform(*granules.cover) * area / max(mean_area, 1.0))
    if count == 0 or len(inside) == 0:
        return np.zeros((side, side), np.float32)
    rows, columns = np.divmod(rng.choice(inside, count), side)
    centres = np.stack([columns, rows], axis=1) + rng.uniform(-0.5, 0.5, (count, 2)) - (side - 1) / 2
    radii = rng.uniform(low, high, count) / 2 * scale
    values = 1.0 - granules.paleness * rng.random(count)
    return _blur(_discs(side, centres, radii, values), 0.05 * scale) * body


def _scatter_inside(rng: np.random.Generator, mask: np.ndarray, count: int) -> np.ndarray:
    """`count` random points (x, y), relative to the middle of the patch, on the mask."""
    inside = np.flatnonzero(mask.ravel() > 0.8)
    if count == 0 or len(inside) == 0:
        return np.zeros((0, 2))
    rows, columns = np.divmod(rng.choice(inside, count), len(mask))
    return np.stack([columns, rows], axis=1) - (len(mask) - 1) / 2


def _draw_body(
    rng: np.random.Generator, kind: CellType, scale: float, supersampling: int
) -> tuple[np.ndarray, np.ndarray]:
    """One cell: its stains (4, side, side) and the mask of its body, `scale` in pixels per micrometre."""
    stains, body = _draw_large_body(rng, kind, scale * supersampling, supersampling)
    if supersampling == 1:
        return stains, body
    side = len(body) // supersampling
    shrink = partial(cv2.resize, dsize=(side, side), interpolation=cv2.INTER_AREA)
    return np.stack([shrink(stain) for stain in stains]), shrink(body)


def _draw_large_body(
    rng: np.random.Generator, kind: CellType, scale: float, multiple: int
) -> tuple[np.ndarray, np.ndarray]:
    """`_draw_body` before it is shrunk, on a patch whose side is a multiple of `multiple`."""
    radius = rng.uniform(*kind.diameter) / 2 * scale
    side = (int(2 * radius * 1.35) + 8) // multiple * multiple
    body = _fill(side, _outline(rng, radius, 1 + rng.uniform(0, 0.12), kind.wobble))
    body = _rounded(body, 0.12 * scale + 0.5)
    stains = np.zeros((4, side, side), np.float32)

    mottle = 1 + 0.14 * _noise(rng, side, 1.3 * scale) + 0.06 * _noise(rng, side, 0.4 * scale)
    for stain, concentration in kind.cytoplasm.items():
        stains[stain] = rng.uniform(*concentration) * mottle
    if kind.rim:
        stains[AZURE] += kind.rim * (1 - _blur(body, 0.16 * radius)) * 2
    for centre in _scatter_inside(rng, body, int(rng.integers(kind.vacuoles[0], kind.vacuoles[1] + 1))):
        hole = _discs(side, centre[None], np.array([rng.uniform(0.2, 0.6) * scale]))
        stains *= 1 - 0.85 * _blur(hole, 0.08 * scale)

    nucleus = np.zeros((side, side), np.float32)
    if kind.nuclei:
        draw_nucleus = kind.nuclei[int(rng.integers(len(kind.nuclei)))]
        nucleus = draw_nucleus(rng, side, radius) * _blur(body, 0.1 * scale)
        stains *= 1 - nucleus
        stains[NUCLEAR] += nucleus * _chromatin(rng, kind, nucleus, scale)
    for layer in kind.granules:
        grains = _granule_map(rng, layer, side, body, scale)
        grains *= 1 - (1 - layer.over_nucleus) * nucleus
        for stain, concentration in layer.stains.items():
            stains[stain] += concentration * grains
    return np.maximum(stains, 0) * body, body


def _chromatin(rng: np.random.Generator, kind: CellType, nucleus: np.ndarray, scale: float) -> np.ndarray:
    """Density of the nucleus: clumps, a darker membrane, pale nucleoli."""
    side = len(nucleus)
    grain, contrast = kind.chromatin
    clumps = _noise(rng, side, grain * scale) + 0.6 * _noise(rng, side, 0.45 * grain * scale)
    membrane = 0.5 * (1 - _blur(nucleus, 0.3 * scale))
    density = rng.uniform(*kind.density) * np.clip(1 + contrast * clumps + membrane, 0.35, 1.8)
    count = int(rng.integers(kind.nucleoli[0], kind.nucleoli[1] + 1))
    for centre in _scatter_inside(rng, _blur(nucleus, 1.2 * scale), count):
        spot = _discs(side, centre[None], np.array([rng.uniform(0.5, 1.0) * scale]))
        density *= 1 - 0.38 * _blur(spot, 0.2 * scale)
    return density


def _draw_red_cell(rng: np.random.Generator, radius: float, pallor: float) -> np.ndarray:
    """Haemoglobin of one red cell: a disc, thinner in the middle by `pallor`."""
    side = int(2 * radius * 1.25) + 6
    axis = np.arange(side, dtype=np.float32) - (side - 1) / 2
    angle, stretch = rng.uniform(0, np.pi), 1 + abs(rng.normal(0, 0.07))
    x = (axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle)) * (stretch / radius)
    y = (axis[:, None] * math.cos(angle) - axis[None, :] * math.sin(angle)) / (stretch * radius)
    square = x * x + y * y + 1e-6
    bend = rng.normal(0, [0.035, 0.035, 0.015, 0.015])
    # cos 2a, sin 2a and cos 3a, sin 3a without an arctangent
    dents = (bend[0] * (x * x - y * y) + 2 * bend[1] * x * y) / square
    dents += (bend[2] * x * (x * x - 3 * y * y) + bend[3] * y * (3 * x * x - y * y)) / (square * np.sqrt(square))
    distance = np.sqrt(square) * (1 + dents)
    edge = np.clip((1 - distance) * radius / 1.5 + 0.5, 0, 1)
    width = rng.uniform(0.35, 0.55)
    hollow = 1 / (1 + np.exp(np.clip((distance - width) * rng.uniform(8, 16), -30, 30)))
    return edge * (0.75 + 0.3 * distance) * (1 - pallor * hollow)


def _paste(stains: np.ndarray, patch: np.ndarray, centre: tuple[float, float], cover: np.ndarray | None = None) -> None:
    """Add a patch of stains in place, clipped to the canvas; `cover` hides what lies below."""
    side, canvas = patch.shape[-1], stains.shape[-1]
    left, top = (round(c - side / 2) for c in centre)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, canvas), min(top + side, canvas)
    if x0 >= x1 or y0 >= y1:
        return
    target = stains[..., y0:y1, x0:x1]
    window = np.s_[..., y0 - top : y1 - top, x0 - left : x1 - left]
    if cover is not None:
        target *= 1 - cover[window]
    target += patch[window]


def _draw_red_cells(
    rng: np.random.Generator, stains: np.ndarray, scale: float, centre: tuple[float, float], free: float
) -> None:
    """Fill the field with red cells, keeping a circle of radius `free` (pixels) around `centre` mostly empty."""
    canvas = stains.shape[-1]
    mean_radius = rng.uniform(3.3, 4.0) * scale
    spacing = rng.uniform(1.55, 2.5) * mean_radius  # below 2 radii neighbours overlap
    pallor, crowd = rng.uniform(0.2, 0.85), int(rng.integers(40, 160))
    tone = rng.uniform(0.8, 1.15)
    placed: list[tuple[float, float]] = []
    for x, y in rng.uniform(-mean_radius, canvas + mean_radius, (crowd, 2)).tolist():
        if math.hypot(x - centre[0], y - centre[1]) < free + 0.75 * mean_radius:
            continue
        if any(math.hypot(x - u, y - v) < spacing for u, v in placed):
            continue
        placed.append((x, y))
        radius = mean_radius * rng.normal(1, 0.06)
        hollow = float(np.clip(pallor + rng.normal(0, 0.12), 0, 0.9))
        _paste(stains[HAEM], tone * rng.normal(1, 0.05) * _draw_red_cell(rng, radius, hollow), (x, y))


def _draw_smear(rng: np.random.Generator, cell_class: str, size: int, scale: float) -> np.ndarray:
    """Stain maps (4, size, size) of a field with the named cell near its middle."""
    supersampling = max(1, min(3, round(256 / size)))  # where pixels are coarse
    patch, body = _draw_body(rng, _CELL_TYPES[cell_class], scale, supersampling)
    middle = tuple((size / 2 + rng.normal(0, 0.9 * scale, 2)).tolist())
    stains = np.zeros((4, size, size), np.float32)
    _draw_red_cells(rng, stains, scale, middle, math.sqrt(float(body.sum()) / math.pi))
    stains[HAEM] = _blur(stains[HAEM], rng.uniform(0.08, 0.25) * scale)
    for _ in range(rng.poisson(0.4)):  # platelets lie about in every smear
        other, cover = _draw_body(rng, _CELL_TYPES["platelet"], scale, supersampling)
        angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.6) * size
        spot = (middle[0] + far * math.cos(angle), middle[1] + far * math.sin(angle))
        _paste(stains, other, spot, cover)
    _paste(stains, patch, middle, body)
    return stains


def _expose(rng: np.random.Generator, stains: np.ndarray, look: Look) -> np.ndarray:
    """Light through the stains, lamp, lens and sensor: (4, size, size) -> uint8 (size, size, 3)."""
    size = stains.shape[-1]
    absorption = _ABSORPTION * np.asarray(look.tint, np.float32)
    absorption = absorption * rng.normal(1, 0.06, (4, 3)) * rng.normal(1, 0.09, (4, 1)) * rng.uniform(*look.strength)
    light = np.exp(-np.einsum("shw,sc->hwc", stains, absorption.astype(np.float32)))

    background = np.asarray(look.background, np.float32) * (1 + rng.normal(0, 0.012, 3)) * rng.normal(1, 0.015)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    angle, fall = rng.uniform(0, 2 * np.pi), rng.uniform(*look.vignette)
    slope = axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle)
    lamp = 1 - fall * (0.5 * slope + 0.35 * (axis[None, :] ** 2 + axis[:, None] ** 2))
    light *= background.astype(np.float32) * lamp[..., None]

    light = _blur(light, rng.uniform(*look.blur) / look.field * size)
    light += rng.standard_normal((size, size, 3), dtype=np.float32) * np.float32(rng.uniform(*look.noise))
    return np.clip(light + 0.5, 0, 255).astype(np.uint8)


def draw_cell(rng: np.random.Generator, cell_class: str, source: int = 0, size: int = 128) -> np.ndarray:
    """Draw one stained cell of a class in its smear.

    Args:
        rng: where every random choice comes from; the same state gives the same picture.
        cell_class: one of `CLASSES`.
        source: which microscope and stain (`look_of`); 0 is an automated scanner with a cream background.
        size: side of the picture, pixels (32 or more).

    Returns:
        uint8 RGB, (size, size, 3), before JPEG.

    Raises:
        ValueError: unknown class, size below 32 or negative source.
    """
    if cell_class not in _CELL_TYPES:
        raise ValueError(f"unknown cell class {cell_class!r}; known: {', '.join(CLASSES)}")
    if size < 32:
        raise ValueError(f"size must be at least 32 pixels, got {size}")
    look = look_of(source)
    scale = size / (look.field * rng.uniform(0.94, 1.06))
    return _expose(rng, _draw_smear(rng, cell_class, size, scale), look)


# --------------------------------------------------------------------------------------------------------------------
# A data set on disk


@dataclass(frozen=True)
class _Job:
    path: Path
    cell_class: str
    source: int
    index: int
    size: int
    seed: int

    def run(self) -> None:
        # Depends on what the picture is, not on which worker draws it or which other classes are asked for.
        rng = np.random.default_rng([self.seed, self.source, zlib.crc32(self.cell_class.encode()), self.index])
        image = draw_cell(rng, self.cell_class, self.source, self.size)
        low, high = look_of(self.source).quality
        options = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(low, high + 1))]
        _, data = cv2.imencode(".jpg", image[..., ::-1], options)
        self.path.write_bytes(data.tobytes())


def _run_jobs(jobs: Sequence[_Job]) -> int:
    cv2.setNumThreads(1)  # the pictures are too small to gain from threads
    for job in jobs:
        job.run()
    return len(jobs)


def _plan(out_dir: Path, classes: Sequence[str], per_class: int, sources: int, size: int, seed: int) -> Iterator[_Job]:
    for source in range(sources):
        root = out_dir / f"source_{source}" if sources > 1 else out_dir
        for cell_class in classes:
            for index in range(per_class):
                path = root / cell_class / f"{cell_class}_{source}_{index:05d}.jpg"
                yield _Job(path, cell_class, source, index, size, seed)


def generate(
    out_dir: str | Path,
    classes: Sequence[str] | None = None,
    per_class: int = 100,
    sources: int = 1,
    size: int = 128,
    seed: int = 0,
    num_workers: int = 1,
    progress: bool = True,
    overwrite: bool = False,
) -> list[Path]:
    """Write a labelled data set, one folder per class, and return the paths in order.

    With one source the layout is `out_dir/<class>/*.jpg`, with more `out_dir/source_<k>/<class>/*.jpg`. The same
    arguments give the same files, byte for byte, whatever `num_workers` is (on one version of OpenCV).

    Args:
        out_dir: made when missing; must be empty, or `overwrite` must be set.
        classes: names out of `CLASSES`; all of them by default.
        per_class: pictures per class and source.
        sources: how many looks (microscope, camera, stain) to draw every class in.
        size: side of the pictures, pixels.
        seed: another seed gives other cells.
        num_workers: processes.
        progress: show a bar.
        overwrite: empty the folder first.

    Raises:
        ValueError: unknown class, a count below 1, or a folder with something in it.
    """
    classes = list(CLASSES if classes is None else classes)
    if unknown := [name for name in classes if name not in _CELL_TYPES]:
        raise ValueError(f"unknown cell classes {', '.join(unknown)}; known: {', '.join(CLASSES)}")
    for name, value in {"classes": len(classes), "per_class": per_class, "sources": sources}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if size < 32:
        raise ValueError(f"size must be at least 32 pixels, got {size}")
    out_dir = Path(out_dir)
    _make_room(out_dir, overwrite)

    jobs = list(_plan(out_dir, classes, per_class, sources, size, seed))
    for folder in dict.fromkeys(job.path.parent for job in jobs):
        folder.mkdir(parents=True, exist_ok=True)
    chunks = [jobs[start : start + 32] for start in range(0, len(jobs), 32)]
    with tqdm(total=len(jobs), desc="drawing cells", unit="img", disable=not progress) as bar:
        for done in _map(_run_jobs, chunks, num_workers):
            bar.update(done)
    return [job.path for job in jobs]


def _make_room(out_dir: Path, overwrite: bool) -> None:
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file; give a folder")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        if not overwrite:
            raise ValueError(f"{out_dir} is not empty; give a new folder, or --overwrite to replace its content")
        shutil.rmtree(out_dir)


def _map(function: Callable, chunks: list, num_workers: int) -> Iterator[int]:
    if num_workers <= 1:
        yield from map(function, chunks)
        return
    # A forked worker starts at once, a spawned one imports torch first, which drawing never touches.
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    with ProcessPoolExecutor(min(num_workers, len(chunks)), mp_context=context) as pool:
        yield from pool.map(function, chunks)


def get_args_parser(
    add_help: bool = True, parents: Sequence[argparse.ArgumentParser] | None = None
) -> argparse.ArgumentParser:
    """Options of `dinov2 synth`."""
    parser = argparse.ArgumentParser(
        "dinov2 synth",
        description="Draw a labelled data set of synthetic stained blood cells, one folder per class.",
        parents=list(parents or []),
        add_help=add_help,
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; must be empty")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help=f"any of: {', '.join(CLASSES)} (default: all)")
    parser.add_argument("--per-class", type=int, default=100, metavar="N", help="pictures per class and source")
    parser.add_argument("--sources", type=int, default=1, metavar="N", help="microscope and stain looks")
    parser.add_argument("--size", type=int, default=128, metavar="PX", help="side of a picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-workers", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--overwrite", action="store_true", help="empty DIR first")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of `dinov2 synth`; returns the exit code."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    try:
        paths = generate(
            args.out,
            args.classes,
            args.per_class,
            args.sources,
            args.size,
            args.seed,
            args.num_workers,
            overwrite=args.overwrite,
        )
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(paths)} pictures in {len({path.parent for path in paths})} folders under {args.out}")
    return 0
