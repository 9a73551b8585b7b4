"""Figures with lines: accuracy over stages, under knockout, over rows, over anchors."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from interp.report.palette import GREYS, INK, LAYOUT, MUTED, PURPLE, RIGHT, Style, axis, style
from interp.report.plots import arrow, end_labels, figure, line, value_range, whiskers
from interp.report.tables import Summary, Tables

METRICS = {
    "accuracy": "token accuracy",
    "token_miou": "token mIoU",
    "pixel_miou": "pixel mIoU",
}
_ROOMS = {"vision": "vision encoder", "adapter": "adapter", "llm": "language model"}
_OTHERS = {
    "random_llm": ("weights shuffled", Style(GREYS[0], "dash", "square", 1.8)),
    "bidirectional_refit": ("bidirectional, refitted", Style(PURPLE, symbol="diamond", width=1.8)),
}
_REFERENCES = {"majority_floor": "floor (one class)", "token_ceiling": "ceiling"}


def stages(tables: Tables, summary: Summary) -> go.Figure:
    """Token accuracy over all stages."""
    fig = figure(430, margin={**LAYOUT["margin"], "r": 196, "b": 96})
    _stage_panel(fig, tables, summary, "accuracy", named=True)
    return fig


def stages_zoom(tables: Tables, summary: Summary) -> go.Figure:
    """The same from the layer that the adapter reads on, in a scale that shows the drop."""
    rows = tables["stages"].query("metric == 'accuracy'")
    read = rows[rows["on_path"] & (rows["kind"] == "vision")]["order"]
    near = {**tables, "stages": rows[rows["order"] >= read.max()] if len(read) else rows}
    fig = figure(400, margin={**LAYOUT["margin"], "r": 196, "b": 80})
    _stage_panel(fig, near, summary, "accuracy", named=True)
    return fig


def stages_miou(tables: Tables, summary: Summary) -> go.Figure:
    """Token-mIoU and pixel-mIoU over all stages, side by side."""
    metrics = [m for m in ("token_miou", "pixel_miou") if m in set(tables["stages"]["metric"])]
    fig = make_subplots(1, len(metrics), horizontal_spacing=0.11)
    fig.update_layout({**LAYOUT, "height": 340, "margin": {**LAYOUT["margin"], "b": 96}})
    for col, metric in enumerate(metrics, 1):
        _stage_panel(fig, tables, summary, metric, named=False, row=1, col=col)
    return fig


def _stage_panel(
    fig: go.Figure,
    tables: Tables,
    summary: Summary,
    metric: str,
    *,
    named: bool,
    **where: Any,
) -> None:
    rows = tables["stages"].query("metric == @metric").sort_values("order")
    main = rows[rows["kind"].isin(_ROOMS)]
    path = main[main["on_path"]]
    if not len(path):
        return
    limits = value_range([rows])
    number = "" if where.get("col", 1) == 1 else str(where["col"])
    labels = dict(zip(main["order"], main["label"], strict=True))

    for kind, room in _ROOMS.items():
        part = main[main["kind"] == kind]
        if len(part):
            _room(fig, part["order"], room if named else "", kind == "adapter", **where)
    reads = path[path["kind"] == "vision"].tail(1)
    off = pd.concat([reads, main[~main["on_path"]]])
    if len(off) > 1:
        # From the stage that is read on, a dotted side branch: the adapter never sees it.
        look = Style(RIGHT, dash="dot", width=1.2)
        sizes = [0] * len(reads) + [8] * (len(off) - len(reads))
        hollow = {"color": "white", "line": {"color": RIGHT, "width": 1.6}, "size": sizes}
        line(fig, off, "order", "off the path", look, band=0.06, marker=hollow, **where)
    line(
        fig, path, "order", "the model", Style(RIGHT), extra=" · %{text}",
        text=path["stage"].tolist(), **where,
    )  # fmt: skip
    ends = [(float(path["estimate"].iloc[-1]), "<b>the model</b>", RIGHT)]
    for kind, (name, look) in _OTHERS.items():
        other = rows[rows["kind"] == kind]
        if len(other):
            start = path[path["order"] < other["order"].min()].tail(1)
            line(fig, pd.concat([start, other]), "order", name, look, band=0.1, **where)
            ends.append((float(other["estimate"].iloc[-1]), name, look.color))

    limits = _reference_lines(fig, tables, metric, limits, ends, **where)
    if named:
        end_labels(fig, ends, limits)
        judged = path[path["stage"] == summary["reference_stage"]]
        _mark(fig, reads, limits, "the adapter reads this layer", 34)
        _mark(fig, judged, limits, "right or wrong is judged here", 16)
    step = len(labels) // 25 + 1
    ticks = sorted(labels)[::step]
    fig.update_xaxes(
        axis(
            showgrid=False,
            tickvals=ticks,
            ticktext=[labels[t] for t in ticks],
            tickangle=-45,
            range=[min(labels) - 0.6, max(labels) + 0.6],
        ),
        **where,
    )
    fig.update_yaxes(axis(METRICS.get(metric, metric), tickformat=".0%", range=limits), **where)
    if not named:
        _edge_notes(fig, tables, metric, limits, number)


def _room(fig: go.Figure, orders: pd.Series, name: str, dark: bool, **where: Any) -> None:
    """A shaded stretch of stages, named above the plot."""
    low, high = float(orders.min()) - 0.5, float(orders.max()) + 0.5
    fig.add_vrect(
        x0=low, x1=high, fillcolor="#e9eef3" if dark else "#f4f6f8", line_width=0, layer="below",
        **where,
    )  # fmt: skip
    if name:
        fig.add_annotation(
            x=low, y=1.01, yref="y domain", text=name, showarrow=False, xanchor="left",
            yanchor="bottom", font={"size": 12, "color": MUTED},
        )  # fmt: skip


def _references(tables: Tables, metric: str) -> list[tuple[str, float]]:
    if "references" not in tables:
        return []
    rows = tables["references"].query("metric == @metric")
    return [
        (_REFERENCES.get(name, name.replace("_", " ")), float(value))
        for name, value in zip(rows["name"], rows["estimate"], strict=True)
    ]


def _reference_lines(
    fig: go.Figure,
    tables: Tables,
    metric: str,
    limits: tuple[float, float],
    ends: list[tuple[float, str, str]],
    **where: Any,
) -> tuple[float, float]:
    """Dotted lines for floor and ceiling; where one is far off, a note at the edge instead.

    With the floor at 0.1 and the ceiling at 1, a drop of two points could not be seen. Returns
    the limits, widened to hold the lines that are near.
    """
    low, high = limits
    reach = 0.5 * (high - low)
    for _, value in _references(tables, metric):
        if limits[0] - reach <= value <= limits[1] + reach:
            low, high = min(low, value - 0.05 * reach), max(high, value + 0.05 * reach)
    for name, value in _references(tables, metric):
        if low <= value <= high:
            fig.add_hline(y=value, line={"dash": "dot", "color": MUTED, "width": 1.2}, **where)
            ends.append((value, f"{name} {value:.1%}", MUTED))
        else:
            edge = high if value > high else low
            ends.append((edge, f"{'↑' if value > high else '↓'} {name} {value:.1%}", MUTED))
    return low, high


def _edge_notes(
    fig: go.Figure, tables: Tables, metric: str, limits: tuple[float, float], number: str
) -> None:
    """In a small panel: floor and ceiling as one line of text above it."""
    notes = [f"{name} {value:.1%}" for name, value in _references(tables, metric)]
    fig.add_annotation(
        text=" · ".join(notes),
        x=0,
        xref=f"x{number} domain",
        xanchor="left",
        y=1.02,
        yref=f"y{number} domain",
        yanchor="bottom",
        showarrow=False,
        font={"size": 12, "color": MUTED},
    )


def _mark(
    fig: go.Figure, rows: pd.DataFrame, limits: tuple[float, float], text: str, shift: int
) -> None:
    """A thin line up from the axis to a stage, with its meaning, `shift` pixels up."""
    for _, at in rows.iterrows():
        fig.add_shape(
            type="line", x0=at["order"], x1=at["order"], y0=limits[0], y1=at["low"],
            line={"color": INK, "width": 1, "dash": "dot"},
        )  # fmt: skip
        fig.add_annotation(
            x=at["order"], y=limits[0], text=text, showarrow=False, xanchor="left", xshift=5,
            yanchor="bottom", yshift=shift, font={"size": 12, "color": INK},
        )  # fmt: skip


def knockout(tables: Tables, summary: Summary) -> go.Figure:
    """Accuracy of the initially wrong tokens over the layers, clean, cut and controls."""
    return _knockout(tables["knockout"].query("not probe_free and layers == 'all'"), 420)


def knockout_probe_free(tables: Tables, summary: Summary) -> go.Figure:
    """The same with tokens chosen by the drawn marks instead of a probe."""
    return _knockout(tables["knockout"].query("probe_free and layers == 'all'"), 340)


def _knockout(rows: pd.DataFrame, height: int) -> go.Figure:
    fig = figure(height, margin={**LAYOUT["margin"], "r": 230})
    limits = value_range([rows])
    ends, controls = [], 0
    for condition in rows["condition"].unique():
        curve = rows[rows["condition"] == condition].sort_values("order")
        look = style(condition, controls)
        control = look.color in GREYS
        controls += control
        first = curve.iloc[0]
        extra = f" · {first['n_tokens']} tokens"
        if first["edges_per_query"] > 0:
            extra += f", {first['edges_per_query']:.1f} edges a token"
        name = arrow(condition)
        line(
            fig, curve, "order", name, look, band=0.05 if control else 0.14,
            extra=extra + "<br>%{x}",
        )  # fmt: skip
        end = float(curve["estimate"].iloc[-1])
        ends.append((end, name, MUTED) if control else (end, f"<b>{name}</b>", look.color))
    end_labels(fig, ends, limits)
    _layer_axis(fig, rows)
    fig.update_yaxes(title_text="accuracy of these tokens", tickformat=".0%", range=limits)
    return fig


def _layer_axis(fig: go.Figure, rows: pd.DataFrame) -> None:
    """Ticks "LLM 0", "LLM 1", ... from stage names; thinned out in deep models."""
    ticks = rows.drop_duplicates("order").sort_values("order")
    ticks = ticks.iloc[:: len(ticks) // 16 + 1]
    layers = [f"LLM {stage.split('.')[1]}" if "." in stage else stage for stage in ticks["stage"]]
    fig.update_xaxes(
        title_text="layer of the language model", tickvals=ticks["order"].tolist(), ticktext=layers
    )


def positions(tables: Tables, summary: Summary) -> go.Figure:
    """Accuracy by row of the picture, causal and bidirectional."""
    rows = tables["positions"]
    fig = figure(390, margin={**LAYOUT["margin"], "r": 220})
    ends = []
    for number, condition in enumerate(rows["condition"].unique()):
        curve = rows[rows["condition"] == condition].sort_values("row")
        look = style(condition, number)
        line(fig, curve, "row", arrow(condition), look, extra=" · row %{x}")
        ends.append((float(curve["estimate"].iloc[-1]), arrow(condition), look.color))
    limits = value_range([rows])
    end_labels(fig, ends, limits)
    fig.update_xaxes(title_text="row of the token grid, 0 = top: read first", dtick=1)
    fig.update_yaxes(title_text="token accuracy", tickformat=".0%", range=limits)
    return fig


def bidirectional(tables: Tables, summary: Summary) -> go.Figure:
    """Accuracy over the layers of the language model, causal and opened."""
    rows = tables["bidirectional"]
    fig = figure(360, margin={**LAYOUT["margin"], "r": 220})
    ends = []
    for number, condition in enumerate(rows["condition"].unique()):
        curve = rows[rows["condition"] == condition].sort_values("order")
        look = style(condition, number)
        line(fig, curve, "order", arrow(condition), look, extra="<br>%{x}")
        ends.append((float(curve["estimate"].iloc[-1]), arrow(condition), look.color))
    limits = value_range([rows])
    end_labels(fig, ends, limits)
    _layer_axis(fig, rows)
    fig.update_yaxes(title_text="token accuracy", tickformat=".0%", range=limits)
    return fig


def dose(tables: Tables, summary: Summary) -> go.Figure:
    """Accuracy by the number of earlier correct tokens of the same region."""
    rows = tables["dose"].sort_values("order")
    fig = figure(390, margin={**LAYOUT["margin"], "r": 220})
    ends = []
    for number, condition in enumerate(rows["condition"].unique()):
        curve = rows[rows["condition"] == condition]
        look = style(condition, number)
        # Bins, not a scale: points with whiskers, joined faintly.
        line(
            fig, curve, "order", arrow(condition), look, band=0,
            extra=" · %{text}", text=[f"{n} tokens" for n in curve["n_tokens"]],
            **whiskers(curve, color=look.color),
        )  # fmt: skip
        ends.append((float(curve["estimate"].iloc[-1]), arrow(condition), look.color))
    limits = value_range([rows])
    end_labels(fig, ends, limits)
    bins = rows.drop_duplicates("order")
    names = [
        f"{anchors}<br><span style='color:{MUTED};font-size:11px'>{n} tokens</span>"
        for anchors, n in zip(bins["anchors"], bins["n_tokens"], strict=True)
    ]
    fig.update_xaxes(
        title_text="earlier correct tokens of the same region",
        tickvals=bins["order"].tolist(),
        ticktext=names,
    )
    fig.update_yaxes(title_text="token accuracy", tickformat=".0%", range=limits)
    return fig
