"""The page: opening lines, figures and pictures in one HTML file that opens offline.

plotly.js is written into the file once (it is most of the file's size); there is no link, font
or script to fetch, so the page reads the same on a plane, in ten years, and as an attachment.
It is a pure function of the tables, the summary and the arguments: drawn twice, the bytes are
the same. What differs between kinds of run is in `KINDS`, all else is one template.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from interp.report import palette, pictures
from interp.report.figures import Figure, Kind, Section
from interp.report.opening import Line
from interp.report.probe_page import PROBE
from interp.report.study_page import STUDY
from interp.report.tables import Summary, Tables, load_summary, load_tables
from interp.report.text import DASH, Listing, interval_text
from interp.runs import RunFolder

REPORT = "report.html"
KINDS: Mapping[str, Kind] = {"study": STUDY, "probe": PROBE}
"""The pages there are, by the kind of run in the folder's manifest."""


def write_report(folder: RunFolder) -> Path:
    """Draw `report.html` from the folder's tables and summary; returns its path.

    Raises:
        TableError: a table lacks a column, or the summary a key; or such a run has no page.
        RunNotFound: the folder has no `summary.json`.
    """
    tables, summary = load_tables(folder), load_summary(folder)
    kind = KINDS[folder.manifest["kind"]]
    lines = kind.lines(summary)
    by_name = {line.name: line for line in lines}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html.jinja").render(
        kind=kind,
        summary=summary,
        lead=Markup(kind.lead).format(model=Markup("<b>{}</b>").format(summary["model"])),
        facts=[fact for fact in kind.facts(summary) if fact],
        lines=lines,
        sections=[_section(section, kind, tables, summary, by_name) for section in kind.sections],
        strips=pictures.strips(folder, tables, summary) if kind.pictures else [],
        classes=pictures.shown_classes(tables, summary) if kind.pictures else [],
        intervals=_intervals(summary),
        manifest=_manifest(folder),
        files=[
            (name, folder.manifest_files[name]["bytes"], folder.manifest_files[name]["sha256"])
            for name in folder.files
            if name != REPORT
        ],
        palette=palette,
        plotly=Markup(get_plotlyjs()),
        safe=Markup,
    )
    return folder.write_text(REPORT, html)


def _section(
    section: Section, kind: Kind, tables: Tables, summary: Summary, lines: Mapping[str, Line]
) -> dict[str, Any]:
    mine = [figure for figure in kind.figures if figure.section == section.key]
    ready = [figure for figure in mine if figure.ready(tables, summary)]
    return {
        "key": section.key,
        "title": section.title,
        "method": section.method,
        "findings": [lines[name] for name in section.findings if name in lines],
        "figures": [_drawn(figure, tables, summary) for figure in ready],
        "missing": [figure.title for figure in mine if figure not in ready],
    }


def _drawn(figure: Figure, tables: Tables, summary: Summary) -> dict[str, Any]:
    drawn = figure.draw(tables, summary)
    if isinstance(drawn, Listing):
        return {"figure": figure, "listing": drawn}
    return {"figure": figure, "listing": None, **_plot(drawn)}


def _plot(drawn: go.Figure) -> dict[str, Any]:
    # Safe inside a script element: plotly's to_json writes "<", ">" and "/" as escapes.
    return {"json": Markup(drawn.to_json()), "height": drawn.layout.height}


def _intervals(summary: Summary) -> list[tuple[str, str]]:
    """Every further interval of the summary, by key."""
    return [
        (key, interval_text(value, ""))
        for key, value in summary.get("figures", {}).items()
        if isinstance(value, Mapping) and {"estimate", "low", "high"} <= set(value)
    ]


def _manifest(folder: RunFolder) -> list[tuple[str, str]]:
    """What ran, flattened; without times, so that the same run draws the same page."""
    rows: list[tuple[str, str]] = []

    def walk(key: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                walk(f"{key}.{name}" if key else name, inner)
        else:
            rows.append((key, DASH if value is None else str(value)))

    times = ("started", "duration_seconds", "files")
    walk("", {k: v for k, v in folder.manifest.items() if k not in times})
    return rows
