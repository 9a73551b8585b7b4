"""What probes of all stages cost: this library's solvers beside scikit-learn's.

    python experiments/benchmarks/probes.py --docs docs/benchmarks.md

1. Draw features like a model's (`probe_features.py`) and fit probes by every way in `WAYS`, in an
   order that is shuffled each round. Ways of this library fit all stages; those of scikit-learn,
   which do one stage after another, fit one, and times are given a stage.
2. Compare accuracies on held-out tokens: what is faster must not be worse (`check`).
3. Take the fastest round of each way. What slows a fit on a busy machine is not the fit; rounds
   are interleaved so that all ways meet the same machine. The newcomer's call is made once.
4. Fit a law of cost to a small grid of sizes (`probe_costs.py`).

A new row is one function with its line in `WAYS`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from probe_costs import Cost, costs
from probe_features import Data, draw
from rich.console import Console
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tables import into_page

from interp.probes.bank import ProbeBank
from interp.probes.newton import TRIED
from interp.probes.ridge import fit_ridge
from interp.probes.solver import SAMPLE
from interp.probes.stream import Held
from interp.probes.streamed import fit_logistic_stream

BEGIN, END = "<!-- probes: begin -->", "<!-- probes: end -->"
APART = 0.005  # accuracies of one kind of probe may differ by so much
GOALS = {
    ("logistic", "prepared"): 4.0,
    ("logistic", "newcomer"): 50.0,
    ("ridge", "classifier"): 6.0,
}


class Unequal(RuntimeError):
    """A way is less accurate than what it is compared with, so its time must not be compared."""


@dataclass
class Fitted:
    """What a way made.

    Attributes:
        stages: of how many.
        said: their verdicts on the test tokens.
        steps: the most that a stage took.
        passes: over the features, mean of the stages.
    """

    stages: int
    said: Mapping[str, Callable[[], np.ndarray]]
    steps: int
    passes: float = 1.0


@dataclass
class Row:
    """A way's times: seconds a stage of each round, accuracy of the first stage, steps."""

    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    steps: int = 0
    stages: int = 0

    @property
    def best(self) -> float:
        """Seconds a stage in the fastest round."""
        return min(self.seconds)


def newcomer(data: Data) -> Fitted:
    """As a tutorial has it: float64, unscaled, more iterations when it complains."""
    x, y = data.fit[data.first].double().numpy(), data.fit_labels.numpy()
    return _sklearn(LogisticRegression(max_iter=1000), x, y, data, np.float64)


def prepared(data: Data) -> Fitted:
    """As one who knows does it: float32, standardised, the default tolerance."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return _sklearn(model, data.fit[data.first].numpy(), data.fit_labels.numpy(), data, np.float32)


def classifier(data: Data) -> Fitted:
    """RidgeClassifier, likewise prepared."""
    model = make_pipeline(StandardScaler(), RidgeClassifier())
    return _sklearn(model, data.fit[data.first].numpy(), data.fit_labels.numpy(), data, np.float32)


def _sklearn(model: Any, x: np.ndarray, y: np.ndarray, data: Data, dtype: type) -> Fitted:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, y)
    last = model[-1] if hasattr(model, "steps") else model
    steps = int(np.max(last.n_iter_)) if getattr(last, "n_iter_", None) is not None else 1
    said = {data.first: lambda: model.predict(data.test[data.first].numpy().astype(dtype))}
    return Fitted(1, said, steps)


def logistic(data: Data) -> Fitted:
    return _ours(ProbeBank.fit(data.fit, data.fit_labels, data.classes), data)


def ridge(data: Data) -> Fitted:
    held = Held(data.fit, data.fit_labels, data.classes, tokens_a_part=_part(data))
    return _ours(fit_ridge(held).bank, data)


def stored(data: Data) -> Fitted:
    return _streamed(data, disk=2**40)


def minibatch(data: Data) -> Fitted:
    return _streamed(data, disk=0)


def _streamed(data: Data, disk: int) -> Fitted:
    held = Held(data.fit, data.fit_labels, data.classes, tokens_a_part=_part(data))
    return _ours(fit_logistic_stream(held, budget=0, disk=disk), data)


def _part(data: Data) -> int:
    return max(1, min(3000, len(data.fit_labels) // 20))


def _ours(bank: ProbeBank, data: Data) -> Fitted:
    said = {stage: partial(_said, bank, stage, data) for stage in data.fit}
    steps = list(bank.n_iter.values())
    # one at the start, one a step, and half of one (no gradient) of a sample for each factor tried
    sample = 0.5 * len(TRIED) * min(1.0, SAMPLE / len(data.fit_labels))
    return Fitted(len(bank.stages), said, max(steps), 1.0 + float(np.mean(steps)) + sample)


def _said(bank: ProbeBank, stage: str, data: Data) -> np.ndarray:
    return bank.predict(stage, data.test[stage]).numpy()


WAYS: dict[str, tuple[str, Callable[[Data], Fitted]]] = {
    "newcomer": ("scikit-learn LogisticRegression, float64, unscaled, max_iter=1000", newcomer),
    "prepared": ("scikit-learn LogisticRegression, float32, standardised", prepared),
    "classifier": ("scikit-learn RidgeClassifier, float32, standardised", classifier),
    "ridge": ('interp, `solver="ridge"`, penalty chosen from 7', ridge),
    "logistic": ('interp, `solver="logistic"`', logistic),
    "stored": ("interp, logistic from a bfloat16 store on disk", stored),
    "minibatch": ("interp, logistic in minibatches, nothing kept", minibatch),
}
#: ways of the same kind of probe, the first of which sets the accuracy
KINDS = (("prepared", "newcomer", "logistic", "stored", "minibatch"), ("classifier", "ridge"))
ONCE = ("newcomer",)


@dataclass
class Report:
    """Everything that was measured: rows by way, what costs follow, machine and sizes."""

    rows: dict[str, Row]
    costs: list[Cost]
    about: dict[str, Any]

    def times_as_fast(self, ours: str, theirs: str) -> float:
        """The fastest rounds' ratio."""
        return self.rows[theirs].best / self.rows[ours].best

    def cells(self) -> list[list[str]]:
        """The table's rows, the last of them the one that all is for."""
        made = []
        for way, row in self.rows.items():
            slowest = max(row.seconds)
            goals = [
                f"{self.times_as_fast(way, theirs):.1f} (goal {goal:.0f}, {theirs})"
                for (ours, theirs), goal in GOALS.items()
                if ours == way and theirs in self.rows
            ]
            made.append([
                WAYS[way][0],
                f"{row.best:.3f}" + (f" to {slowest:.3f}" if len(row.seconds) > 1 else ""),
                str(row.steps),
                f"{100 * row.accuracy:.2f}",
                "; ".join(goals),
            ])  # fmt: skip
        return made

    def markdown(self) -> str:
        """Table, laws of cost, sizes."""
        head = ["a stage", "seconds", "steps", "accuracy, %", "times as fast"]
        lines = [head, ["---"] * len(head), *self.cells()]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        laws = "\n".join(f"* {cost}" for cost in self.costs)
        about = ", ".join(f"{name} {value}" for name, value in self.about.items())
        return f"{table}\n\n{laws}\n\n{about}."

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        rows = {way: vars(row) for way, row in self.rows.items()}
        return {"about": self.about, "rows": rows, "costs": [vars(c) for c in self.costs]}


def measure(data: Data, ways: Sequence[str], rounds: int, seed: int = 0) -> dict[str, Row]:
    """Fit by all ways in all rounds."""
    rng = np.random.default_rng(seed)
    rows = {way: Row() for way in ways}
    for number in range(rounds):
        for way in rng.permutation(list(ways)).tolist():
            if way in ONCE and number:
                continue
            before = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                fitted = WAYS[way][1](data)
            row = rows[way]
            row.seconds.append((time.perf_counter() - before) / fitted.stages)
            row.steps, row.stages = fitted.steps, fitted.stages
            row.accuracy = accuracy(data, fitted)
    return rows


def accuracy(data: Data, fitted: Fitted) -> float:
    """On the first stage's held-out tokens."""
    return float((fitted.said[data.first]() == data.test_labels.numpy()).mean())


def check(rows: dict[str, Row]) -> None:
    """Raise `Unequal` where a way is less accurate than the first of its kind."""
    for first, *others in KINDS:
        for way in others:
            if first in rows and way in rows and way not in ONCE:
                apart = rows[way].accuracy - rows[first].accuracy
                if not abs(apart) <= APART:
                    raise Unequal(f"{way} is {100 * apart:+.2f} points from {first}")
        for theirs in set(others) & set(ONCE) & set(rows):
            # it stops at its limit of iterations, so it may be worse; nobody may be worse than it
            for way in others:
                if way in rows and rows[way].accuracy < rows[theirs].accuracy - APART:
                    raise Unequal(f"{way} is less accurate than {theirs}")


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description="What probes of all stages cost.")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stages", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--power", type=float, default=0.6, help="correlations; 0 for none")
    parser.add_argument("--only", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--quick", action="store_true", help="tiny; its times say nothing")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--docs", type=Path, help="put the table into this page")
    args = parser.parse_args(arguments)
    page = args.docs.read_text() if args.docs else None
    if page is not None:
        into_page(page, "", BEGIN, END)  # before minutes are spent
    torch.set_num_threads(args.threads)
    if args.quick:
        args.stages, args.tokens, args.width, args.classes, args.rounds = 2, 3000, 16, 4, 2
    sizes = {key: getattr(args, key) for key in ("stages", "tokens", "width", "classes")}
    # threads and kernels start up; the first of anything is slow
    measure(draw(1, 2000, 16, 4), [way for way in args.only if way not in ONCE], 1)
    rows = measure(draw(**sizes, power=args.power, seed=args.seed), args.only, args.rounds)
    check(rows)
    about = {
        **sizes,
        "power": args.power,
        "rounds": args.rounds,
        "threads": args.threads,
        "device": platform.machine(),
        **{name: version(name) for name in ("torch", "scikit-learn")},
    }
    report = Report(rows, costs({"ridge": ridge, "logistic": logistic}, quick=args.quick), about)
    console = Console()
    table = Table("a stage", "seconds", "steps", "accuracy, %", "times as fast")
    for cells in report.cells():
        table.add_row(*cells)
    console.print(table)
    for cost in report.costs:
        console.print(str(cost))
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python experiments/benchmarks/probes.py", *given])
    if args.json:
        args.json.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    if page is not None:
        block = f"```\n{command}\n```\n\n{report.markdown()}"
        args.docs.write_text(into_page(page, block, BEGIN, END))
    return report


if __name__ == "__main__":
    main()
