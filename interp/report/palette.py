"""Colours by role, one for the whole page, and the look that all figures share.

A reader learns a colour once: blue is the model as it is (and a token that is right), orange is
an intervention's damage (and a token that is wrong), purple is bidirectional attention, grey is a
control. Blue and orange after Okabe and Ito (2008): they differ in lightness as well as in hue
and stay apart under every common colour blindness.

>>> style("clean").color == RIGHT, style("correct -> wrong").color == WRONG
(True, True)
>>> style("other regions").color in GREYS
True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RIGHT = "#0b6fb3"
WRONG = "#e8890c"
PURPLE = "#7a4fa3"
LILAC = "#b08fd0"
TEAL = "#2f8f83"
GREYS = ("#6f7a85", "#8c96a0", "#a3acb5", "#5b6670", "#97a1ab", "#7d8892")
INK = "#1d2730"
MUTED = "#65717c"
RULE = "#e4e8ec"
GROUND = "#dfe4e8"

SOURCES = {
    "same-region correct": RIGHT,
    "same-region wrong": WRONG,
    "other regions": "#8c96a0",
    "text and BOS": "#c9cfd5",
    "self": TEAL,
}
"""Colours of the sources a head reads from."""

DIVERGING = [[0.0, WRONG], [0.5, "#ffffff"], [1.0, RIGHT]]
BLUES = [[0.0, "#ffffff"], [1.0, RIGHT]]
ORANGES = [[0.0, "#ffffff"], [1.0, WRONG]]

FONT = 'Inter, "Helvetica Neue", "Segoe UI", Roboto, Arial, sans-serif'


@dataclass(frozen=True)
class Style:
    """How a condition is drawn."""

    color: str
    dash: str = "solid"
    symbol: str = "circle"
    width: float = 2.4


_KNOWN = {
    "clean": Style(RIGHT),
    "causal": Style(RIGHT),
    "correct->wrong": Style(WRONG),
    "marked->unmarked": Style(WRONG),
    "bidirectional": Style(PURPLE),
    "bidirectional, refitted probes": Style(PURPLE),
    "bidirectional, frozen probes": Style(LILAC, dash="dash"),
    "refitted - causal": Style(PURPLE),
    "frozen - causal": Style(LILAC),
    "adapter": Style(GREYS[0], dash="dot", symbol="diamond"),
}
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down")


def style(condition: str, number: int = 0) -> Style:
    """The style of a condition; what is not known is a control, the `number`-th of its figure."""
    key = condition.replace(" -> ", "->").replace(" → ", "->")
    known = _KNOWN.get(key) or _KNOWN.get(key.split(" (")[0])
    if known:
        return known
    i = number % len(GREYS)
    return Style(GREYS[i], _DASHES[i], _SYMBOLS[i], width=1.6)


def faded(color: str, alpha: float) -> str:
    """`rgba(...)` of a hex colour.

    >>> faded("#0b6fb3", 0.5)
    'rgba(11,111,179,0.5)'
    """
    r, g, b = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha})"


_AXIS: dict[str, Any] = {
    "showgrid": True,
    "gridcolor": RULE,
    "zeroline": False,
    "linecolor": "#b9c1c9",
    "ticks": "",
    "automargin": True,
    "title": {"standoff": 12, "font": {"size": 13, "color": MUTED}},
}

LAYOUT: dict[str, Any] = {
    "template": "none",
    "font": {"family": FONT, "size": 13, "color": INK},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "margin": {"l": 62, "r": 24, "t": 30, "b": 60},
    "hoverlabel": {"bgcolor": "white", "bordercolor": "#b9c1c9", "font": {"family": FONT}},
    "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
    "showlegend": False,
    "dragmode": False,
    "bargap": 0.35,
}
"""What every figure's layout begins with."""


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    """An axis in the page's look."""
    return {**_AXIS, "title": {**_AXIS["title"], "text": title}, **more}
