"""What the figures share: a line with its band, bars with whiskers, labels at the ends of lines.

Lines are labelled where they end, not in a legend: with seven conditions a legend would have the
reader match greys. `end_labels` moves the labels apart where lines end close together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from interp.report.palette import LAYOUT, Style, axis, faded
from interp.report.text import MINUS

INTERVAL = ["estimate", "low", "high"]
PERCENT_HOVER = "%{customdata[0]:.1%} [%{customdata[1]:.1%}, %{customdata[2]:.1%}]"
PLAIN_HOVER = "%{customdata[0]:.3f} [%{customdata[1]:.3f}, %{customdata[2]:.3f}]"


def figure(height: int, **layout: Any) -> go.Figure:
    """An empty figure in the page's look."""
    base = {**LAYOUT, "height": height, "xaxis": axis(showgrid=False), "yaxis": axis()}
    return go.Figure(layout={**base, **layout})


def arrow(text: str) -> str:
    """Condition names with a real arrow and minus."""
    return text.replace("->", "→").replace(" - ", f" {MINUS} ")


def line(
    fig: go.Figure,
    rows: pd.DataFrame,
    x: str,
    name: str,
    look: Style,
    *,
    band: float = 0.13,
    extra: str = "",
    **trace: Any,
) -> None:
    """A line through `estimate` over column `x`, its band from `low` to `high` behind it."""
    where = {key: trace.pop(key) for key in ("row", "col") if key in trace}
    at = rows[x].tolist()
    if band:
        fig.add_trace(
            go.Scatter(
                x=at + at[::-1],
                y=rows["high"].tolist() + rows["low"].tolist()[::-1],
                fill="toself",
                fillcolor=faded(look.color, band),
                line={"width": 0},
                hoverinfo="skip",
                mode="lines",
            ),
            **where,
        )
    fig.add_trace(
        go.Scatter(
            x=at,
            y=rows["estimate"].tolist(),
            name=name,
            customdata=rows[INTERVAL].to_numpy().tolist(),
            mode=trace.pop("mode", "lines+markers"),
            line={"color": look.color, "dash": look.dash, "width": look.width},
            marker={
                "color": look.color,
                "symbol": look.symbol,
                "size": 7,
                **trace.pop("marker", {}),
            },
            hovertemplate=f"<b>{name}</b>{extra}<br>{PERCENT_HOVER}<extra></extra>",
            **trace,
        ),
        **where,
    )


def whiskers(rows: pd.DataFrame, direction: str = "y", color: str = "#3b4650") -> dict[str, Any]:
    """`error_y` or `error_x` for bars that stand for `estimate`."""
    spread = {
        "type": "data",
        "symmetric": False,
        "array": (rows["high"] - rows["estimate"]).tolist(),
        "arrayminus": (rows["estimate"] - rows["low"]).tolist(),
        "color": color,
        "thickness": 1.3,
        "width": 4,
    }
    return {f"error_{direction}": spread}


def value_range(frames: Sequence[pd.DataFrame], *more: float) -> tuple[float, float]:
    """A range that holds all estimates and intervals, with some air.

    >>> rows = pd.DataFrame({"estimate": [0.0, 1.0], "low": [float("nan")] * 2, "high": [0.5, 0.9]})
    >>> value_range([rows])
    (-0.06, 1.06)
    """
    # Estimates, too: from one picture there is no interval.
    low = min([f[["low", "estimate"]].min().min() for f in frames if len(f)] + list(more))
    high = max([f[["high", "estimate"]].max().max() for f in frames if len(f)] + list(more))
    air = 0.06 * (high - low or 1.0)
    return float(low - air), float(high + air)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """The values moved as little as may be so that neighbours are `gap` apart, order kept.

    >>> [round(v, 2) for v in spread([0.5, 0.52, 0.9], 0.1)]
    [0.46, 0.56, 0.9]
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    # Blocks of touching labels; a block sits at the mean of where its labels want to be.
    blocks: list[tuple[float, list[int]]] = []
    for i in order:
        centre, members = values[i], [i]
        while blocks:
            before, others = blocks[-1]
            reach = gap * (len(others) + len(members)) / 2
            if centre - before >= reach:
                break
            blocks.pop()
            centre = (before * len(others) + centre * len(members)) / (len(others) + len(members))
            members = others + members
        blocks.append((centre, members))
    moved = [0.0] * len(values)
    for centre, members in blocks:
        for k, i in enumerate(members):
            moved[i] = centre + gap * (k - (len(members) - 1) / 2)
    return moved


def end_labels(
    fig: go.Figure,
    items: Sequence[tuple[float, str, str]],
    limits: tuple[float, float],
    *,
    x: float = 1.01,
    gap: float = 0.058,
) -> None:
    """Labels (y, text, colour) right of the plot, moved apart to at least `gap` of the height."""
    low, high = limits
    # In paper coordinates: a label pushed beyond the axis would not be drawn in its own.
    places = spread([(y - low) / (high - low) for y, _, _ in items], gap)
    for place, (_, text, color) in zip(places, items, strict=True):
        fig.add_annotation(
            x=x,
            xref="paper",
            xanchor="left",
            yanchor="middle",
            y=place,
            yref="paper",
            text=text,
            showarrow=False,
            font={"color": color, "size": 12},
        )
