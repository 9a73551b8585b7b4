"""The page: findings, figures and pictures in one HTML file that opens offline.

plotly.js is written into the file once (it is most of the file's size); there is no link, font
or script to fetch, so the page reads the same on a plane, in ten years, and as an attachment.
It is a pure function of the tables, the summary and the arguments: drawn twice, the bytes are
the same.
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
from interp.report.figures import FIGURES, SECTIONS, Section
from interp.report.tables import Summary, Tables, image_counts, load_summary, load_tables
from interp.report.text import DASH, interval_text, ordered, title_of, typeset, unit_of, verdict
from interp.runs import RunFolder

REPORT = "report.html"


def write_report(folder: RunFolder) -> Path:
    """Draw `report.html` from the folder's tables and summary; returns its path.

    Raises:
        TableError: a table lacks a column, or the summary a key.
        RunNotFound: the folder has no `summary.json`.
    """
    tables, summary = load_tables(folder), load_summary(folder)
    findings = [_finding(name, summary) for name in ordered(summary["findings"])]
    by_name = {finding["name"]: finding for finding in findings}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html.jinja").render(
        summary=summary,
        counts=image_counts(summary),
        findings=findings,
        sections=[_section(section, tables, summary, by_name) for section in SECTIONS],
        strips=pictures.strips(folder, tables, summary),
        classes=pictures.shown_classes(tables, summary),
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
    section: Section, tables: Tables, summary: Summary, findings: Mapping[str, Any]
) -> dict[str, Any]:
    mine = [figure for figure in FIGURES if figure.section == section.key]
    ready = [figure for figure in mine if figure.ready(tables)]
    return {
        "key": section.key,
        "title": section.title,
        "method": section.method,
        "findings": [findings[name] for name in section.findings if name in findings],
        "figures": [{"figure": figure, **_plot(figure.draw(tables, summary))} for figure in ready],
        "missing": [figure.title for figure in mine if figure not in ready],
    }


def _plot(drawn: go.Figure) -> dict[str, Any]:
    # Safe inside a script element: plotly's to_json writes "<", ">" and "/" as escapes.
    return {"json": Markup(drawn.to_json()), "height": drawn.layout.height}


def _finding(name: str, summary: Summary) -> dict[str, Any]:
    finding = summary["findings"][name]
    unit, control = unit_of(name, finding), finding["control"]
    return {
        "name": name,
        "title": title_of(name, finding),
        "text": typeset(finding["text"]),
        "estimate": interval_text(finding, unit),
        "control": interval_text(control, unit) if control else "",
        "control_name": (control or {}).get("name", "control"),
        "holds": finding["holds"],
        "verdict": verdict(finding),
        "forest": "" if finding["estimate"] is None else Markup(_forest(finding, control)),
    }


def _forest(finding: Mapping[str, float], control: Mapping[str, float] | None) -> str:
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
    return f'<svg class="forest" viewBox="0 0 {width:g} 38" aria-hidden="true">{drawn}</svg>'


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
