"""Heads as a map, and single edges as arrows over the picture.

One colour rule for both: blue pulls towards what the target counts for, orange away from it, and
the stronger, the darker (a cell) or the thicker (an arrow).

An arrow runs from the source token to the token that reads it, bent to its right, so that the two
directions of a pair, and two heads on one edge, lie apart. Its number is that of the list beside
the picture. A token that reads itself has a ring. What is read *from* the picture at a text
position (the answer's, say) is a diamond on its source. Edges that start in the text have no place
in a picture: those stronger than the weakest one drawn are listed under the others.
"""

from __future__ import annotations

import base64
import io
import math
import textwrap
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from PIL import Image

from interp.attribution.frames import TEXT
from interp.attribution.text import decimals, head_name, interval, signed
from interp.errors import ImageError
from interp.report.palette import DIVERGING, FONT, INK, LAYOUT, MUTED, RIGHT, WRONG, axis
from interp.report.tables import records
from interp.report.text import MINUS

SIDE = 560  # screen pixels of the picture's longer side
LIST = 300  # of the list beside it
LINE = 17  # of a line of the list
MAX_PIXELS = 1120  # of the longer side that a figure stores: a photograph at full size is megabytes
LISTED = 8  # edges from the text that are told one by one
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

Box = tuple[float, float, float, float]  # left, top, right, bottom


def heatmap(heads: pd.DataFrame, title: str) -> go.Figure:
    """Layers x heads, blue where a head pulls towards the target, orange where away.

    Cells hold their numbers where these have room; a head without an estimate stays grey.

    Args:
        heads: layer, head, estimate, low, high, one row a head.
        title: what stands above.
    """
    n_heads = int(heads["head"].max()) + 1
    layers = range(int(heads["layer"].min()), int(heads["layer"].max()) + 1)
    shape = (len(layers), n_heads)
    value = np.full(shape, np.nan)
    told = np.full(shape, "no estimate", dtype=object)
    digits = decimals(heads["estimate"])
    for row in records(heads):
        at = row["layer"] - layers.start, row["head"]
        value[at], told[at] = row["estimate"], interval(row, digits)
    small = n_heads <= 12
    most = float(heads["estimate"].abs().max()) or 1.0
    cell = 40 if small else 20
    width, height = max(cell * n_heads + 190, 460), max(cell * len(layers) + 130, 230)
    base = {**LAYOUT, "plot_bgcolor": "#d5dade", "margin": {**LAYOUT["margin"], "t": 64}}
    fig = go.Figure(
        layout={**base, "width": width, "height": height, "title": _title(title, width)}
    )
    fig.add_trace(
        go.Heatmap(
            z=[[None if math.isnan(v) else v for v in row] for row in value.tolist()],
            x=list(range(n_heads)),
            y=list(layers),
            zmin=-most,
            zmax=most,
            colorscale=DIVERGING,
            xgap=1,
            ygap=1,
            hoverongaps=True,
            customdata=told.tolist(),
            text=[[_short(v, digits) for v in row] for row in value],
            texttemplate="%{text}" if small and digits <= 4 else None,
            textfont={"size": 10},
            hovertemplate="<b>layer %{y}, head %{x}</b><br>%{customdata}<extra></extra>",
            colorbar={"thickness": 10, "outlinewidth": 0, "ticks": "", "tickformat": "+.2~g"},
        )
    )
    every = {"showgrid": False, "linewidth": 0, "tickmode": "linear"}
    fig.update_xaxes(axis("head", **every, dtick=1 if small else 4, tick0=0))
    step = 1 if len(layers) <= 16 else 4
    fig.update_yaxes(
        axis("layer", **every, dtick=step, tick0=0, autorange="reversed"),
    )
    return fig


def arrows(
    edges: pd.DataFrame,
    picture: Image.Image | np.ndarray | None,
    size: tuple[int, int] | None,
    n: int,
    title: str,
) -> go.Figure:
    """The `n` strongest edges of one image over its picture (see the module docstring).

    Args:
        edges: of one image, with the columns `PLACES`.
        picture: the original picture, or None for a blank one.
        size: (width, height) of the original picture; None if only the picture knows.
        n: edges with a place in the picture that are drawn.
        title: what stands above.

    Raises:
        ImageError: `picture` is no picture, or not of the size that the edges were measured in.
    """
    image = None if picture is None else _opened(picture)
    if image is not None and size is not None and image.size != tuple(size):
        raise ImageError(
            f"the picture is {image.width} x {image.height} pixels, and the edges lie in one of "
            f"{size[0]} x {size[1]}: give the picture as `prepare` got it"
        )
    ranked = edges.iloc[np.argsort(-edges["estimate"].abs().to_numpy(), kind="stable")]
    placed = (ranked["src"] != TEXT).to_numpy()
    drawn = ranked[placed].head(n).reset_index(drop=True)
    weakest = int(np.flatnonzero(placed)[len(drawn) - 1]) if len(drawn) == n else len(ranked)
    words = ranked.iloc[:weakest][~placed[:weakest]]

    size = image.size if image is not None else size
    box = _extent(drawn, size)
    scale = SIDE / max(box[2] - box[0], box[3] - box[1])  # screen pixels a pixel of the picture
    paths = [
        _path(edge, turn, scale) for edge, turn in zip(records(drawn), _turns(drawn), strict=True)
    ]
    box = _around(box, paths, air=10 / scale)
    fig = _canvas(box, scale, image, size, _list(drawn, words, n), title)
    most = float(drawn["estimate"].abs().max()) if len(drawn) else 1.0
    digits = decimals(edges["estimate"])
    for number, edge in reversed(list(enumerate(records(drawn)))):  # the strongest lies on top
        weight = abs(edge["estimate"]) / (most or 1.0)
        _draw(fig, edge, paths[number], number + 1, weight, scale, digits)
    return fig


def _draw(
    fig: go.Figure,
    edge: dict[str, Any],
    path: np.ndarray,
    number: int,
    weight: float,
    scale: float,
    digits: int,
) -> None:
    """One edge: a white casing, the arrow, ring or diamond, and its number."""
    color = RIGHT if edge["estimate"] >= 0 else WRONG
    width = 1.3 + 3.7 * weight
    hover = (
        f"<b>layer {edge['layer']}, head {edge['head']}</b>: {signed(edge['estimate'], digits)}"
        f"<br>{_end(edge, 'src')} \N{RIGHTWARDS ARROW} {_end(edge, 'dst')}<extra></extra>"
    )
    outline = {"color": "white", "width": 1.2}
    if len(path) == 1:
        at = path[0]
        marker = {"symbol": "diamond", "size": 11 + 12 * weight, "color": color, "line": outline}
        fig.add_trace(go.Scatter(x=[at[0]], y=[at[1]], mode="markers", marker=marker,
                                 hovertemplate=hover, meta=number))  # fmt: skip
    else:
        ring = edge["dst"] == edge["src"]
        shaft, head = (path, None) if ring else _headed(path, width, scale)
        at = path[len(path) // 3]
        x, y = shaft.T.tolist()
        casing = {"color": "white", "width": width + 2.4}
        fig.add_trace(go.Scatter(x=x, y=y, mode="lines", line=casing, hoverinfo="skip"))
        dots = {"size": [0 if ring else width + 4] + [0] * (len(x) - 1), "color": color,
                "line": outline, "opacity": 1}  # fmt: skip
        fig.add_trace(go.Scatter(x=x, y=y, mode="lines+markers", marker=dots, hovertemplate=hover,
                                 line={"color": color, "width": width}, meta=number))  # fmt: skip
        if head is not None:
            x, y = head.T.tolist()
            fig.add_trace(go.Scatter(x=x, y=y, mode="lines", fill="toself", fillcolor=color,
                                     line=outline, hoverinfo="skip"))  # fmt: skip
    fig.add_annotation(
        x=at[0], y=at[1], text=str(number), showarrow=False, bgcolor="white", bordercolor=color,
        borderpad=1, borderwidth=1, opacity=0.95, font={"size": 10, "color": INK, "family": MONO},
    )  # fmt: skip


def _path(edge: dict[str, Any], turn: int, scale: float) -> np.ndarray:
    """`[n, 2]` points of an edge: a curve, a ring, or one point for a reader in the text.

    Args:
        edge: with its places.
        turn: how many edges between the same tokens came before; they lie further inside.
        scale: screen pixels a pixel of the picture.
    """
    src = np.array([edge["src_x"], edge["src_y"]])
    if edge["dst"] == TEXT:  # beside one another, as wide as a diamond
        return src[None] + [18 * turn / scale, 0]
    if edge["dst"] == edge["src"]:
        angle = np.linspace(0, 2 * math.pi, 25) + turn  # the numbers of nested rings lie apart
        return src + (9 + 8 * turn) / scale * np.stack([np.sin(angle), -np.cos(angle)], 1)
    dst = np.array([edge["dst_x"], edge["dst_y"]])
    along = dst - src
    bend = 0.10 + turn * max(0.16, 18 / scale / math.hypot(*along))
    # the middle of a quadratic curve lies half way to its control point
    control = (src + dst) / 2 + 2 * bend * np.array([-along[1], along[0]])
    t = np.linspace(0, 1, 25)[:, None]
    return np.asarray((1 - t) ** 2 * src + 2 * t * (1 - t) * control + t**2 * dst)


def _headed(path: np.ndarray, width: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The shaft, shortened, and the arrow's head as a closed triangle with its tip at the end."""
    length, half = (8 + 2.4 * width) / scale, (3.2 + 1.1 * width) / scale
    away = np.hypot(*(path - path[-1]).T)
    shaft = path[: max(int((away > length).sum()), 1)]
    back = shaft[-1] - path[-1]
    back = back / (np.hypot(*back) or 1.0)
    base = path[-1] + length * back
    side = half * np.array([-back[1], back[0]])
    head = np.stack([path[-1], base + side, base - side, path[-1]])
    return np.concatenate([shaft, base[None] - 0.1 * length * back]), head


def _turns(drawn: pd.DataFrame) -> list[int]:
    """How many edges between the same two tokens, in the same direction, come before each one."""
    return drawn.groupby(["dst", "src"]).cumcount().tolist()


def _list(drawn: pd.DataFrame, words: pd.DataFrame, n: int) -> list[str]:
    """Lines beside the picture: the numbered edges, then those that start in the text."""
    digits = decimals(pd.concat([drawn["estimate"], words["estimate"]]))
    lines = [f"<b>   {'head':<6}{'estimate':>9}  source \N{RIGHTWARDS ARROW} reader</b>"]
    for number, edge in enumerate(records(drawn), 1):
        lines.append(f"{number:>2} {_line(edge, digits)}")
    if len(drawn) < n:
        lines.append(f"(all {len(drawn)} that the table holds)" if len(drawn) else "none")
    if len(words):
        total = signed(float(words["estimate"].sum()), digits)
        lines += ["", f"<b>from text, not drawn: {len(words)}, sum {total}</b>"]
        lines += [f"   {_line(edge, digits)}" for edge in records(words.head(LISTED))]
        if more := len(words) - LISTED:
            lines += [f"   ... and {more} more"] if more > 0 else []
    return lines


def _line(edge: dict[str, Any], digits: int) -> str:
    color = RIGHT if edge["estimate"] >= 0 else WRONG
    value = f"{signed(edge['estimate'], digits):>9}"
    ends = f"{_end(edge, 'src', short=True)} \N{RIGHTWARDS ARROW} {_end(edge, 'dst', short=True)}"
    head = f"{head_name(edge['layer'], edge['head']):<6}"
    return f'{head}<span style="color:{color}"><b>{value}</b></span>  {ends}'


def _end(edge: dict[str, Any], which: str, short: bool = False) -> str:
    position, token = edge[f"{which}_position"], edge[which]
    if token == TEXT:
        return f"text@{position}" if short else f"text (position {position})"
    return f"{token}" if short else f"token {token} (position {position})"


def _extent(drawn: pd.DataFrame, size: tuple[int, int] | None) -> Box:
    """The picture; where nobody knows its size, a little beyond the outermost token."""
    if size is not None:
        return 0.0, 0.0, float(size[0]), float(size[1])
    if not len(drawn):
        return 0.0, 0.0, 1.0, 1.0
    right, bottom = (drawn[[f"src_{axis}", f"dst_{axis}"]].max().max() for axis in "xy")
    return 0.0, 0.0, 1.06 * float(right), 1.06 * float(bottom)


def _around(box: Box, paths: list[np.ndarray], air: float) -> Box:
    """The box widened to hold the paths: arrows bend out of it, tokens may lie in padding."""
    inside = np.array(box).reshape(2, 2)
    points = np.concatenate([inside, *paths])
    low, high = points.min(0), points.max(0)
    low = np.where(low < inside[0], low - air, inside[0])
    high = np.where(high > inside[1], high + air, inside[1])
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def _canvas(
    box: Box,
    scale: float,
    image: Image.Image | None,
    size: tuple[int, int] | None,
    lines: list[str],
    title: str,
) -> go.Figure:
    """Axes in pixels of the picture, the picture in them, the list beside."""
    wide, high = (box[2] - box[0]) * scale, (box[3] - box[1]) * scale
    margin = {"l": 16, "t": 64, "r": LIST, "b": 34}
    below = max(0.0, LINE * (len(lines) + 1) - high)  # the list may be longer than the picture
    margin["b"] += round(below)
    fig = go.Figure(
        layout={
            **LAYOUT,
            "width": round(wide) + margin["l"] + margin["r"],
            "height": round(high) + margin["t"] + margin["b"],
            "margin": margin,
            "hovermode": "closest",
            "title": _title(title, wide + margin["l"] + margin["r"]),
            "paper_bgcolor": "white",
        }
    )
    hidden = {"visible": False, "fixedrange": True}
    fig.update_xaxes(range=[box[0], box[2]], **hidden)
    fig.update_yaxes(range=[box[3], box[1]], **hidden)
    if image is not None:
        fig.add_layout_image(
            source=_data(image), x=0, y=0, sizex=image.width, sizey=image.height,
            xref="x", yref="y", sizing="stretch", layer="below", opacity=0.8,
        )  # fmt: skip
    if size is not None or image is None:
        right, bottom = size or (box[2], box[3])
        fig.add_shape(
            type="rect", x0=0, y0=0, x1=right, y1=bottom, line={"color": "#b9c1c9", "width": 1},
            fillcolor="#eef1f3" if image is None else "rgba(0,0,0,0)", layer="below",
        )  # fmt: skip
    fig.add_annotation(
        text="<br>".join(lines), x=1, xref="paper", xanchor="left", xshift=18, y=1, yref="paper",
        yanchor="top", align="left", showarrow=False,
        font={"size": 12, "family": MONO, "color": INK},
    )  # fmt: skip
    rule = (
        f'<span style="color:{RIGHT}"><b>blue</b></span> towards the target, '
        f'<span style="color:{WRONG}"><b>orange</b></span> away from it; thicker is stronger'
    )
    fig.add_annotation(
        text=rule, x=0, xref="paper", xanchor="left", y=0, yref="paper", yanchor="top", yshift=-8,
        showarrow=False, font={"size": 12, "family": FONT, "color": MUTED},
    )  # fmt: skip
    return fig


def _opened(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim in (2, 3):
        return Image.fromarray(picture).convert("RGB")
    what = type(picture).__name__
    if isinstance(picture, np.ndarray):
        what = f"array {list(picture.shape)} {picture.dtype}"
    raise ImageError(f"the picture is a {what}; a PIL image or a uint8 array [h, w, 3] would do")


def _data(image: Image.Image) -> str:
    """The picture as a `data:` address, small ones enlarged so that their pixels stay square."""
    longer = max(image.size)
    if longer > MAX_PIXELS:
        size = [max(1, round(s * MAX_PIXELS / longer)) for s in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    elif (times := SIDE // longer) > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _title(text: str, width: float) -> dict[str, Any]:
    """A title broken into lines that fit so many pixels."""
    lines = "<br>".join(textwrap.wrap(text, max(round(width / 7.6), 20)))
    return {"text": lines, "x": 0.02, "xanchor": "left", "font": {"size": 14}}


def _short(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}".replace("-", MINUS)
