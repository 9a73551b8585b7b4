"""How a head study's time grows with the model and the data: a power law, fitted.

    seconds = c * layers^a * heads^b * tokens^c * images^d

Each of the four is varied around one small model while the others stay as they are, and once all
are (`grid`); each study is timed, and the logarithms are fitted by least squares. *Layers* are
those asked about, half of the language model's; *heads* share one width, so that twice as many are
half as wide each; *tokens* are image and text; *images* come one a batch. R² is of the logarithms.
A power law is a summary: an exponent below 1 for tokens, say, means that part of the time does not
depend on them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from head_loops import START, Case, cases
from peers import QUICK, Size, medium

from interp import MLLM, ProbeBank
from interp.attribution import head_attribution
from interp.labels import IGNORE

VARIABLES = ("layers", "heads", "tokens", "images")
METHODS = ("exact", "gradient")
BASE = Size(
    d_model=256, n_layers=6, n_heads=8, d_vision=128, n_vision_layers=4, side=16, n_pos=16**2 + 24
)
REPEATS = 2  # the fastest counts


@dataclass(frozen=True)
class Law:
    """A fitted power law.

    Attributes:
        method: of `head_attribution`.
        coefficient: seconds where all variables are 1.
        exponents: by variable.
        r2: share of the variance of log(seconds) that it explains.
        n: studies it was fitted on.
    """

    method: str
    coefficient: float
    exponents: dict[str, float]
    r2: float
    n: int

    def __str__(self) -> str:
        powers = " ".join(f"{name}^{value:.2f}" for name, value in self.exponents.items())
        seconds = f"{self.coefficient:.1e} s"
        return f"{self.method}: {seconds} x {powers} (R² {self.r2:.3f}, {self.n} studies)"


def fit(*, quick: bool = False) -> list[Law]:
    """Time both methods over the grid and fit a law to each."""
    rows: list[list[float]] = []
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for size, n_images in grid(quick):
        model, x, _ = medium(size, dtype=torch.float32, device="cpu")
        asked, bank = cases(model, x.prompts[0], size.side, n_images, n_probe=8)
        rows.append([len(asked[0].layers), size.n_heads, size.n_pos, n_images])
        for method in METHODS:
            taken = [_seconds(model, bank, asked, method) for _ in range(REPEATS)]
            seconds[method].append(min(taken))
    return [power_law(method, rows, seconds[method]) for method in METHODS]


def grid(quick: bool) -> Iterator[tuple[Size, int]]:
    """Sizes of models with numbers of images: the base, one thing at a time, and all of them."""
    base, sides = (QUICK, (5, 6)) if quick else (BASE, (24, 32))
    pictures = [{"side": side, "n_pos": side**2 + 24} for side in sides]
    yield base, 1
    for factor, picture in zip((2, 4), pictures, strict=True):
        yield replace(base, n_layers=factor * base.n_layers), 1
        yield replace(base, n_heads=factor * base.n_heads), 1
        yield replace(base, **picture), 1
        yield base, factor
    twice = {"n_layers": 2 * base.n_layers, "n_heads": 2 * base.n_heads}
    yield replace(base, **twice, **pictures[0]), 2


def power_law(method: str, rows: list[list[float]], seconds: list[float]) -> Law:
    """Least squares in logarithms; `rows` are the variables of each study."""
    logs = np.log(np.array(rows, dtype=float))
    design = np.column_stack([np.ones(len(logs)), logs])
    known = np.log(np.array(seconds))
    found, _, rank, _ = np.linalg.lstsq(design, known, rcond=None)
    if rank < design.shape[1]:
        raise ValueError("some variable never varies by itself, so it has no exponent")
    left = known - design @ found
    r2 = 1 - left @ left / ((known - known.mean()) ** 2).sum()
    exponents = dict(zip(VARIABLES, found[1:].tolist(), strict=True))
    return Law(method, float(np.exp(found[0])), exponents, float(r2), len(rows))


def _seconds(model: MLLM, bank: ProbeBank, asked: list[Case], method: str) -> float:
    labels = [
        np.where((case.target.confused != case.labels) & ~case.target.tokens, IGNORE, case.labels)
        for case in asked
    ]  # so that the tokens asked about are the same as in the benchmark
    start = time.perf_counter()
    head_attribution(
        model,
        [case.x for case in asked],
        bank,
        method=method,
        labels=labels,
        start=START,
        end=asked[0].end,
        sources=("same-region correct",),
    )
    return time.perf_counter() - start
