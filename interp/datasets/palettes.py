"""Names and colours of classes: what the numbers in a mask mean.

The four sets of the field have fixed lists, kept beside this file as `classes/*.csv` (number, name,
red, green, blue), in the order that everybody's scores are reported in. Colours are for display
only; those of ADE20K, PASCAL VOC and Cityscapes are the released ones (ADE20K gives road and
skyscraper the same grey), COCO-Stuff's and those of any other set come from `color_map`, the
formula that PASCAL VOC drew its palette with.

>>> names, colors = palette("voc")
>>> len(names), names[15], colors[15]
(21, 'person', (192, 128, 128))
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from interp.errors import DataWrong
from interp.labels import IGNORE

Color = tuple[int, int, int]

_FOLDER = Path(__file__).parent / "classes"


def known_palettes() -> list[str]:
    """Names that `palette` takes.

    >>> known_palettes()
    ['ade20k', 'cityscapes', 'coco_stuff', 'voc']
    """
    return sorted(path.stem for path in _FOLDER.glob("*.csv"))


@cache
def palette(name: str) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """Class names and RGB colours (0 to 255) of a set of the field, by class number.

    Raises:
        DataWrong: a name that is none of `known_palettes()`.
    """
    if name not in known_palettes():
        raise DataWrong(f"no class list {name!r}; there are {', '.join(known_palettes())}")
    with (_FOLDER / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = tuple(row["name"] for row in rows)
    return names, tuple((int(r["red"]), int(r["green"]), int(r["blue"])) for r in rows)


def color_map(n: int) -> tuple[Color, ...]:
    """`n` different RGB colours, the first bright ones far apart; none of them black.

    Colour k spreads the bits of k + 1 over the high bits of red, green and blue in turn: PASCAL
    VOC's formula, without its black.

    >>> color_map(3)
    ((128, 0, 0), (0, 128, 0), (128, 128, 0))
    """
    colors = []
    for k in range(1, n + 1):
        channels = [0, 0, 0]
        for bit in range(24):
            channels[bit % 3] |= (k >> bit & 1) << (7 - bit // 3)
        colors.append((channels[0], channels[1], channels[2]))
    return tuple(colors)


def class_list(
    classes: Sequence[str] | str, colors: Sequence[Color] | None = None
) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """Names and colours as a user gives them: a list, "wall,floor", or the name of a known list.

    Args:
        classes: names by class number.
        colors: as many RGB colours; by default those of the known list, or of `color_map`.

    Raises:
        DataWrong: no classes, a name twice, more classes than labels below `IGNORE`, or another
            number of colours.

    >>> class_list("ade20k")[0][:2], class_list("wall,floor")[0]
    (('wall', 'building'), ('wall', 'floor'))
    """
    if isinstance(classes, str) and classes in known_palettes():
        names, given = palette(classes)
    else:
        listed = classes.split(",") if isinstance(classes, str) else classes
        names = tuple(str(name).strip() for name in listed)
        given = color_map(len(names))
    if not all(names) or not names:
        raise DataWrong(f"class names must not be empty: {', '.join(map(repr, names)) or 'none'}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataWrong(f"class names must differ; given twice: {', '.join(twice[:5])}")
    if len(names) > IGNORE:
        raise DataWrong(
            f"{len(names)} classes, but label {IGNORE} means 'ignored', so at most {IGNORE} fit"
        )
    if colors is None:
        return names, given
    if len(colors) != len(names):
        raise DataWrong(f"{len(colors)} colours for {len(names)} classes")
    return names, tuple((int(red), int(green), int(blue)) for red, green, blue in colors)
