"""The tables a page is drawn from: the contract between a study and its report.

Tables are long: one number a row, with its interval in `estimate`, `low`, `high` and what it is
in the other columns. A study that skips an experiment leaves its table out, and the page says
that this was not measured. A table that is there must be whole: a figure drawn from a table that
lost a column would show something else than its caption says, so this is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from interp.errors import TableError, nearest
from interp.runs import RunFolder

_INTERVAL = ("estimate", "low", "high")

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "stages": ("stage", "label", "order", "kind", "on_path", "metric", *_INTERVAL),
    "references": ("name", "metric", "estimate"),
    "knockout": (
        "condition", "probe_free", "layers", "stage", "order", "n_tokens", "edges_per_query",
        *_INTERVAL,
    ),
    "knockout_effect": ("condition", "layers", *_INTERVAL, "is_control"),
    "heads": ("layer", "head", "source", *_INTERVAL, "share"),
    "head_totals": ("layer", "head", *_INTERVAL, "share", "rank"),
    "components": ("component", *_INTERVAL),
    "head_knockout": ("set", "n_heads", "measure", *_INTERVAL),
    "positions": ("row", "condition", *_INTERVAL),
    "thirds": ("third", "comparison", *_INTERVAL),
    "bidirectional": ("condition", "stage", "order", *_INTERVAL),
    "dose": ("anchors", "order", "condition", "n_tokens", *_INTERVAL),
    "tokens": (
        "name", "image", "token", "row", "col", "label", "adapter", "final", "knockout",
        "bidirectional",
    ),
}  # fmt: skip
"""Every table the page knows, with the columns it must have (more do no harm)."""

SUMMARY_KEYS = ("model", "data", "classes", "colors", "reference_stage", "findings")
FINDING_KEYS = (*_INTERVAL, "control", "holds", "text")

Tables = Mapping[str, pd.DataFrame]
Summary = Mapping[str, Any]


def records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dictionaries."""
    return [{str(key): value for key, value in row.items()} for row in rows.to_dict("records")]


def image_counts(summary: Summary) -> str:
    """How many images the figures are about, in words; "" if the summary does not say.

    >>> image_counts({"n_test_images": 300, "n_probe_images": 600})
    '300 test images (probes fitted on 600 others)'
    """
    n_test = summary.get("n_test_images", summary.get("n_images"))
    if n_test is None:
        return ""
    n_probe = summary.get("n_probe_images")
    others = f" (probes fitted on {n_probe:,} others)" if n_probe else ""
    return f"{n_test:,} test images{others}"


def load_tables(folder: RunFolder) -> dict[str, pd.DataFrame]:
    """The known tables that the run wrote, checked.

    Raises:
        TableError: a table lacks a column; the message names both.
    """
    found = {name: folder.read_table(name) for name in COLUMNS if folder.has_table(name)}
    for name, table in found.items():
        missing = [column for column in COLUMNS[name] if column not in table.columns]
        if missing:
            hint = nearest(missing[0], table.columns)
            raise TableError(
                f"table {name} has no column {', '.join(missing)}; it has "
                f"{', '.join(table.columns)}" + (f" ({hint})" if hint else "")
            )
    return found


def load_summary(folder: RunFolder) -> dict[str, Any]:
    """`summary.json`, checked for the keys the page needs.

    Raises:
        TableError: a key is missing; the message names it by its path.
    """
    summary: dict[str, Any] = folder.read_json("summary.json")
    missing = [key for key in SUMMARY_KEYS if key not in summary]
    missing += [
        f"findings.{name}.{key}"
        for name, finding in summary.get("findings", {}).items()
        for key in FINDING_KEYS
        if key not in finding
    ]
    if missing:
        raise TableError(f"summary.json has no {', '.join(missing)}")
    return summary
