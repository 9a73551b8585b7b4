"""What became of each class from the reference stage to the readout: IoU, and confusions.

Both compare two stages on the same tokens. They are counts of a whole test set without intervals:
a rare class moves by a few tokens, so its number of tokens is told beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from interp.report.palette import GREYS, LAYOUT, MUTED, RIGHT, WRONG, axis
from interp.report.plots import figure
from interp.report.tables import Summary, Tables, at_stage, compared
from interp.report.text import Listing, signed_points

MOST = 25  # classes on either side that are drawn when not all are
PAIRS = 15
_LONGEST = 30  # letters of a class's name


def class_changes(tables: Tables, summary: Summary) -> go.Figure:
    """Token IoU of each class at the reference and at the readout, largest gain first."""
    rows = changes(tables, summary)
    (_, reference), (_, readout) = compared(tables, summary)
    shown, headings = _shown(rows)
    at = shown["at"].tolist()
    last = max(at, default=0)
    fig = figure(129 + 19 * last, margin={**LAYOUT["margin"], "t": 56, "r": 96})
    told = shown[["from", "to", "change", "tokens"]].assign(change=100 * shown["change"])
    common: dict[str, Any] = {
        "y": at,
        "customdata": told.to_numpy().tolist(),
        "text": shown["class"].tolist(),
        "hovertemplate": "<b>%{text}</b><br>%{customdata[0]:.1%} → %{customdata[1]:.1%}, "
        "%{customdata[2]:+.1f} points<br>%{customdata[3]:,} tokens<extra></extra>",
    }
    for gains, color in ((True, RIGHT), (False, WRONG)):
        ends = shown[(shown["change"] >= 0) == gains]
        # One trace of broken lines: a bar from the first value to the second, class by class.
        fig.add_trace(
            go.Scatter(
                x=_broken(ends["from"], ends["to"]),
                y=_broken(ends["at"], ends["at"]),
                mode="lines",
                line={"color": color, "width": 2.4},
                hoverinfo="skip",
            )
        )
    hollow = {"color": "white", "size": 8, "line": {"color": GREYS[0], "width": 1.8}}
    filled = {"color": [RIGHT if c >= 0 else WRONG for c in shown["change"]], "size": 9}
    for column, name, marker in (("from", reference, hollow), ("to", readout, filled)):
        fig.add_trace(
            go.Scatter(x=shown[column].tolist(), name=name, mode="markers", marker=marker, **common)
        )
    for y, change in zip(at, shown["change"], strict=True):
        fig.add_annotation(
            x=1.01, xref="paper", xanchor="left", y=y, text=signed_points(change), showarrow=False,
            font={"size": 12, "color": MUTED},
        )  # fmt: skip
    for y, text in headings:
        fig.add_annotation(
            x=0, xref="paper", xanchor="right", xshift=-8, y=y, yanchor="middle", text=text,
            showarrow=False, font={"size": 12, "color": MUTED},
        )  # fmt: skip
    fig.add_annotation(
        x=0, xref="paper", xanchor="left", y=1, yref="paper", yanchor="bottom", yshift=22,
        text=_key(reference, readout, len(rows), len(summary["classes"]), len(shown)),
        showarrow=False, font={"size": 12, "color": MUTED},
    )  # fmt: skip
    most = float(shown[["from", "to"]].max().max()) or 1.0
    fig.update_xaxes(axis("token IoU", tickformat=".0%", range=[-0.015 * most, 1.03 * most]))
    fig.update_yaxes(
        tickvals=at, ticktext=[_short(name) for name in shown["class"]], showgrid=False,
        range=[last + 0.6, -0.9], ticklabelstandoff=8,
    )  # fmt: skip
    return fig


def changes(tables: Tables, summary: Summary) -> pd.DataFrame:
    """class, from, to, change, tokens: of the classes that occur, the largest gain first."""
    (reference, _), (readout, _) = compared(tables, summary)
    token = {**tables, "classes": tables["classes"].query("unit == 'token'")}
    one, two = (at_stage(token, "classes", stage) for stage in (reference, readout))
    both = one[["class", "true", "iou"]].merge(
        two[["class", "iou"]], on="class", suffixes=("_from", "_to")
    )
    both = both.rename(columns={"iou_from": "from", "iou_to": "to", "true": "tokens"})
    both = both.assign(change=both["to"] - both["from"]).dropna(subset="change")
    return both.sort_values("change", ascending=False, kind="stable").reset_index(drop=True)


def _shown(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[int, str]]]:
    """The rows that are drawn, with `at`, the line of each; and headings with their lines."""
    if len(rows) <= 2 * MOST:
        return rows.assign(at=range(len(rows))), []
    headings, parts, line = [], [], 0
    for name, part in (
        ("gains", rows[rows["change"] > 0].head(MOST)),
        ("losses", rows[rows["change"] < 0].tail(MOST)),
    ):
        if len(part):
            headings.append((line, f"<b>{len(part)} largest {name}</b>"))
            parts.append(part.assign(at=range(line + 1, line + 1 + len(part))))
            line += len(part) + 1
    return pd.concat(parts, ignore_index=True) if parts else rows.head(0).assign(at=0), headings


def _key(reference: str, readout: str, occur: int, known: int, shown: int) -> str:
    absent = f"; {known - occur} do not occur" if known > occur else ""
    return f"○ {reference}   ● {readout}   ·   {shown} of {occur} classes that occur{absent}"


def _broken(starts: Sequence[float] | pd.Series, ends: Sequence[float] | pd.Series) -> list[Any]:
    """start, end, nothing, start, end, nothing, ...: separate lines in one trace."""
    return [v for one, two in zip(starts, ends, strict=True) for v in (one, two, None)]


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1].rstrip()}…"


def confusions(tables: Tables, summary: Summary) -> Listing:
    """The most frequent confusions at the reference, and their share at the readout."""
    (reference, before), (readout, after) = compared(tables, summary)
    one, two = (_shares(at_stage(tables, "confusion", stage)) for stage in (reference, readout))
    wrong = one[one["true"] != one["said"]]
    worst = wrong.sort_values("n", ascending=False, kind="stable").head(PAIRS)
    later = worst[["true", "said"]].merge(two, on=["true", "said"], how="left")
    rows = [
        (f"{true} → {said}", f"{n:,}", f"{was:.1%}", f"{becomes:.1%}", signed_points(becomes - was))
        for true, said, n, was, becomes in zip(
            worst["true"], worst["said"], worst["n"], worst["share"],
            later["share"].fillna(0.0), strict=True,
        )
    ]  # fmt: skip
    return Listing(
        (
            "true → said",
            f"tokens, {before}",
            f"share, {before}",
            f"share, {after}",
            "change, points",
        ),
        rows,
    )


def _shares(rows: pd.DataFrame) -> pd.DataFrame:
    """true, said, n, and n as a share of the true class's tokens."""
    share = rows["n"] / rows.groupby("true")["n"].transform("sum")
    return rows[["true", "said", "n"]].assign(share=share)
