"""Figures with bars and cells: what a knockout removes, heads, components, thirds."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from interp.report.palette import (
    DIVERGING,
    GREYS,
    INK,
    LAYOUT,
    MUTED,
    RIGHT,
    SOURCES,
    TEAL,
    WRONG,
    axis,
    faded,
    style,
)
from interp.report.plots import (
    INTERVAL,
    PERCENT_HOVER,
    PLAIN_HOVER,
    arrow,
    figure,
    value_range,
    whiskers,
)
from interp.report.tables import Summary, Tables, records
from interp.report.text import DASH, MINUS, interval_text

TOP_HEADS = 8
_SUMS = {"margin": INK}
MARGIN = f"gain of the margin (logit of the true class {MINUS} of the confused one)"
MEASURES = {"share": "share of the recovery gone"}


def effects(tables: Tables, summary: Summary) -> go.Figure:
    """Share of the recovery that is gone, cutting in all layers; the controls in grey."""
    rows = tables["knockout_effect"].query("layers == 'all'").sort_values("estimate")
    fig = figure(90 + 34 * len(rows), margin={**LAYOUT["margin"], "r": 120})
    low, high = value_range([rows], 0.0)
    fig.add_trace(
        go.Bar(
            y=[arrow(c) for c in rows["condition"]],
            x=rows["estimate"].tolist(),
            orientation="h",
            marker_color=[GREYS[2] if c else WRONG for c in rows["is_control"]],
            customdata=rows[INTERVAL].to_numpy().tolist(),
            hovertemplate=f"<b>%{{y}}</b><br>{PERCENT_HOVER}<extra></extra>",
            **whiskers(rows, "x"),
        )
    )
    for condition, row in zip(rows["condition"], records(rows), strict=True):
        fig.add_annotation(
            x=1.01, xref="paper", xanchor="left", y=arrow(condition), showarrow=False,
            text=interval_text(row, "share"), font={"size": 12, "color": INK},
        )  # fmt: skip
    fig.update_xaxes(
        axis("share of the recovery that is gone", tickformat=".0%", range=[low, high],
             zeroline=True, zerolinecolor="#8c96a0")
    )  # fmt: skip
    fig.update_yaxes(showgrid=False, ticklabelstandoff=8)
    return fig


def windows(tables: Tables, summary: Summary) -> go.Figure:
    """The same, cutting in one layer or a window of layers only."""
    rows = tables["knockout_effect"]
    rows = rows[~rows["is_control"] & rows["condition"].isin(_windowed(rows))]
    rows = pd.concat([rows[rows["layers"] != "all"], rows[rows["layers"] == "all"]])
    fig = figure(320, barmode="group")
    for condition in rows["condition"].unique():
        part = rows[rows["condition"] == condition]
        color = style(condition).color
        names = [_window_name(layers) for layers in part["layers"]]
        fig.add_trace(
            go.Bar(
                x=names,
                y=part["estimate"].tolist(),
                name=arrow(condition),
                marker_color=[color if "all" in n else faded(color, 0.62) for n in names],
                customdata=part[INTERVAL].to_numpy().tolist(),
                hovertemplate=f"<b>%{{x}}</b><br>{PERCENT_HOVER}<extra></extra>",
                **whiskers(part),
            )
        )
    fig.update_xaxes(title_text="layers in which the edges are cut", type="category")
    fig.update_yaxes(
        title_text="share of the recovery gone", tickformat=".0%",
        range=list(value_range([rows], 0.0)), zeroline=True, zerolinecolor="#8c96a0",
    )  # fmt: skip
    return fig


def _windowed(rows: pd.DataFrame) -> list[str]:
    return rows.loc[rows["layers"] != "all", "condition"].unique().tolist()


def _window_name(layers: str) -> str:
    return "all layers" if layers == "all" else layers.replace("-", DASH)


def head_map(tables: Tables, summary: Summary) -> go.Figure:
    """Layers x heads, coloured by the head's share of the recovered margin."""
    rows = tables["head_totals"]
    grid = rows.pivot(index="layer", columns="head", values="share")
    told = rows.assign(told=[interval_text(r, "") for r in records(rows)]).pivot(
        index="layer", columns="head", values="told"
    )
    n_layers, n_heads = grid.shape
    small = n_layers * n_heads > 200
    most = float(rows["share"].abs().max()) or 1.0
    fig = figure(110 + (18 if small else 44) * n_layers)
    fig.add_trace(
        go.Heatmap(
            z=grid.to_numpy().tolist(),
            x=[str(h) for h in grid.columns],
            y=[str(layer) for layer in grid.index],
            zmin=-most,
            zmax=most,
            colorscale=DIVERGING,
            xgap=2,
            ygap=2,
            customdata=told.to_numpy().tolist(),
            text=[[f"{v:.1%}".replace("-", MINUS) for v in row] for row in grid.to_numpy()],
            texttemplate=None if small else "%{text}",
            hovertemplate="<b>layer %{y}, head %{x}</b><br>%{z:.1%} of the recovered margin"
            "<br>margin %{customdata}<extra></extra>",
            colorbar={"thickness": 10, "outlinewidth": 0, "tickformat": ".0%", "ticks": ""},
        )
    )
    fig.update_xaxes(title_text="head", side="bottom", type="category", linewidth=0)
    fig.update_yaxes(
        title_text="layer", autorange="reversed", showgrid=False, type="category", linewidth=0
    )
    return fig


def sources(tables: Tables, summary: Summary) -> go.Figure:
    """The top heads' contributions, split by what the head read."""
    totals = tables["head_totals"].sort_values("rank").head(TOP_HEADS)
    heads = tables["heads"].merge(totals[["layer", "head", "rank"]], on=["layer", "head"])
    names = {rank: f"layer {la}, head {h}" for la, h, rank in
             zip(totals["layer"], totals["head"], totals["rank"], strict=True)}  # fmt: skip
    fig = figure(110 + 34 * len(totals), barmode="relative", showlegend=True)
    known = [s for s in SOURCES if s in set(heads["source"])]
    others = [s for s in heads["source"].unique() if s not in SOURCES]
    for number, source in enumerate(known + others):
        part = heads[heads["source"] == source].sort_values("rank")
        fig.add_trace(
            go.Bar(
                y=[names[r] for r in part["rank"]],
                x=part["estimate"].tolist(),
                orientation="h",
                name=source,
                marker_color=SOURCES.get(source, GREYS[number % len(GREYS)]),
                customdata=part[[*INTERVAL, "share"]].to_numpy().tolist(),
                hovertemplate=f"<b>%{{y}}: {source}</b><br>margin {PLAIN_HOVER}"
                "<br>%{customdata[3]:.1%} of the whole<extra></extra>",
            )
        )
    fig.add_trace(
        go.Scatter(
            y=[names[r] for r in totals["rank"]],
            x=totals["estimate"].tolist(),
            mode="markers",
            name="sum, with interval",
            marker={"color": INK, "symbol": "line-ns-open", "size": 12},
            customdata=totals[INTERVAL].to_numpy().tolist(),
            hovertemplate=f"<b>%{{y}}, sum</b><br>margin {PLAIN_HOVER}<extra></extra>",
            **whiskers(totals, "x"),
        )
    )
    fig.update_xaxes(axis(MARGIN, zeroline=True, zerolinecolor="#8c96a0"))
    fig.update_yaxes(autorange="reversed", showgrid=False, ticklabelstandoff=8)
    return fig


def components(tables: Tables, summary: Summary) -> go.Figure:
    """What the starting state, every attention layer and every MLP add to the margin."""
    rows = tables["components"]
    fig = figure(340)
    colors = [
        RIGHT if c.startswith("att") else TEAL if c.startswith("mlp") else _SUMS.get(c, GREYS[2])
        for c in rows["component"]
    ]
    fig.add_trace(
        go.Bar(
            x=rows["component"].tolist(),
            y=rows["estimate"].tolist(),
            marker_color=colors,
            customdata=rows[INTERVAL].to_numpy().tolist(),
            hovertemplate=f"<b>%{{x}}</b><br>margin {PLAIN_HOVER}<extra></extra>",
            **whiskers(rows),
        )
    )
    fig.update_xaxes(tickangle=-45 if len(rows) > 8 else 0)
    fig.update_yaxes(title_text="part of the margin", zeroline=True, zerolinecolor="#8c96a0")
    return fig


def head_knockout(tables: Tables, summary: Summary) -> go.Figure:
    """The top heads knocked out, against as many random ones; a panel a measure."""
    rows = tables["head_knockout"]
    measures = rows["measure"].unique().tolist()
    fig = make_subplots(1, len(measures), horizontal_spacing=0.14)
    fig.update_layout({**LAYOUT, "height": 300, "margin": {**LAYOUT["margin"], "b": 36}})
    for col, measure in enumerate(measures, 1):
        part = rows[rows["measure"] == measure]
        fig.add_trace(
            go.Bar(
                x=part["set"].tolist(),
                y=part["estimate"].tolist(),
                marker_color=[_set_color(name) for name in part["set"]],
                customdata=part[[*INTERVAL, "n_heads"]].to_numpy().tolist(),
                hovertemplate=f"<b>%{{x}}</b> (%{{customdata[3]}} heads)<br>{PERCENT_HOVER}"
                "<extra></extra>",
                width=0.55,
                **whiskers(part),
            ),
            row=1,
            col=col,
        )
        fig.update_xaxes(axis(showgrid=False), row=1, col=col)
        fig.update_yaxes(
            axis(MEASURES.get(measure, measure), tickformat=".0%", zeroline=True,
                 zerolinecolor="#8c96a0", range=list(value_range([part], 0.0))),
            row=1, col=col,
        )  # fmt: skip
    return fig


def _set_color(name: str) -> str:
    if "random" in name:
        return GREYS[2]
    return WRONG if name.startswith("top") else faded(WRONG, 0.55)


def thirds(tables: Tables, summary: Summary) -> go.Figure:
    """What bidirectional attention adds to early, middle and late tokens."""
    rows = tables["thirds"]
    fig = figure(330, barmode="group", showlegend=True)
    for number, comparison in enumerate(rows["comparison"].unique()):
        part = rows[rows["comparison"] == comparison]
        fig.add_trace(
            go.Bar(
                x=part["third"].tolist(),
                y=(100 * part["estimate"]).tolist(),
                name=arrow(comparison),
                marker_color=style(comparison, number).color,
                customdata=(100 * part[INTERVAL]).to_numpy().tolist(),
                hovertemplate=f"<b>%{{x}}, {arrow(comparison)}</b><br>%{{customdata[0]:+.1f}} "
                "[%{customdata[1]:+.1f}, %{customdata[2]:+.1f}] points<extra></extra>",
                width=0.3,
                **whiskers(part.assign(**{k: 100 * part[k] for k in INTERVAL})),
            )
        )
    fig.update_xaxes(title_text="third of the image tokens, in reading order")
    fig.update_yaxes(
        title_text="change in accuracy, points", tickformat="+", zeroline=True,
        zerolinecolor=MUTED,
    )  # fmt: skip
    return fig
