"""Make docs/images/synthetic_cells.png, the contact sheet of the drawn cells: a column per class, a row per source."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dinov2.data.synthetic import CLASSES, draw_cell

SIDE, GAP, HEADER, SOURCES = 112, 3, 24, (0, 1, 2, 3)
PATH = Path(__file__).resolve().parent / "images" / "synthetic_cells.png"

step = SIDE + GAP
sheet = Image.new("RGB", (step * len(CLASSES) - GAP, HEADER + step * len(SOURCES) - GAP), "white")
draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
for column, name in enumerate(CLASSES):
    draw.text((column * step + SIDE / 2, HEADER / 2), name.replace("_", " "), "black", font, anchor="mm")
    for row, source in enumerate(SOURCES):
        cell = Image.fromarray(draw_cell(np.random.default_rng([5, column, row]), name, source, SIDE))
        sheet.paste(cell, (column * step, HEADER + row * step))
sheet.quantize(256, dither=Image.Dither.NONE).save(PATH, optimize=True)
