"""Scenes with their tokens coloured: right or wrong, before and after the language model.

Every scene is a strip of small panels on one grid: the picture, its true classes, and what the
probe says after the adapter, at the last layer, and at the last layer under an edit. The panels
are inline SVG: sharp at any size, a few kilobytes each, with the predicted class on hover, and
without a second copy of the picture (panels refer to the first).

Right is blue and wrong is orange *with a stroke through the cell*, so the two are told apart in
grey print as well. Where a region's border runs, a dark line is drawn.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from interp.labels import IGNORE
from interp.report.tables import Summary, Tables, records
from interp.runs import RunFolder

MAX_SIDE = 336  # pixels; a larger picture is scaled down, its panel is smaller still

PANELS = {
    "adapter": "after the adapter",
    "final": "last layer",
    "knockout": "last layer, edges cut",
    "bidirectional": "last layer, bidirectional",
}
"""The verdict panels: column of the table `tokens` -> what stands above it."""


@dataclass(frozen=True)
class Panel:
    """One small picture of a strip: what it is, its SVG, and a line below."""

    title: str
    svg: str
    below: str


@dataclass(frozen=True)
class Strip:
    """The panels of one scene."""

    name: str
    panels: list[Panel]


def picture_file(name: str) -> str:
    """Where in a run folder the picture of scene `name` is: flat, whatever the name.

    >>> picture_file("test/17")
    'pictures/test-17.png'
    """
    return f"pictures/{name.replace('/', '-')}.png"


def strips(folder: RunFolder, tables: Tables, summary: Summary) -> list[Strip]:
    """A strip for each scene of the table `tokens`; empty without that table."""
    if "tokens" not in tables:
        return []
    tokens = tables["tokens"]
    return [
        _strip(folder, number, str(name), tokens[tokens["name"] == name], list(summary["classes"]))
        for number, name in enumerate(tokens["name"].unique())
    ]


def shown_classes(tables: Tables, summary: Summary) -> list[tuple[int, str, str]]:
    """(index, name, CSS colour) of every class that some panel shows."""
    if "tokens" not in tables:
        return []
    present = set()
    for column in ("label", *PANELS):
        present |= set(tables["tokens"][column].dropna().astype(int))
    return [
        (k, name, "#{:02x}{:02x}{:02x}".format(*summary["colors"][k]))
        for k, name in enumerate(summary["classes"])
        if k in present
    ]


def _strip(
    folder: RunFolder, number: int, name: str, tokens: pd.DataFrame, classes: list[str]
) -> Strip:
    n_rows, n_cols = int(tokens["row"].max()) + 1, int(tokens["col"].max()) + 1
    size = f'viewBox="0 0 {n_cols} {n_rows}"'
    picture, borders = f"picture-{number}", f"borders-{number}"
    source = _picture(folder, name)
    image = (
        f'<image id="{picture}" href="{source}" width="{n_cols}" height="{n_rows}" '
        'preserveAspectRatio="none"/>'
        if source
        else f'<rect id="{picture}" width="{n_cols}" height="{n_rows}" fill="#eceff2"/>'
    )
    outline = f'<path id="{borders}" class="border" d="{_borders(tokens)}"/>'
    under, over = f'<use href="#{picture}"/>', f'<use href="#{borders}"/>'
    cells = records(tokens)
    truth = "".join(_cell(t, f"k{t['label']}", _class(classes, t["label"])) for t in cells)
    panels = [
        Panel("picture", f'<svg {size} role="img" aria-label="{escape(name)}">{image}</svg>', name),
        Panel("true classes", f'<svg class="truth" {size}>{truth}{outline}</svg>', ""),
    ]
    for column, title in PANELS.items():
        panels.append(_verdicts(title, column, cells, classes, size, under, over))
    return Strip(name, panels)


def _verdicts(
    title: str,
    column: str,
    tokens: list[dict[str, Any]],
    classes: list[str],
    size: str,
    under: str,
    over: str,
) -> Panel:
    """One panel of right and wrong; tokens without a label or a verdict stay bare."""
    judged = [t for t in tokens if 0 <= t["label"] < len(classes) and not pd.isna(t[column])]
    cells, strokes, n_right = [], [], 0
    for t in judged:
        said, true = int(t[column]), int(t["label"])
        right = said == true
        n_right += right
        truth = "right" if right else f"wrong, it is {_class(classes, true)}"
        css = f"{'r' if right else 'w'} k{said}"
        cells.append(_cell(t, css, f"{_class(classes, said)}: {truth}"))
        if not right:
            strokes.append(f"M{t['col'] + 0.3:g} {t['row'] + 0.7:g}l.4 -.4")
    svg = (
        f'<svg class="verdict" {size}>{under}{"".join(cells)}'
        f'<path class="stroke" d="{"".join(strokes)}"/>{over}</svg>'
    )
    return Panel(title, svg, f"{n_right} of {len(judged)} right")


def _cell(token: dict[str, Any], css: str, what: str) -> str:
    row, col = token["row"], token["col"]
    return (
        f'<rect class="{css}" x="{col}" y="{row}" width="1" height="1">'
        f"<title>row {row}, column {col}: {escape(what)}</title></rect>"
    )


def _class(classes: list[str], index: int) -> str:
    if index == IGNORE or not 0 <= index < len(classes):
        return "no label"
    return classes[index]


def _borders(tokens: pd.DataFrame) -> str:
    """Path along the cell edges between tokens of different true class."""
    grid = tokens.pivot(index="row", columns="col", values="label").to_numpy()
    right = [f"M{c + 1} {r}v1" for r, c in np.argwhere(grid[:, 1:] != grid[:, :-1])]
    below = [f"M{c} {r + 1}h1" for r, c in np.argwhere(grid[1:] != grid[:-1])]
    return "".join(right + below)


def _picture(folder: RunFolder, name: str) -> str:
    """The scene's picture as a `data:` address, or "" if the run wrote none."""
    file = picture_file(name)
    if not folder.has(file):
        return ""
    data, kind = folder.read_bytes(file), "png"
    with Image.open(io.BytesIO(data)) as image:
        if max(image.size) > MAX_SIDE:
            small = image.convert("RGB")
            small.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
            buffer, kind = io.BytesIO(), "jpeg"
            small.save(buffer, "JPEG", quality=88)
            data = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
