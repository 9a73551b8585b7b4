"""What a head study costs: every head before the reading, cut one at a time, four ways in one run.

    python experiments/benchmarks/heads.py --docs docs/benchmarks.md

1. Build the medium LLaVA of `peers.py`, pictures with something to read in them, and probes
   (`head_loops.py`).
2. Check that the comparison is one of equals: the loops on TransformerBridge and bare nnsight and
   `head_attribution(method="exact")` give the same effect of every head, and so does
   `attribute(budget=...)` of those that it says it verified.
3. Time all of them, image by image. A time is divided by the mean of the bridge loop's just before
   and after it (`measure.py`), so each image is a round.
4. On more images, compare the screened study's top heads with the exact ones.
5. Measure the peak memory of ours.
6. Fit seconds ~ layers^a heads^b tokens^c images^d over a small grid of sizes (`head_fit.py`).
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch loads: its profiler chatters

import torch
from head_fit import Law, fit
from head_loops import START, Case, by_bridge, by_nnsight, cases
from head_report import BEGIN, END, GOALS, TOP, Report
from measure import Timing, interleaved, peak_bytes
from peers import QUICK, Bench, Size, count_forwards
from tables import into_page
from torch import Tensor

from interp import MLLM, ProbeBank
from interp.attribution import HeadTable, attribute, head_attribution

SOURCES = ("same-region correct",)
REPEATS = {"screened": 3}  # a round: it takes so short that one time is mostly noise
TOLERANCE = 1e-3  # of the largest effect, a difference of margins in float32


class Unequal(RuntimeError):
    """Two ways do not compute the same, so their times must not be compared."""


@dataclass(frozen=True)
class Study:
    """Ours: the model, the frozen probes, and what is allowed."""

    model: MLLM
    bank: ProbeBank
    budget: float
    memory: float

    def exact(self, case: Case) -> HeadTable:
        """Every head, cut."""
        return head_attribution(
            self.model,
            case.x,
            self.bank,
            method="exact",
            labels=case.labels,
            start=START,
            target=case.target,
            sources=SOURCES,
            memory=self.memory,
        )

    def screened(self, case: Case) -> HeadTable:
        """Every head by its gradient, the top share of them cut."""
        return attribute(
            self.model,
            case.x,
            self.bank,
            budget=self.budget,
            labels=case.labels,
            start=START,
            target=case.target,
            sources=SOURCES,
            memory=self.memory,
        )


def measure(
    bench: Bench,
    study: Study,
    asked: Sequence[Case],
    *,
    rounds: int,
    laws: list[Law],
    about: dict[str, Any],
) -> Report:
    """Check, time, compare and weigh; the first `rounds` images are timed."""
    timed, ways = asked[:rounds], _ways(bench, study)
    forwards: dict[str, int] = {}
    difference = max(check(study, case, ways, forwards) for case in timed)
    gc.collect()
    gc.freeze()  # the models are no garbage: nobody should pay for looking through them
    try:
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        ratios: dict[str, list[float]] = {way: [] for way in ways}
        for number, case in enumerate(timed):
            calls = {
                (way, again): partial(call, case)
                for way, call in ways.items()
                for again in range(REPEATS.get(way, 1))
            }
            reference = calls.pop(("bridge", 0))
            found, plain = interleaved(calls, reference, rounds=1, warmup=0, seed=number)
            seconds["bridge"] += plain
            for (way, _), timing in found.items():
                seconds[way] += timing.seconds
                ratios[way] += timing.ratios
        recalls = [
            recall(
                *(matrix(way(case), case, bench.n_heads) for way in (study.screened, study.exact))
            )
            for case in asked
        ]
        peaks = {way: peak_bytes(partial(ways[way], timed[0]), "cpu") for way in GOALS}
    finally:
        gc.unfreeze()
    bridge_seconds = seconds.pop("bridge")
    return Report(
        times={way: Timing(seconds[way], ratios[way]) for way in seconds},
        bridge_seconds=bridge_seconds,
        forwards=forwards,
        difference=difference,
        recalls=recalls,
        peaks=peaks,
        memory=study.memory,
        budget=study.budget,
        heads=len(timed[0].layers) * bench.n_heads,
        laws=laws,
        about=about,
    )


def _ways(bench: Bench, study: Study) -> dict[str, Callable[[Case], Any]]:
    return {
        "bridge": partial(by_bridge, bench),
        "stopped": partial(by_bridge, bench, stop=True),
        "nnsight": partial(by_nnsight, bench),
        "exact": study.exact,
        "screened": study.screened,
    }


def check(
    study: Study,
    case: Case,
    ways: dict[str, Callable[[Case], Any]],
    forwards: dict[str, int],
) -> float:
    """The largest difference between two ways' effects, in units of the largest effect.

    Args:
        study: ours.
        case: one image.
        ways: by name; "bridge" is what the others are compared with.
        forwards: receives how often each runs the language model.

    Raises:
        Unequal: effects differ, no head has one, or nothing was verified.
    """
    effects: dict[str, Tensor] = {}
    for way, call in ways.items():
        results: list[Any] = []
        forwards[way] = count_forwards(lambda call=call, to=results: to.append(call(case)))  # type: ignore[misc]
        made = results[0]
        if not isinstance(made, Tensor):
            made = matrix(made, case, study.model.cfg.n_heads, verified=way == "screened")
        effects[way] = made.double()
    reference = effects["bridge"]
    scale = float(reference.abs().max())
    if scale == 0:
        raise Unequal("no head has any effect, so there is nothing to compare")
    worst = 0.0
    for way, made in effects.items():
        known = ~made.isnan()  # of the screened ones, what was verified
        if not known.any() or (way != "screened" and not known.all()):
            raise Unequal(f"{way} gives {int(known.sum())} effects of {made.numel()}")
        apart = float((made - reference)[known].abs().max()) / scale
        if apart > TOLERANCE:
            raise Unequal(f"effects of {way} and bridge differ by {apart:.1e} of the largest")
        worst = max(worst, apart)
    return worst


def matrix(table: HeadTable, case: Case, n_heads: int, *, verified: bool = False) -> Tensor:
    """A table of one image as `[layer, head]`; NaN where it has no row (or none verified)."""
    rows = table.rows[table.rows.verified] if verified else table.rows
    out = torch.full((len(case.layers), n_heads), torch.nan, dtype=torch.float64)
    for layer, head, estimate in zip(rows.layer, rows["head"], rows.estimate, strict=True):
        out[layer, head] = estimate
    return out


def recall(screened: Tensor, exact: Tensor) -> float:
    """Share of the exact top heads, of either sign, that are among the screened top heads."""
    k = min(TOP, exact.numel())
    first, second = (set(m.flatten().abs().topk(k).indices.tolist()) for m in (screened, exact))
    return len(first & second) / k


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description="What a head study costs.")
    parser.add_argument("--images", type=int, default=12, help="for the recall of the screening")
    parser.add_argument("--rounds", type=int, default=3, help="of these images, how many are timed")
    parser.add_argument("--budget", type=float, default=0.05, help="share of heads verified")
    parser.add_argument("--memory", type=float, default=0.2, help="budget of ours, GB")
    parser.add_argument("--tokens", type=int, default=600, help="a square of them is the picture")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-fit", action="store_true", help="leave the cost fit out")
    parser.add_argument("--quick", action="store_true", help="a tiny model; its times say nothing")
    parser.add_argument("--docs", type=Path, help="put the section into this page")
    args = parser.parse_args(arguments)
    page = args.docs.read_text() if args.docs else None
    if page is not None:
        into_page(page, "", BEGIN, END)  # before minutes are spent
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else Size.with_tokens(args.tokens)
    bench = Bench.build(size, dtype=torch.float32, device="cpu")
    images = max(args.images, args.rounds)
    asked, bank = cases(bench.ours, bench.x.prompts[0], size.side, images)
    about = {
        "tokens": size.n_pos,
        "images timed": args.rounds,
        "threads": args.threads,
        "device": platform.machine(),
        **{name: version(name) for name in ("torch", "nnsight", "transformer-lens")},
    }
    report = measure(
        bench,
        Study(bench.ours, bank, args.budget, args.memory),
        asked,
        rounds=args.rounds,
        laws=[] if args.no_fit else fit(quick=args.quick),
        about=about,
    )
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python experiments/benchmarks/heads.py", *given])
    block = f"```\n{command}\n```\n\n{report.markdown()}"
    print(block)
    if page is not None:
        args.docs.write_text(into_page(page, block, BEGIN, END))
    return report


if __name__ == "__main__":
    main()
