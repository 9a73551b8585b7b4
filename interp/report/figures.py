"""What a page consists of, as data: a kind of run has a lead, sections and figures.

A caption here never states a result. Results are in `summary.json`, decided by intervals; a
caption that said "attention carries it" would go on saying so over a run in which it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from interp.report.opening import Line
from interp.report.tables import Summary, Tables
from interp.report.text import Listing


@dataclass(frozen=True)
class Figure:
    """One figure of the page.

    Attributes:
        name: id of its `div`.
        section: key of the section it belongs to.
        title: what is plotted.
        caption: what is seen and which control it must beat.
        needs: tables it is drawn from; without them it is left out and named as not measured.
        draw: makes it.
        wants: a query that must leave rows of the first table, or there is nothing to draw.
        compares: whether it sets the readout against the reference, so that there must be both.
    """

    name: str
    section: str
    title: str
    caption: str
    needs: tuple[str, ...]
    draw: Callable[[Tables, Summary], go.Figure | Listing]
    wants: str = ""
    compares: bool = False

    def ready(self, tables: Tables, summary: Summary) -> bool:
        """Whether its tables are there and hold something to draw."""
        if not all(name in tables and len(tables[name]) for name in self.needs):
            return False
        if self.compares and summary["reference_stage"] == summary["readout_stage"]:
            return False
        return not self.wants or len(tables[self.needs[0]].query(self.wants)) > 0


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, the findings it answers and how it was measured."""

    key: str
    title: str
    findings: tuple[str, ...]
    method: str


@dataclass(frozen=True)
class Kind:
    """A kind of run, as far as its page is another than others'.

    Attributes:
        title: the page's heading.
        lead: what the page is about; `{model}` stands for the model's name.
        facts: a line of numbers under the lead, in parts.
        opening: the section of `lines`, before all others.
        lines: the numbers that the page opens with.
        none: what the opening says when there are no lines.
        sections: the sections in order.
        figures: the figures in order.
        pictures: whether there is a section of scenes with their tokens.
    """

    title: str
    lead: str
    facts: Callable[[Summary], Sequence[str]]
    opening: Section
    lines: Callable[[Summary], list[Line]]
    none: str
    sections: tuple[Section, ...]
    figures: tuple[Figure, ...]
    pictures: bool
