"""A contact sheet: are these the right masks on the right pictures?

Numbers that are in range may still be wrong (shifted by one, of another set, of the picture
before). An eye sees that at once: each row shows a picture, its mask in the colours of its classes
(hatched grey where there is no label) and the mask over the picture; the legend below names the
classes, the largest first.

>>> from interp.datasets import scenes
>>> contact_sheet(scenes("test"), n=2).mode
'RGB'
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from interp.datasets.base import Labelled, Segmentation, spread
from interp.errors import DataWrong
from interp.labels import IGNORE

_GAP, _LINE, _SWATCH = 8, 18, 12  # pixels
_INK = (20, 20, 20)


def contact_sheet(data: Segmentation, n: int = 5, height: int = 160) -> Image.Image:
    """Pictures of a set with their masks, as one RGB image.

    Args:
        data: the set; samples are spread evenly over it.
        n: how many at most.
        height: pixels of a picture on the sheet.

    Raises:
        DataWrong: an empty set, or a sample that cannot be read.
    """
    chosen = [data[index] for index in spread(len(data), n)]
    if not chosen:
        raise DataWrong(f"{data.name}, split {data.split!r}, is empty: there is nothing to draw")
    rows = [_row(sample, data, height) for sample in chosen]
    counts = sum(np.bincount(s.mask.ravel(), minlength=IGNORE + 1) for s in chosen)
    width = max(360, *(row.width for row in rows)) + 2 * _GAP
    legend = _legend(np.asarray(counts), data, width - 2 * _GAP)
    parts = [*rows, legend]
    sheet = Image.new(
        "RGB", (width, sum(part.height + _GAP for part in parts) + _GAP), (255, 255, 255)
    )
    top = _GAP
    for part in parts:
        sheet.paste(part, (_GAP, top))
        top += part.height + _GAP
    return sheet


def colored(mask: np.ndarray, data: Segmentation) -> np.ndarray:
    """A mask in the colours of its classes, `[height, width, 3]` uint8; hatched where ignored."""
    table = np.full((IGNORE + 1, 3), IGNORE, dtype=np.uint8)
    table[: len(data.colors)] = data.colors
    pixels = table[mask]
    y, x = np.indices(mask.shape)
    hatch = np.where((x + y) // 4 % 2, 205, 165).astype(np.uint8)
    pixels[mask == IGNORE] = hatch[mask == IGNORE][:, None]
    return np.asarray(pixels)


def _row(sample: Labelled, data: Segmentation, height: int) -> Image.Image:
    """Name, picture, mask and both together."""
    size = (max(1, round(sample.image.width * height / sample.image.height)), height)
    labels = Image.fromarray(np.asarray(sample.mask, dtype=np.int32))
    mask = np.asarray(labels.resize(size, Image.Resampling.NEAREST))
    picture = np.asarray(sample.image.resize(size, Image.Resampling.BICUBIC))
    flat = colored(mask, data)
    # where nothing is labelled, the picture shows as it is
    mixed = np.where((mask == IGNORE)[..., None], picture, picture // 2 + flat // 2)
    row = Image.new("RGB", (3 * size[0] + 2 * _GAP, height + _LINE), (255, 255, 255))
    ImageDraw.Draw(row).text((0, 0), sample.name, fill=_INK, font=ImageFont.load_default(12))
    for column, pixels in enumerate((picture, flat, mixed)):
        row.paste(Image.fromarray(pixels.astype(np.uint8)), (column * (size[0] + _GAP), _LINE))
    return row


def _legend(counts: np.ndarray, data: Segmentation, width: int) -> Image.Image:
    """Colours and names of the classes that occur, largest first; what is ignored last."""
    order = sorted(np.flatnonzero(counts[:IGNORE]), key=lambda k: (-counts[k], k))
    entries = [(data.classes[k], np.full((1, 1), k), counts[k]) for k in order]
    if counts[IGNORE]:
        entries.append(("no label", np.full((1, 1), IGNORE), counts[IGNORE]))
    columns = max(1, width // 180)
    legend = Image.new("RGB", (width, _LINE * -(-len(entries) // columns)), (255, 255, 255))
    draw = ImageDraw.Draw(legend)
    for place, (name, label, count) in enumerate(entries):
        x, y = place % columns * (width // columns), place // columns * _LINE
        swatch = colored(np.broadcast_to(label, (_SWATCH, _SWATCH)), data)
        legend.paste(Image.fromarray(swatch), (x, y + 2))
        words = f"{name} {count / counts.sum():.1%}"
        draw.text((x + _SWATCH + 6, y), words, fill=_INK, font=ImageFont.load_default(12))
    return legend
