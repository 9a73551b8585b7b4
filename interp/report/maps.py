"""Heatmaps of a probe run: accuracy by place in the picture, and held-out error by penalty."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from interp.report.palette import BLUES, DIVERGING, GROUND, INK, LAYOUT, MUTED, ORANGES, axis
from interp.report.plots import figure
from interp.report.stages import stage_axis
from interp.report.tables import Summary, Tables, at_stage, compared, join_stages
from interp.report.text import MINUS

WORST = 0.25  # error above the least one, from which on all cells have one colour
_WIDTH = 232  # pixels of one of three maps side by side
_BAR: dict[str, Any] = {"thickness": 10, "outlinewidth": 0, "ticks": ""}


def position_map(tables: Tables, summary: Summary) -> go.Figure:
    """Accuracy by row and column at the reference, at the readout, and the difference."""
    (reference, before), (readout, after) = compared(tables, summary)
    one, two = (
        at_stage(tables, "map", stage).pivot(index="row", columns="col", values="accuracy")
        for stage in (reference, readout)
    )
    one, two = one.align(two)
    n_rows, n_cols = one.shape
    height = min(max(_WIDTH * n_rows / n_cols, 150), 420)
    low = float(min(one.min().min(), two.min().min()))
    high = float(max(one.max().max(), two.max().max()))
    change = two - one
    most = float(change.abs().max().max()) or 0.01
    fig = make_subplots(1, 3, horizontal_spacing=0.1)
    margin = {**LAYOUT["margin"], "l": 34, "r": 70, "t": 34, "b": 30}
    fig.update_layout({**LAYOUT, "height": round(height) + 64, "margin": margin})
    fig.update_layout(plot_bgcolor=GROUND)  # of places where no token lies
    between = (fig.layout.xaxis2.domain[1] + 0.012, fig.layout.xaxis3.domain[1] + 0.012)
    fig.update_layout(
        coloraxis={"colorscale": BLUES, "cmin": low, "cmax": high,
                   "colorbar": {**_BAR, "x": between[0], "tickformat": ".0%"}},
        coloraxis2={"colorscale": DIVERGING, "cmin": -100 * most, "cmax": 100 * most,
                    "colorbar": {**_BAR, "x": between[1], "tickformat": "+.0f"}},
    )  # fmt: skip
    places = "row %{y}, column %{x}<br>"
    for col, (title, grid, colors, value) in enumerate(
        (
            (before, one, "coloraxis", "%{z:.1%}"),
            (after, two, "coloraxis", "%{z:.1%}"),
            (f"{after} {MINUS} {before}, points", 100 * change, "coloraxis2", "%{z:+.1f} points"),
        ),
        1,
    ):
        fig.add_trace(
            go.Heatmap(
                z=_numbers(grid),
                # Counted from the first place that a token lies at: on a coarse grid most of the
                # map's places have none.
                x=list(range(grid.shape[1])),
                y=list(range(grid.shape[0])),
                coloraxis=colors,
                xgap=1,
                ygap=1,
                hovertemplate=f"<b>{title}</b><br>{places}{value}<extra></extra>",
            ),
            row=1,
            col=col,
        )
        fig.update_xaxes(axis(showgrid=False, linewidth=0, dtick=_every(n_cols)), row=1, col=col)
        fig.update_yaxes(
            axis(showgrid=False, linewidth=0, autorange="reversed", dtick=_every(n_rows)),
            row=1, col=col,
        )  # fmt: skip
        number = col if col > 1 else ""
        fig.add_annotation(
            x=0, xref=f"x{number} domain", xanchor="left", y=1.01, yref=f"y{number} domain",
            yanchor="bottom", text=title, showarrow=False, font={"size": 12, "color": MUTED},
        )  # fmt: skip
    return fig


def _every(n: int) -> int:
    """How far ticks are apart on an axis of `n` cells."""
    return 1 if n <= 6 else 2 if n <= 12 else 5


def _numbers(grid: pd.DataFrame) -> list[list[float | None]]:
    """Rows of numbers, None (an empty cell) where there is none."""
    return [[None if math.isnan(v) else v for v in row] for row in grid.to_numpy().tolist()]


def penalties(tables: Tables, summary: Summary) -> go.Figure:
    """Held-out error of each stage by penalty, above the stage's least; a dot where it is least."""
    rows = join_stages(tables["penalties"], tables)
    error = rows.pivot(index="alpha", columns="order", values="error")
    excess = error / error.min() - 1
    labels = rows.drop_duplicates("order").set_index("order")["label"]
    names = [_power(alpha) for alpha in error.index]
    told = np.dstack([error.to_numpy(), np.broadcast_to(labels[error.columns], error.shape)])
    fig = figure(150 + 26 * len(error), margin={**LAYOUT["margin"], "b": 96})
    fig.add_trace(
        go.Heatmap(
            z=_numbers(excess),
            x=error.columns.tolist(),
            y=list(range(len(error))),
            zmin=0.0,
            zmax=min(float(np.nanmax(excess.to_numpy())) or 0.01, WORST),
            colorscale=ORANGES,
            xgap=1,
            ygap=1,
            customdata=told.tolist(),
            hovertemplate="<b>%{customdata[1]}</b><br>error %{customdata[0]:.4f}, "
            "%{z:.1%} above the least<extra></extra>",
            colorbar={**_BAR, "tickformat": ".0%"},
        )
    )
    # The first of equals, as the solver chooses.
    best = rows.loc[rows.groupby("order")["error"].idxmin()].sort_values("order")
    fig.add_trace(
        go.Scatter(
            x=best["order"].tolist(),
            y=[error.index.get_loc(alpha) for alpha in best["alpha"]],
            mode="markers",
            name="chosen",
            marker={"color": INK, "size": 7 if len(best) <= 40 else 5},
            text=best["label"].tolist(),
            customdata=best["error"].tolist(),
            hovertemplate="<b>%{text}</b><br>chosen, error %{customdata:.4f}<extra></extra>",
        )
    )
    stage_axis(fig, rows)
    fig.update_xaxes(linewidth=0)
    fig.update_yaxes(
        title_text="penalty, share of the tokens", tickvals=list(range(len(error))),
        ticktext=names, showgrid=False, linewidth=0, range=[-0.5, len(error) - 0.5],
    )  # fmt: skip
    return fig


def _power(alpha: float) -> str:
    """A penalty as a tick: a power of ten as such.

    >>> _power(1e-4), _power(1.0), _power(0.003)
    ('10<sup>−4</sup>', '1', '0.003')
    """
    exponent = round(math.log10(alpha))
    if alpha >= 0.1 or not math.isclose(alpha, 10.0**exponent):
        return f"{alpha:g}"
    return f"10<sup>{MINUS}{-exponent}</sup>"
