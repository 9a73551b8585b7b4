"""The benchmark's numbers as Markdown, as JSON, and in a page of the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from measure import Timing
from peers import PEERS
from settings import Setting

MIB = 2**20
GOAL_MEMORY = 1.10  # (peak - peak of a plain run) / bytes kept
BEGIN, END = "<!-- overhead: begin -->", "<!-- overhead: end -->"
TITLES = {
    "interp": "interp",
    "sdpa": "transformers, sdpa",
    "eager": "transformers, eager",
    "nnsight": "nnsight",
    "bridge": "TransformerBridge",
}

Cell = tuple[str, str]  # (title of the setting, peer)


@dataclass(frozen=True)
class Memory:
    """Bytes kept by a call, bytes of memory that they keep alive, and the call's peak."""

    kept: int
    held: int
    peak: int


@dataclass
class Report:
    """Everything that was measured.

    Attributes:
        settings: the rows.
        times: by setting and peer.
        plain_seconds: what the reference, plain transformers with SDPA, took.
        reasons: why a peer has no number, by setting and peer.
        memory: of the calls that keep something.
        plain_peak: peak of plain transformers with SDPA, in bytes.
        difference: largest difference between two peers' logits in any setting.
        about: machine, versions, sizes.
    """

    settings: Sequence[Setting]
    times: dict[Cell, Timing]
    plain_seconds: list[float]
    reasons: dict[Cell, str]
    memory: dict[Cell, Memory]
    plain_peak: int
    difference: float
    about: dict[str, Any]

    def extra(self, cell: Cell) -> float:
        """Peak memory beyond a plain run's, as a multiple of what the call keeps."""
        memory = self.memory[cell]
        return (memory.peak - self.plain_peak) / memory.kept

    def markdown(self) -> str:
        """Both tables with their footnotes."""
        notes: list[str] = []

        def dash(cell: Cell) -> str:
            reason = self.reasons[cell]
            if reason not in notes:
                notes.append(reason)
            return f"- ({notes.index(reason) + 1})"

        def ratio(cell: Cell) -> str:
            if cell not in self.times:
                return dash(cell)
            low, high = self.times[cell].quartiles
            return f"{self.times[cell].median:.2f} ({low:.2f}-{high:.2f})"

        def goal(value: float | None) -> str:
            return "" if value is None else f"{value:.2f}"

        rows = [
            [s.title, goal(s.goal), *(ratio((s.title, peer)) for peer in PEERS)]
            for s in self.settings
        ]
        times = _table(["time / plain sdpa", "goal", *TITLES.values()], rows)
        rows = []
        for s in self.settings:
            cells = {peer: (s.title, peer) for peer in PEERS}
            if cells["interp"] in self.memory:
                kept = f"{self.memory[cells['interp']].kept / MIB:.1f}"
                extra = [
                    f"{self.extra(c):.2f}" if c in self.memory else dash(c) for c in cells.values()
                ]
                rows.append([s.title, kept, goal(GOAL_MEMORY), *extra])
        memory = _table(["memory beyond plain / kept", "kept, MiB", "goal", *TITLES.values()], rows)
        about = ", ".join(f"{key} {value}" for key, value in self.about.items())
        footnotes = [f"{number}. {reason}" for number, reason in enumerate(notes, 1)]
        plain_run = (
            f"Plain sdpa takes {median(self.plain_seconds):.3f} s, and {self.plain_peak / MIB:.1f} "
            f"MiB at its peak. Logits of all peers agree to {self.difference:.0e}."
        )
        return "\n\n".join([times, memory, "\n".join(footnotes), plain_run, f"{about}."])

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        cells = [
            {
                "setting": s.title,
                "peer": peer,
                "goal": s.goal,
                **(
                    {"why_not": self.reasons[s.title, peer]}
                    if (s.title, peer) in self.reasons
                    else {}
                ),
                **(self.times[s.title, peer].to_json() if (s.title, peer) in self.times else {}),
                **(vars(self.memory[s.title, peer]) if (s.title, peer) in self.memory else {}),
            }
            for s in self.settings
            for peer in PEERS
        ]
        return {
            "about": self.about,
            "plain_seconds": self.plain_seconds,
            "plain_peak": self.plain_peak,
            "difference": self.difference,
            "cells": cells,
        }


def into_page(page: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """`page` with `block` between its markers.

    Raises:
        ValueError: the page has no markers.
    """
    if begin not in page or end not in page:
        raise ValueError(f"the page has no place for the tables; write {begin} and {end} into it")
    head, rest = page.split(begin, 1)
    return f"{head}{begin}\n{block}\n{end}{rest.split(end, 1)[1]}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
