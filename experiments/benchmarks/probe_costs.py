"""How the time of fitting probes grows: a sum of what the work is made of, fitted.

    seconds = a + b * stages + c * S N d + e * S N d^2 + f * S N d K passes

S stages of N tokens, width d, K classes. The terms are: starting at all, small work a stage,
copying the features, the sums of squares, and passes of L-BFGS (none for ridge, which still has its
products with the classes once). Coefficients are not negative, and errors count relative to the
time, so that small fits matter as much as large ones (`scipy.optimize.nnls`). Sizes are varied one
at a time round a middle one, and all of them once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from probe_features import draw
from scipy.optimize import nnls

TERMS = ("1", "S", "S N d", "S N d^2", "S N d K passes")
MIDDLE = {"stages": 4, "tokens": 20_000, "width": 128, "classes": 10}
QUICK = {"stages": 2, "tokens": 600, "width": 16, "classes": 4}
REPEATS = 4  # the fastest counts


@dataclass(frozen=True)
class Cost:
    """A fitted law: seconds are `coefficients` times `TERMS`; relative errors of each fit."""

    way: str
    coefficients: list[float]
    errors: list[float]

    def seconds(self, stages: int, tokens: int, width: int, classes: int, passes: float) -> float:
        """What the law says."""
        return float(np.dot(self.coefficients, terms(stages, tokens, width, classes, passes)))

    def __str__(self) -> str:
        law = " + ".join(
            f"{c:.1e} x {term}" for c, term in zip(self.coefficients, TERMS, strict=True) if c
        )
        worst, typical = max(map(abs, self.errors)), float(np.median(np.abs(self.errors)))
        return (
            f"{self.way}: {law} seconds (off by {typical:.0%} typically, {worst:.0%} at most, in "
            f"{len(self.errors)} fits)"
        )


def terms(stages: int, tokens: int, width: int, classes: int, passes: float) -> list[float]:
    """The values of `TERMS`."""
    area = stages * tokens * width
    return [1.0, stages, area, area * width, area * classes * passes]


def grid(quick: bool = False) -> Iterator[dict[str, int]]:
    """Sizes: the middle, each varied both ways, all large."""
    middle = QUICK if quick else MIDDLE
    yield middle
    for name, value in middle.items():
        for size in (value // 2, 2 * value, 3 * value):
            yield middle | {name: size}
    yield {name: 2 * value for name, value in middle.items()}


def costs(ways: dict[str, Callable[[Any], Any]], *, quick: bool = False) -> list[Cost]:
    """The law of each way (data -> what has `passes`)."""
    rows: dict[str, list[tuple[list[float], float]]] = {way: [] for way in ways}
    for fit in ways.values():
        fit(draw(**next(grid(quick))))  # the first of anything is slow
    for sizes in grid(quick):
        data = draw(**sizes)
        best = dict.fromkeys(ways, float("inf"))
        passes = dict.fromkeys(ways, 1.0)
        for _ in range(REPEATS):
            for way, fit in ways.items():
                before = time.perf_counter()
                fitted = fit(data)
                best[way] = min(best[way], time.perf_counter() - before)
                passes[way] = fitted.passes
        for way in ways:
            rows[way].append((terms(**sizes, passes=passes[way]), best[way]))
    return [law(way, *zip(*rows[way], strict=True)) for way in ways]


def law(way: str, values: Any, seconds: Any) -> Cost:
    """Fit: least squares of relative errors."""
    matrix, taken = np.asarray(values, dtype=float), np.asarray(seconds, dtype=float)
    scale = matrix.max(0)
    found, _ = nnls(matrix / scale / taken[:, None], np.ones(len(taken)))
    coefficients = found / scale
    errors = matrix @ coefficients / taken - 1
    return Cost(way, coefficients.tolist(), errors.tolist())
