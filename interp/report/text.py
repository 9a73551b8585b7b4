"""Numbers in words: an interval with its unit, a verdict, and the table a terminal shows.

Shares of tokens that are *compared* (accuracy after minus before) are told in points, hundredths
of one: 0.644 - 0.658 is "-1.4 points", since "-1.4 %" could also mean 1.4 % of 0.658. A share
of something (of the recovery that is gone) is told in per cent. The unit is in the finding's
"unit" ("points", "share", or any other word for a plain number).

>>> interval_text({"estimate": -0.014, "low": -0.02, "high": -0.008}, "points")
'−1.4 [−2.0, −0.8] points'
>>> interval_text({"estimate": 0.584, "low": 0.51, "high": 0.66}, "share")
'58% [51, 66]'
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from interp.report.tables import image_counts

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"

FINDINGS: Mapping[str, tuple[str, str]] = {
    "drop_off": ("Drop-off at the adapter", "points"),
    "recovery": ("Recovery in the language model", "points"),
    "knockout": ("Correct neighbours cause it", "share"),
    "heads": ("A few heads carry it", "share"),
    "bidirectional": ("Causal attention starves early tokens", "points"),
}
"""Title and unit of each finding, for a summary that names none; also their order."""


def ordered(findings: Mapping[str, Any]) -> list[str]:
    """Names of the findings: the known ones in the page's order, then any others."""
    return [n for n in FINDINGS if n in findings] + [n for n in findings if n not in FINDINGS]


def title_of(name: str, finding: Mapping[str, Any]) -> str:
    """A finding's title."""
    return str(finding.get("title") or FINDINGS.get(name, (name.replace("_", " "),))[0])


def unit_of(name: str, finding: Mapping[str, Any]) -> str:
    """A finding's unit: "points", "share" or another word."""
    return str(finding.get("unit") or FINDINGS.get(name, ("", ""))[1])


def interval_text(interval: Mapping[str, float] | None, unit: str) -> str:
    """An estimate with its interval and unit; a dash where there is none."""
    if interval is None or interval["estimate"] is None:
        return DASH
    values = [interval[key] for key in ("estimate", "low", "high")]
    if unit == "points":
        middle, low, high = (f"{100 * v:+.1f}" for v in values)
        text = f"{middle} [{low}, {high}] points"
    elif unit == "share":
        middle, low, high = (f"{100 * v:.0f}" for v in values)
        text = f"{middle}% [{low}, {high}]"
    else:
        middle, low, high = (f"{v:.3g}" for v in values)
        text = f"{middle} [{low}, {high}] {unit}".rstrip()
    return text.replace("-", MINUS)


def signed_points(change: float) -> str:
    """A difference of shares in points.

    >>> signed_points(0.0213), signed_points(-0.5), signed_points(0.0)
    ('+2.1', '−50.0', '0.0')
    """
    text = f"{100 * change:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


@dataclass(frozen=True)
class Listing:
    """A table of words and numbers on the page; all columns but the first are numbers."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def typeset(text: str) -> str:
    """A sentence with real minus signs before its numbers.

    >>> typeset("changes by -1.4 [-2.0, -0.8]; layers 0-1")
    'changes by −1.4 [−2.0, −0.8]; layers 0-1'
    """
    return re.sub(r"(?<![\w.])-(?=\d)", MINUS, text)


def verdict(finding: Mapping[str, Any]) -> str:
    """ "holds" or "does not hold"."""
    return "holds" if finding["holds"] else "does not hold"


def markdown_table(summary: Mapping[str, Any]) -> str:
    """The same table in Markdown, as the README holds it."""
    lines = ["| finding | estimate | control | holds |", "|---|---|---|---|"]
    for name in ordered(summary["findings"]):
        finding = summary["findings"][name]
        unit, control = unit_of(name, finding), finding["control"]
        against = f"{interval_text(control, unit)} ({control['name']})" if control else DASH
        holds = "yes" if finding["holds"] else "no"
        cells = (title_of(name, finding), interval_text(finding, unit), against, holds)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def findings_table(summary: Mapping[str, Any]) -> Table:
    """The findings of a study for a terminal: `rich.print(findings_table(summary))`.

    Fits 100 columns; an interval is never broken over lines.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        title=", ".join(
            filter(None, [f"{summary['model']} on {summary['data']}", image_counts(summary)])
        ),
        title_justify="left",
        title_style="bold",
        caption="Intervals: 95%, paired bootstrap over images.",
        caption_justify="left",
        pad_edge=False,
    )
    table.add_column("finding", ratio=1, min_width=14)
    table.add_column("estimate", no_wrap=True)
    table.add_column("control", no_wrap=True)
    table.add_column("holds", no_wrap=True, min_width=5)
    for name in ordered(summary["findings"]):
        finding = summary["findings"][name]
        unit = unit_of(name, finding)
        holds = finding["holds"]
        table.add_row(
            title_of(name, finding),
            interval_text(finding, unit),
            interval_text(finding["control"], unit),
            Text("yes", style="bold green") if holds else Text("no", style="bold red"),
        )
    return table
