"""What a study gives: a verdict in one sentence, the intervals behind it, and its tables.

A finding *holds* if its interval excludes "nothing happened", and if it beats the control that
could have produced it by itself. Both are decided here, by the intervals alone; a finding that does
not hold says so in its text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from interp.stats import Interval, bootstrap, ratio


@dataclass(frozen=True)
class Finding:
    """One claim and its evidence.

    Attributes:
        title: the claim in a few words.
        effect: the estimate with its interval; None if there was nothing to test.
        control: the same of the control, if there is one.
        control_name: what the control was.
        holds: whether the evidence is there.
        text: one sentence with the numbers.
        unit: "points" for a share that is shown times 100, or "share".
    """

    title: str
    effect: Interval | None
    control: Interval | None
    control_name: str
    holds: bool
    text: str
    unit: str = "points"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `summary.json`."""
        control = None if self.control is None else self.control.as_dict()
        nothing = {"estimate": None, "low": None, "high": None}
        return {
            "title": self.title,
            **(nothing if self.effect is None else self.effect.as_dict()),
            "control": None if control is None else {"name": self.control_name, **control},
            "holds": self.holds,
            "unit": self.unit,
            "text": self.text,
        }


@dataclass
class Result:
    """A finding, its tables (name -> data frame) and further intervals by key."""

    finding: Finding
    tables: dict[str, pd.DataFrame]
    figures: dict[str, Interval] = field(default_factory=dict)


def untestable(title: str, why: str) -> Result:
    """The result of a claim that could not be tested."""
    return Result(Finding(title, None, None, "", False, f"Not testable here: {why}"), {})


Counts = tuple[np.ndarray, np.ndarray]  # per image: hits, and among how many


def rate(counts: Counts, seed: int) -> Interval:
    """Share of hits over all images."""
    return bootstrap(ratio, *counts, seed=seed)


def difference(a: Counts, b: Counts, seed: int) -> Interval:
    """Share of `a` minus share of `b`, paired over images."""
    return bootstrap(lambda x, n, y, m: ratio(x, n) - ratio(y, m), *a, *b, seed=seed)


def points(interval: Interval) -> str:
    """In points (hundredths), with sign: '+6.8 [+5.6, +8.0]'."""
    scaled = Interval(100 * interval.estimate, 100 * interval.low, 100 * interval.high)
    return f"{scaled:+.1f}"


def percent(interval: Interval) -> str:
    """As a percentage: '38% [31%, 45%]'."""
    return f"{interval:.0%}"
