"""What stands beside a curve over stages: floor and ceiling, and notes on single stages."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from interp.report.palette import INK, MUTED
from interp.report.tables import Tables

_REFERENCES = {"majority_floor": "floor (one class)", "token_ceiling": "ceiling"}


def _references(tables: Tables, metric: str) -> list[tuple[str, float]]:
    if "references" not in tables:
        return []
    rows = tables["references"].query("metric == @metric")
    return [
        (_REFERENCES.get(name, name.replace("_", " ")), float(value))
        for name, value in zip(rows["name"], rows["estimate"], strict=True)
    ]


def reference_lines(
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


def edge_notes(
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


def mark(
    fig: go.Figure, rows: pd.DataFrame, limits: tuple[float, float], text: str, shift: int
) -> None:
    """A thin line up from the axis to a stage, with its meaning, `shift` pixels up."""
    for _, at in rows.iterrows():
        top = at["estimate"] if pd.isna(at["low"]) else at["low"]
        fig.add_shape(
            type="line", x0=at["order"], x1=at["order"], y0=limits[0], y1=top,
            line={"color": INK, "width": 1, "dash": "dot"},
        )  # fmt: skip
        fig.add_annotation(
            x=at["order"], y=limits[0], text=text, showarrow=False, xanchor="left", xshift=5,
            yanchor="bottom", yshift=shift, font={"size": 12, "color": INK},
        )  # fmt: skip
