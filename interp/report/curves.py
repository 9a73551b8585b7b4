"""Figures with lines: accuracy under knockout, over rows, over layers, over anchors."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from interp.report.palette import GREYS, LAYOUT, MUTED, style
from interp.report.plots import arrow, end_labels, figure, line, value_range, whiskers
from interp.report.tables import Summary, Tables


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
