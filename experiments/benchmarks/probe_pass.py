"""What a pass for probes costs beyond the model's own forward pass, from pictures to probes.

    python experiments/benchmarks/probe_pass.py --docs docs/benchmarks.md

The medium LLaVA of `peers.py` goes over pictures in batches. The reference is plain transformers on
inputs that are prepared already: vision tower, adapter and language model, no logits, nothing kept.
Beside it, round by round in shuffled order:

| way | what it does besides |
|---|---|
| read | prepare the pictures and their labels, hand out all stages |
| ridge | read, and fit a ridge probe at every stage: statistics, penalty chosen, solved |
| logistic | read, keep the features, and fit by L-BFGS |
| score | read, and score the tokens of every stage |
| pixels | score, and pixels as well |

The goal is for `ridge`, which is the whole fit in one pass: at most 15% more than the forward.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from measure import Timing, interleaved
from peers import QUICK, WORDS, Size, medium
from PIL import Image
from probe_paper import paper_estimate
from rich.console import Console
from rich.table import Table
from tables import into_page

from interp import MLLM
from interp.probes.fitting import Fitting
from interp.probes.parts import DataParts
from interp.probes.reading import ModelStream
from interp.probes.scores import Scores
from interp.probes.scoring import bank_rows, score

BEGIN, END = "<!-- probe pass: begin -->", "<!-- probe pass: end -->"
GOAL = 1.15
CLASSES = tuple(f"class {k}" for k in range(10))


@dataclass(frozen=True)
class Sample:
    """A picture with its mask."""

    image: Image.Image
    mask: np.ndarray
    name: str


class Pictures:
    """Noise in patches of colours, by class; sizes as photographs have them."""

    name, split, classes = "patches", "all", CLASSES
    colors = tuple((25 * k, 25 * k, 25 * k) for k in range(len(CLASSES)))

    def __init__(self, n: int, side: int) -> None:
        self.n, self.side = n, side

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng(index)
        small = rng.integers(0, len(CLASSES), (6, 8))
        scale = -(-self.side * 3 // 2 // 6)
        mask = np.kron(small, np.ones((scale, scale), np.int64))
        shade = np.random.default_rng(7).integers(0, 256, (len(CLASSES), 3))[mask]
        noisy = shade + rng.integers(-40, 41, shade.shape)
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        return Sample(picture, mask, f"{index}")


@dataclass
class Bench:
    """A model, its pictures, and the probes that are scored."""

    model: MLLM
    parts: DataParts

    @classmethod
    def build(cls, size: Size, n: int, batch_size: int) -> Bench:
        """The medium model over `n` pictures."""
        model, x, _ = medium(size, dtype=torch.float32, device="cpu")
        side = x.grid.sizes[0][0]
        prompt = " ".join(["<image>", *(WORDS * 9)[: size.n_pos - size.side**2]])
        data = Pictures(n, side)
        return cls(model, DataParts(model, data, question=prompt, batch_size=batch_size))

    def ways(self) -> tuple[dict[str, Callable[[], Any]], Callable[[], Any]]:
        """The calls to be timed, and the reference."""
        prepared = [part.x for part in self.parts.parts(range(self.parts.n_parts))]
        tensors = [self.model.to_device(x) for x in prepared]
        bank = Fitting("ridge").fit(self.stream()).bank

        @torch.no_grad()
        def forward() -> None:
            for batch in tensors:
                self.model.module.model(**batch, use_cache=False)  # type: ignore[operator]

        def read() -> None:
            for _ in self.stream().read(range(self.parts.n_parts)):
                pass

        def scored(pixels: bool) -> None:
            scores = Scores(bank.stages, CLASSES, pixels=pixels)
            score(self.stream(), bank_rows(bank), [scores])

        return {
            "read": read,
            "ridge": lambda: Fitting("ridge").fit(self.stream()),
            "logistic": lambda: Fitting("logistic").fit(self.stream()),
            "score": lambda: scored(False),
            "pixels": lambda: scored(True),
        }, forward

    def stream(self) -> ModelStream:
        """All stages of the pictures; its widths are known, as in a long pass."""
        stream = ModelStream(self.model, self.parts)
        stream.widths = self._widths()  # found once: a long pass has one picture of a thousand
        return stream

    def _widths(self) -> dict[str, int]:
        if not hasattr(self, "_found"):
            self._found = dict(ModelStream(self.model, self.parts).widths)
        return self._found


def main(arguments: Sequence[str] | None = None) -> dict[str, Timing]:
    parser = argparse.ArgumentParser(description="What a pass for probes costs.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny; its times say nothing")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--docs", type=Path, help="put the table into this page")
    args = parser.parse_args(arguments)
    page = args.docs.read_text() if args.docs else None
    if page is not None:
        into_page(page, "", BEGIN, END)  # before minutes are spent
    torch.set_num_threads(args.threads)
    if args.quick:
        args.pictures, args.rounds = 8, 2
    bench = Bench.build(QUICK if args.quick else Size(), args.pictures, args.batch_size)
    ways, forward = bench.ways()
    found, plain = interleaved(ways, forward, rounds=args.rounds, warmup=1)
    rows = [
        ("forward alone", f"{1000 * min(plain) / args.pictures:.0f}", "", ""),
        *(
            (
                name,
                f"{1000 * min(timing.seconds) / args.pictures:.0f}",
                f"{100 * (timing.median - 1):+.0f}%",
                "[{:+.0f}%, {:+.0f}%]".format(*(100 * (q - 1) for q in timing.quartiles)),
            )
            for name, timing in found.items()
        ),
    ]
    heads = ("way", "ms a picture", "beyond the forward", "quartiles")
    table = Table(*heads)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    met = found["ridge"].median <= GOAL
    goal = f"Goal: ridge at most {100 * (GOAL - 1):.0f}% beyond; {'met' if met else 'not met'}."
    console.print(goal)
    estimate = paper_estimate()
    console.print(estimate, highlight=False)
    if args.json:
        args.json.write_text(json.dumps({k: t.to_json() for k, t in found.items()}, indent=1))
    if page is not None:
        given = sys.argv[1:] if arguments is None else arguments
        lines = ["| " + " | ".join(heads) + " |", "|---|---|---|---|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        command = " ".join(["python experiments/benchmarks/probe_pass.py", *given])
        block = (
            f"```\n{command}\n```\n\n" + "\n".join(lines) + f"\n\n{goal}\n\n```\n{estimate}\n```"
        )
        args.docs.write_text(into_page(page, block, BEGIN, END))
    return found


if __name__ == "__main__":
    main()
