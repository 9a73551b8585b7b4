"""Figures over the stages, in the order of the forward pass: one point a stage, one line a model.

The line is that of the stages on the path; a layer that the adapter does not read hangs on a dotted
side branch with hollow points. Controls are grey. A probe of shuffled labels stands where the stage
stands whose states it reads, random features (which are no stage) stand to the right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from interp.errors import TableError
from interp.report.marks import edge_notes, mark, reference_lines
from interp.report.palette import GREYS, INK, LAYOUT, MUTED, PURPLE, RIGHT, Style, axis
from interp.report.plots import end_labels, figure, line, value_range
from interp.report.tables import CONTROLS, ROOMS, Summary, Tables, join_stages

METRICS = {
    "accuracy": "token accuracy",
    "token_miou": "token mIoU",
    "pixel_miou": "pixel mIoU",
}
GROUPS = (("interior", "boundary"), ("late", "early"))
_OTHERS = {
    "random_llm": ("weights shuffled", Style(GREYS[0], "dash", "square", 1.8)),
    "bidirectional_refit": ("bidirectional, refitted", Style(PURPLE, symbol="diamond", width=1.8)),
}
_SHUFFLED = Style(GREYS[2], "dot", "square", 1.6)
_NOISE = Style(GREYS[0], symbol="x")
JUDGED = "right or wrong is judged here"
REFERENCE = "the reference stage"
FEW = 30  # stages, up to which points in half a page's width do not touch
_WIDTH, _LETTER = 690, 6.6  # pixels: of a plot with names at the right, of a letter


def stages(tables: Tables, summary: Summary) -> go.Figure:
    """Token accuracy over all stages."""
    fig = figure(430, margin={**LAYOUT["margin"], "r": 196, "b": 96})
    note = JUDGED if summary["findings"] else REFERENCE
    _stage_panel(fig, tables, summary, "accuracy", note)
    return fig


def stages_zoom(tables: Tables, summary: Summary) -> go.Figure:
    """The same from the layer that the adapter reads on, in a scale that shows the drop."""
    rows = tables["stages"].query("metric == 'accuracy'")
    rows = rows[~rows["kind"].isin(list(CONTROLS))]
    read = rows[rows["on_path"] & (rows["kind"] == "vision")]["order"]
    near = {**tables, "stages": rows[rows["order"] >= read.max()] if len(read) else rows}
    fig = figure(400, margin={**LAYOUT["margin"], "r": 196, "b": 80})
    note = JUDGED if summary["findings"] else REFERENCE
    _stage_panel(fig, near, summary, "accuracy", note)
    return fig


def stages_miou(tables: Tables, summary: Summary) -> go.Figure:
    """Token-mIoU and pixel-mIoU over all stages, side by side."""
    metrics = [m for m in ("token_miou", "pixel_miou") if m in set(tables["stages"]["metric"])]
    fig = make_subplots(1, len(metrics), horizontal_spacing=0.11)
    fig.update_layout({**LAYOUT, "height": 340, "margin": {**LAYOUT["margin"], "b": 96}})
    for col, metric in enumerate(metrics, 1):
        _stage_panel(fig, tables, summary, metric, row=1, col=col)
    return fig


def groups(tables: Tables, summary: Summary) -> go.Figure:
    """Accuracy of tokens at boundaries and inside, early and late, over the stages."""
    rows = join_stages(tables["groups"].query("metric == 'accuracy'"), tables)
    rows = rows[rows["kind"].isin(list(ROOMS))].sort_values("order")
    shown = rows[rows["on_path"] & rows["group"].isin(sum(GROUPS, ()))]
    limits = value_range([shown])
    fig = make_subplots(1, len(GROUPS), horizontal_spacing=0.17)
    fig.update_layout({**LAYOUT, "height": 340, "margin": {**LAYOUT["margin"], "b": 96, "r": 76}})
    for col, pair in enumerate(GROUPS, 1):
        where = {"row": 1, "col": col}
        _rooms(fig, rows, named=False, **where)
        ends = []
        for group, look in zip(
            pair, (Style(RIGHT), Style(INK, "dash", "square", 1.8)), strict=True
        ):
            part = shown[shown["group"] == group]
            if len(part):
                small = {"size": 4} if len(part) > FEW else {}
                line(
                    fig, part, "order", group, look, extra=" · %{text}", marker=small,
                    text=part["label"].tolist(), **where,
                )  # fmt: skip
                ends.append((float(part["estimate"].iloc[-1]), group, look.color))
        right = fig.layout[f"xaxis{col if col > 1 else ''}"].domain[1]
        end_labels(fig, ends, limits, x=right + 0.008, gap=0.08)
        stage_axis(fig, rows, **where)
        fig.update_yaxes(
            axis("token accuracy" if col == 1 else "", tickformat=".0%", range=limits), **where
        )
    return fig


def _stage_panel(
    fig: go.Figure,
    tables: Tables,
    summary: Summary,
    metric: str,
    note: str = "",
    **where: Any,
) -> None:
    """One metric over the stages; with a `note` on the reference stage, lines have names, too."""
    rows = tables["stages"].query("metric == @metric").sort_values("order")
    main = rows[rows["kind"].isin(list(ROOMS))]
    path = main[main["on_path"]]
    if not len(main):
        return
    limits = value_range([rows])
    number = "" if where.get("col", 1) == 1 else str(where["col"])
    small = {"size": 4} if where and len(main) > FEW else {}
    ends: list[tuple[float, str, str]] = []

    _rooms(fig, main, named=bool(note), **where)
    reads = path[path["kind"] == "vision"].tail(1)
    off = pd.concat([reads, main[~main["on_path"]]])
    if len(off) > len(reads):
        # From the stage that is read on, a dotted side branch: the adapter never sees it.
        look = Style(RIGHT, dash="dot", width=1.2)
        size = small.get("size", 7) + 1
        sizes = [0] * len(reads) + [size] * (len(off) - len(reads))
        hollow = {"color": "white", "line": {"color": RIGHT, "width": 1.6}, "size": sizes}
        line(fig, off, "order", "off the path", look, band=0.06, marker=hollow, **where)
    if len(path):
        line(
            fig, path, "order", "the model", Style(RIGHT), extra=" · %{text}",
            text=path["stage"].tolist(), marker=small, **where,
        )  # fmt: skip
        ends.append((float(path["estimate"].iloc[-1]), "<b>the model</b>", RIGHT))
    for kind, (name, look) in _OTHERS.items():
        other = rows[rows["kind"] == kind]
        if len(other):
            start = path[path["order"] < other["order"].min()].tail(1)
            line(fig, pd.concat([start, other]), "order", name, look, band=0.1, **where)
            ends.append((float(other["estimate"].iloc[-1]), name, look.color))
    noise = _controls(fig, rows, main, ends, small, **where)

    if note and len(main) > FEW and not len(noise):
        # The notes run over several stages here, so they get a strip of their own.
        limits = (limits[0] - 0.2 * (limits[1] - limits[0]), limits[1])
    limits = reference_lines(fig, tables, metric, limits, ends, **where)
    if note:
        end_labels(fig, ends, limits)
        judged = path[path["stage"] == summary["reference_stage"]]
        above = 60 if len(noise) else 0  # controls lie at the floor, where the notes else are
        mark(fig, reads, limits, "the adapter reads this layer", above + 34)
        mark(fig, judged, limits, note, above + 16)
    stage_axis(fig, pd.concat([main, noise]), **where)
    fig.update_yaxes(axis(METRICS.get(metric, metric), tickformat=".0%", range=limits), **where)
    if not note:
        edge_notes(fig, tables, metric, limits, number)


def _controls(
    fig: go.Figure,
    rows: pd.DataFrame,
    main: pd.DataFrame,
    ends: list[tuple[float, str, str]],
    small: dict[str, Any],
    **where: Any,
) -> pd.DataFrame:
    """Shuffled labels at the places of their stages, noise to the right; returns the noise."""
    shuffled = rows[rows["kind"] == "shuffled_labels"]
    place = dict(zip(main["label"], main["order"], strict=True))
    if lost := [label for label in shuffled["label"] if label not in place]:
        raise TableError(f"table stages: shuffled labels at {lost[0]!r}, but no such stage")
    shuffled = shuffled.assign(order=shuffled["label"].map(place)).sort_values("order")
    noise = rows[rows["kind"] == "random_features"]
    noise = noise.assign(order=main["order"].max() + 1 + np.arange(len(noise)))
    few = len(shuffled) <= FEW
    shown = (
        (shuffled, "shuffled_labels", _SHUFFLED, "lines" + "+markers" * few, {"size": 4}, 0.1),
        (noise, "random_features", _NOISE, "markers", small, 0.0),
    )
    for part, kind, look, mode, marker, band in shown:
        if len(part):
            name = CONTROLS[kind]
            line(
                fig, part, "order", name, look, band=band, mode=mode, marker=marker,
                extra=" · %{text}", text=part["label"].tolist(), **where,
            )  # fmt: skip
            ends.append((float(part["estimate"].iloc[-1]), name, MUTED))
    return noise


def stage_axis(fig: go.Figure, rows: pd.DataFrame, **where: Any) -> None:
    """Ticks with the names of stages: of a deep model's every so many, and of the controls."""
    labels = dict(zip(rows["order"].tolist(), rows["label"].tolist(), strict=True))
    control = set(rows[rows["kind"].isin(list(CONTROLS))]["order"].tolist())
    own = sorted(set(labels) - control)
    step = len(own) // (12 if where else 25) + 1
    ticks, names = own[::step], [labels[t] for t in own[::step]]
    if control and step == 1:
        ticks, names = ticks + sorted(control), names + [labels[t] for t in sorted(control)]
    elif control:
        # No room for a name each, nor for that of a stage just before them.
        ticks = [t for t in ticks if min(control) - t >= step]
        ticks, names = [*ticks, min(control)], [labels[t] for t in ticks] + ["noise"]
    low, high = min(labels) - 0.6, max(labels) + 0.6
    fig.update_xaxes(
        axis(
            showgrid=False, tickvals=ticks, ticktext=names, tickangle=-45, range=[low, high]
        ),
        **where,
    )  # fmt: skip
    if not where:
        # plotly leaves out a slanted name that would begin left of the figure.
        needs = len(names[0]) * _LETTER * 0.75 - (ticks[0] - low) / (high - low) * _WIDTH
        fig.update_layout(margin_l=max(fig.layout.margin.l, round(needs + 8)))


def _rooms(fig: go.Figure, main: pd.DataFrame, *, named: bool, **where: Any) -> None:
    """The parts of the model as shaded stretches of stages, named above the plot if `named`."""
    pixels = _WIDTH / float(main["order"].max() - main["order"].min() + 1.2)
    ends: list[float] = []  # where the names end, of each level above the plot
    for kind, room in ROOMS.items():
        orders = main[main["kind"] == kind]["order"]
        if len(orders):
            low, high = float(orders.min()) - 0.5, float(orders.max()) + 0.5
            fill = "#e9eef3" if kind == "adapter" else "#f4f6f8"
            # Of an empty panel plotly leaves the shape out, unless told not to.
            told = {**where, "exclude_empty_subplots": False} if where else {}
            fig.add_vrect(x0=low, x1=high, fillcolor=fill, line_width=0, layer="below", **told)
            if named:
                name = room if len(room) * _LETTER <= (high - low) * pixels else room.split()[0]
                level = next((i for i, end in enumerate(ends) if end <= low * pixels), len(ends))
                ends[level : level + 1] = [low * pixels + (len(name) + 1) * _LETTER]
                fig.add_annotation(
                    x=low, y=1.01, yref="y domain", text=name, showarrow=False, xanchor="left",
                    yanchor="bottom", font={"size": 12, "color": MUTED},
                    **({"yshift": 15 * level} if level else {}),
                )  # fmt: skip
    if len(ends) > 1:
        fig.update_layout(margin_t=fig.layout.margin.t + 15 * (len(ends) - 1))
