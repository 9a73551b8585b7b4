"""The lines that a page opens with: a number, its interval, and a word that the interval decides.

A study opens with its findings, each against its control: it holds, or it does not. A probe run has
no control for a cause, so it opens with changes from one stage to another: they rise, they fall, or
the interval cannot tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from interp.report import palette
from interp.report.tables import Summary
from interp.report.text import interval_text, ordered, title_of, typeset, unit_of, verdict

Interval = Mapping[str, float]

CHANGES = {
    "drop_off": ("Drop-off", "From the adapter's input to its output"),
    "recovery": ("Recovery", "From the adapter's output to the last stage"),
}
METRICS = {"accuracy": "token accuracy", "miou": "token mIoU"}


@dataclass(frozen=True)
class Line:
    """One line: what is said of what, its number in words and drawn, and the word on its tag.

    Attributes:
        name: its key in the summary.
        title, text: what it is, and a sentence on it.
        estimate: with interval and unit.
        control, control_name: the control's, or "".
        tag: the word that the interval decides.
        css: how the tag looks: "yes", "no" or "open".
        forest: a drawing of the intervals, or "".
    """

    name: str
    title: str
    text: str
    estimate: str
    control: str
    control_name: str
    tag: str
    css: str
    forest: str


def findings(summary: Summary) -> list[Line]:
    """The findings of a study, in the page's order."""
    return [_finding(name, summary) for name in ordered(summary["findings"])]


def _finding(name: str, summary: Summary) -> Line:
    finding = summary["findings"][name]
    unit, control = unit_of(name, finding), finding["control"]
    return Line(
        name=name,
        title=title_of(name, finding),
        text=typeset(finding["text"]),
        estimate=interval_text(finding, unit),
        control=interval_text(control, unit) if control else "",
        control_name=(control or {}).get("name", "control"),
        tag=verdict(finding),
        css="yes" if finding["holds"] else "no",
        forest="" if finding["estimate"] is None else _forest(finding, control),
    )


def changes(summary: Summary) -> list[Line]:
    """The changes of a probe run from stage to stage, those that were measured."""
    return [
        _change(f"{key}_{metric}", f"{title}, {measure}", text, summary)
        for key, (title, text) in CHANGES.items()
        for metric, measure in METRICS.items()
        if f"{key}_{metric}" in summary["figures"]
    ]


def _change(name: str, title: str, text: str, summary: Summary) -> Line:
    change = summary["figures"][name]
    rises, falls = change["low"] > 0, change["high"] < 0
    return Line(
        name=name,
        title=title,
        text=f"{text}, on the same tokens.",
        estimate=interval_text(change, "points"),
        control="",
        control_name="",
        tag="rises" if rises else "falls" if falls else "cannot be told",
        css="yes" if rises else "no" if falls else "open",
        forest=_forest(change, None),
    )


def _forest(finding: Interval, control: Interval | None) -> str:
    """A small drawing of the two intervals against zero."""
    width, pad = 180.0, 8.0
    rows = [(finding, 12, palette.RIGHT)] + ([(control, 27, palette.GREYS[0])] if control else [])
    low = min([0.0] + [interval["low"] for interval, _, _ in rows])
    high = max([0.0] + [interval["high"] for interval, _, _ in rows])
    scale = (width - 2 * pad) / ((high - low) or 1.0)

    def x(value: float) -> str:
        return f"{pad + (value - low) * scale:.1f}"

    drawn = f'<path d="M{x(0)} 1v36" stroke="#aab3bb" stroke-dasharray="2 2"/>'
    for interval, y, color in rows:
        drawn += (
            f'<path d="M{x(interval["low"])} {y}H{x(interval["high"])}" stroke="{color}" '
            f'stroke-width="2.5" stroke-linecap="round"/>'
            f'<circle cx="{x(interval["estimate"])}" cy="{y}" r="4" fill="{color}"/>'
        )
    svg = f'<svg class="forest" viewBox="0 0 {width:g} 38" aria-hidden="true">{drawn}</svg>'
    return Markup(svg)
