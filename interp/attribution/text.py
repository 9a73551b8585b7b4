"""A table of heads in words, for a terminal and for a notebook.

The reader's questions in their order: what was estimated, on how much, which heads, how sure, and
was it checked? A number without its interval says why it has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from interp.report.tables import records
from interp.report.text import MINUS

WIDTH = 100


def decimals(values: pd.Series) -> int:
    """Digits behind the point that give the largest of some values three digits in all.

    >>> decimals(pd.Series([0.0123, -0.004]))
    4
    """
    most = float(values.abs().max()) if len(values) else 0.0
    if not math.isfinite(most) or most == 0:
        return 3
    return min(max(2 - math.floor(math.log10(most)), 0), 12)


def interval(row: Mapping[str, Any], digits: int) -> str:
    """`+0.412 [+0.380, +0.450]`, or the estimate alone where there is no interval."""
    estimate, low, high = (signed(row[key], digits) for key in ("estimate", "low", "high"))
    return estimate if math.isnan(row["low"]) else f"{estimate} [{low}, {high}]"


def signed(value: float, digits: int) -> str:
    """A number with its sign, a real minus."""
    return f"{value:+.{digits}f}".replace("-", MINUS)


def percent(share: float) -> str:
    """A share of something in per cent, a dash where there is none."""
    return "\N{EN DASH}" if math.isnan(share) else f"{share:.0%}".replace("-", MINUS)


def head_name(layer: int, head: int) -> str:
    """`layer.head`, the way heads are called in every table and figure here."""
    return f"{layer}.{head}"


def question(about: Mapping[str, Any]) -> str:
    """What was estimated: method, target and where it starts and ends, as far as they are noted."""
    target = str(about.get("target", "unnamed target"))
    parts = [f"{about.get('method', 'unnamed method')}: {target}"]
    if about.get("start"):
        parts.append(f"from {about['start']}")
    if about.get("end") and str(about["end"]) not in target:
        parts.append(f"to {about['end']}")
    return ", ".join(parts)


def verification(about: Mapping[str, Any]) -> str:
    """One sentence on what was checked exactly; "" if nothing was.

    >>> verification({"verification": {"n_units": 160, "n_verified": 8, "spearman": 0.93}})
    'Verified exactly: 8 of 160 units; Spearman 0.93.'
    """
    told = about.get("verification")
    if not told:
        return ""
    parts = [f"{told['n_verified']} of {told['n_units']} units"]
    if told.get("n_sampled"):
        parts[0] += f" (and {told['n_sampled']} drawn at random)"
    if told.get("spearman") is not None:
        parts.append(f"Spearman {told['spearman']:.2f}")
    if told.get("missed_at_most") is not None:
        size = f" of {told['threshold']:.3g} or more" if told.get("threshold") is not None else ""
        sure = f" ({told['confidence']:.0%} sure)" if told.get("confidence") is not None else ""
        parts.append(f"at most {told['missed_at_most']} others have an effect{size}{sure}")
    if told.get("recall") is not None:
        top = f"top {told['k']}" if told.get("k") else "top"
        parts.append(f"estimated recall of the exact {top} {told['recall']:.2f}")
    return f"Verified exactly: {'; '.join(parts)}."


def rendering(
    heading: list[str], top: pd.DataFrame, total: Mapping[str, Any], notes: list[str]
) -> Group:
    """Heading, the top heads, the sum of all, and notes, for rich.

    Args:
        heading: lines above; the first is bold.
        top: columns layer, head, estimate, low, high, share and, where known, mostly and verified.
        total: name, estimate, low and high of the sum over all heads.
        notes: lines below.
    """
    first, *more = heading
    lines = [Text(first, style="bold"), *map(Text, more)]
    return Group(*lines, *([_table(top, total)] if len(top) else []), *map(Text, notes))


def html(heading: list[str], top: pd.DataFrame, total: Mapping[str, Any], notes: list[str]) -> str:
    """The same for a notebook."""
    rows = [_cells(row, top, total) for row in (*records(top), total)] if len(top) else []
    table = pd.DataFrame(rows, columns=_columns(top)).to_html(index=False) if rows else "<br>"
    above = "<br>".join([f"<b>{escape(heading[0])}</b>", *map(escape, heading[1:])])
    return f"<div>{above}{table}<small>{'<br>'.join(map(escape, notes))}</small></div>"


def _table(top: pd.DataFrame, total: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    for name, below in zip(_columns(top), _cells(total, top, total), strict=True):
        align: Any = "right" if name == "share" else "left"
        table.add_column(name, Text(below), justify=align, no_wrap=name != "mostly from")
    for row in records(top):
        table.add_row(*map(Text, _cells(row, top, total)))  # not as markup: names hold brackets
    return table


def _columns(top: pd.DataFrame) -> list[str]:
    more = {"mostly": "mostly from", "verified": "verified"}
    return ["head", "estimate", "share", *(told for name, told in more.items() if name in top)]


def _cells(row: Mapping[str, Any], top: pd.DataFrame, total: Mapping[str, Any]) -> list[str]:
    """One line of the table; `total` is the line of the sum, and gives the digits."""
    digits = decimals(pd.concat([top["estimate"], pd.Series([float(total["estimate"])])]))
    name = row["name"] if row is total else head_name(row["layer"], row["head"])
    cells = [name, interval(row, digits)]
    if row is total:
        return cells + [""] * (len(_columns(top)) - 2)
    cells += [percent(row["share"]), *([row["mostly"]] if "mostly" in row else [])]
    if "verified" in row:
        cells.append({1.0: "yes", 0.0: "no"}.get(row["verified"], percent(row["verified"])))
    return cells
