"""What a pass for probes costs beyond the model's own forward pass, from pictures to probes.

    python experiments/benchmarks/probe_pass.py --docs docs/benchmarks.md

The medium LLaVA of `peers.py` goes over pictures in batches. The reference is plain transformers on
inputs that are prepared already: vision tower, adapter and language model, no logits, nothing kept.
Beside it, round by round in shuffled order:

| way | what it does besides |
|---|---|
| read | prepare the pictures and their labels, hand out all stages |
| sums | read, and take the statistics of ridge probes at every stage |
| logistic | read, keep the features, and fit by L-BFGS |
| score | read, and score the tokens of every stage |
| pixels | score, and pixels as well |

The goal is for `sums`, the one pass of a ridge fit: at most 15% more than the forward. What comes
behind the pass, choosing penalties and solving, takes the same time for any number of pictures and
is told apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
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
from interp.probes.ridge import sums
from interp.probes.scores import Scores
from interp.probes.scoring import bank_rows, score

BEGIN, END = "<!-- probe pass: begin -->", "<!-- probe pass: end -->"
GOAL = 1.15
ONCE = ("logistic", "pixels")  # they take long, and no goal is about them
CLASSES = tuple(f"class {k}" for k in range(10))


@dataclass(frozen=True)
class Sample:
    """A picture with its mask."""

    image: Image.Image
    mask: np.ndarray
    name: str


class Pictures:
    """Patches of noisy colours, by class, in files; sizes as photographs have them."""

    name, split, classes = "patches", "all", CLASSES
    colors = tuple((25 * k, 25 * k, 25 * k) for k in range(len(CLASSES)))

    def __init__(self, n: int, side: int) -> None:
        self.files = [_files(index, side) for index in range(n)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        picture, mask = (Image.open(BytesIO(file)) for file in self.files[index])
        picture.load()
        return Sample(picture, np.asarray(mask).astype(np.int64), f"{index}")


def _files(index: int, side: int) -> tuple[bytes, bytes]:
    """A JPEG and a PNG, as pictures and masks lie on a disk."""
    rng = np.random.default_rng(index)
    scale = -(-side * 3 // 2 // 6)
    mask = np.kron(rng.integers(0, len(CLASSES), (6, 8)), np.ones((scale, scale), np.int64))
    shade = np.random.default_rng(7).integers(0, 256, (len(CLASSES), 3))[mask]
    noisy = (shade + rng.integers(-40, 41, shade.shape)).clip(0, 255).astype(np.uint8)
    files = BytesIO(), BytesIO()
    Image.fromarray(noisy).save(files[0], "JPEG", quality=90)
    Image.fromarray(mask.astype(np.uint8)).save(files[1], "PNG")
    return files[0].getvalue(), files[1].getvalue()


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
            "sums": lambda: sums(self.stream()),
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
    parser.add_argument("--rounds", type=int, default=3)
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
    often = {name: call for name, call in ways.items() if name not in ONCE}
    found, plain = interleaved(often, forward, rounds=args.rounds, warmup=0)
    rare = {name: call for name, call in ways.items() if name in ONCE}
    found |= interleaved(rare, forward, rounds=1, warmup=0)[0]
    before = time.perf_counter()
    Fitting("ridge").fit(bench.stream())
    solving = time.perf_counter() - before - min(found["sums"].seconds)
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
    met = found["sums"].median <= GOAL
    goal = f"Goal: sums at most {100 * (GOAL - 1):.0f}% beyond; {'met' if met else 'not met'}. "
    goal += f"Behind the pass, ridge solves for {max(0.0, solving):.1f} s, however many pictures."
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
