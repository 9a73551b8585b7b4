"""The numbers of the head benchmark as text, and in a page of the documentation."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from head_fit import Law
from measure import Timing

BEGIN, END = "<!-- heads: begin -->", "<!-- heads: end -->"
TOP = 10
GOALS = {"exact": 5.0, "screened": 25.0}  # times as fast as the loop on TransformerBridge
GOAL_RECALL = 0.95  # of the exact top heads among the screened ones
TITLES = {
    "bridge": "loop on TransformerBridge",
    "stopped": "the same, `stop_at_layer`",
    "nnsight": "loop on nnsight",
    "exact": 'interp, `head_attribution(method="exact")`',
    "screened": "interp, `attribute(budget={budget})`",
}
MB = 1e6


@dataclass
class Report:
    """Everything that was measured.

    Attributes:
        times: by way, ratios to the loop on TransformerBridge.
        bridge_seconds: what that loop took.
        forwards: how often each way runs the language model for an image, whole or in part.
        difference: largest difference between two ways' effects, in units of the largest effect.
        recalls: of the exact top heads among the screened ones, an image each.
        peaks: the most that ours had allocated at any moment, in bytes.
        memory: what ours was allowed, in GB.
        budget: share of heads that the screened study verified.
        heads: how many heads there are to cut.
        laws: of the cost fit.
        about: machine, versions, sizes.
    """

    times: dict[str, Timing]
    bridge_seconds: list[float]
    forwards: dict[str, int]
    difference: float
    recalls: list[float]
    peaks: dict[str, int]
    memory: float
    budget: float
    heads: int
    laws: list[Law]
    about: dict[str, Any]

    @property
    def recall(self) -> float:
        """Mean over images."""
        return float(np.mean(self.recalls))

    def markdown(self) -> str:
        """The section's text."""
        rows = [["one image", "goal", "times as fast", "seconds", "runs of the language model"]]
        rows.append(["---"] * len(rows[0]))
        for way, title in TITLES.items():
            goal = f"{GOALS[way]:.0f}" if way in GOALS else ""
            seconds = self.bridge_seconds if way == "bridge" else self.times[way].seconds
            fast = "1"
            if way in self.times:
                slow, quick = self.times[way].quartiles
                fast = f"{1 / self.times[way].median:.1f} ({1 / quick:.1f}-{1 / slow:.1f})"
            name = title.format(budget=self.budget)
            rows.append([name, goal, fast, f"{median(seconds):.2f}", str(self.forwards[way])])
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        peaks = " and ".join(f"{peak / MB:.1f} MB ({way})" for way, peak in self.peaks.items())
        text = (
            f"Each of {self.heads} heads is cut in turn; the effects of all ways agree to "
            f"{self.difference:.0e} of the largest. The screened study's top {TOP} hold "
            f"{self.recall:.1%} of the exact ones (goal {GOAL_RECALL:.0%}), mean over "
            f"{len(self.recalls)} images, {min(self.recalls):.0%} at worst. Peak memory beyond the "
            f"weights: {peaks}; {self.memory * 1e3:.0f} MB were allowed (memory={self.memory:g})."
        )
        laws = "\n".join(f"* {law}" for law in self.laws)
        about = ", ".join(f"{key} {value}" for key, value in self.about.items())
        return "\n\n".join(part for part in (table, text, laws, f"{about}.") if part)
