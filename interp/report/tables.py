"""The tables a page is drawn from: the contract between a run and its report.

Tables are long: one number a row, with its interval in `estimate`, `low`, `high` (nan where there
is none) and what it is in the other columns. A run that skips an experiment leaves its table out,
and the page says that this was not measured. A table that is there must be whole: a figure drawn
from a table that lost a column would show something else than its caption says, so this is an
error.

Stages are told about once, in the table `stages`: what each is called, where it lies and whether
the adapter reads it. Other tables name a stage, and `join_stages` looks it up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from interp.errors import TableError, nearest
from interp.runs import RunFolder

_INTERVAL = ("estimate", "low", "high")
_ABOUT = ("stage", "label", "order", "kind", "on_path")

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "stages": (*_ABOUT, "metric", *_INTERVAL),
    "groups": ("stage", "group", "metric", "order", *_INTERVAL),
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
    "classes": ("stage", "unit", "class", "true", "iou"),
    "map": ("stage", "row", "col", "accuracy"),
    "confusion": ("stage", "true", "said", "n"),
    "penalties": ("stage", "alpha", "error"),
}  # fmt: skip
"""Every table the page knows, with the columns it must have (more do no harm)."""

SUMMARY_KEYS = {
    "study": ("model", "data", "classes", "colors", "reference_stage", "findings"),
    "probe": (
        "model", "data", "classes", "colors", "reference_stage", "readout_stage", "findings",
        "figures", "solver", "n_probe_images", "n_probe_tokens", "n_test_images", "n_test_tokens",
    ),
}  # fmt: skip
"""What `summary.json` must have, by kind of run."""

FINDING_KEYS = (*_INTERVAL, "control", "holds", "text")

ROOMS = {"vision": "vision encoder", "adapter": "adapter", "llm": "language model"}
"""Kinds of stage that are the model itself, with the part of it that they lie in."""

CONTROLS = {"shuffled_labels": "shuffled labels", "random_features": "random features"}
"""Kinds of stage that are no part of the model: what a probe makes of nothing."""

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


def join_stages(rows: pd.DataFrame, tables: Tables) -> pd.DataFrame:
    """The rows with `label`, `order`, `kind` and `on_path` of their stages, in the rows' order.

    Raises:
        TableError: a stage that the table `stages` does not have.
    """
    stages = tables["stages"]
    # A study's curves of other models (weights shuffled) bear the names of the model's own stages.
    own = stages[stages["kind"].isin([*ROOMS, *CONTROLS])]
    about = own[list(_ABOUT)].drop_duplicates("stage")
    if unknown := sorted(set(rows["stage"]) - set(about["stage"])):
        hint = nearest(unknown[0], about["stage"])
        raise TableError(
            f"table stages has no stage {unknown[0]!r}, another has; {hint}".rstrip("; ")
        )
    return rows.drop(columns=[c for c in _ABOUT[1:] if c in rows]).merge(about, on="stage")


def compared(tables: Tables, summary: Summary) -> tuple[tuple[str, str], tuple[str, str]]:
    """(stage, label) of the reference and of the readout."""
    names = [summary["reference_stage"], summary["readout_stage"]]
    labels = join_stages(pd.DataFrame({"stage": names}), tables)["label"]
    reference, readout = zip(names, labels, strict=True)
    return reference, readout


def at_stage(tables: Tables, name: str, stage: str) -> pd.DataFrame:
    """The rows of table `name` that are about `stage`.

    Raises:
        TableError: there are none.
    """
    rows = tables[name][tables[name]["stage"] == stage]
    if not len(rows):
        hint = nearest(stage, tables[name]["stage"].unique())
        raise TableError(f"table {name} has no rows of stage {stage!r}; {hint}".rstrip("; "))
    return rows


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
    """`summary.json`, checked for the keys that the page of such a run needs.

    Raises:
        TableError: a key is missing; the message names it by its path. Or a run without a page.
    """
    kind = folder.manifest["kind"]
    if kind not in SUMMARY_KEYS:
        raise TableError(f"a run of kind {kind!r} has no page; {', '.join(SUMMARY_KEYS)} have one")
    summary: dict[str, Any] = folder.read_json("summary.json")
    missing = [key for key in SUMMARY_KEYS[kind] if key not in summary]
    missing += [
        f"findings.{name}.{key}"
        for name, finding in summary.get("findings", {}).items()
        for key in FINDING_KEYS
        if key not in finding
    ]
    if missing:
        raise TableError(f"summary.json has no {', '.join(missing)}")
    return summary
