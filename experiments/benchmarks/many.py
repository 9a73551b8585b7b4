"""What `run_many` saves: many single-head edits of one input, beside `run` once an edit.

    python experiments/benchmarks/many.py

On the medium model of `peers.py` one head at a time loses the edges of the knockout row, in layers
spread evenly over those up to the middle, where the stream is read. Results and receipts of both
ways are compared before any time is taken; then both run in turn, and each time of `run_many` is
divided by the mean of the two times one by one around it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here

import torch
from measure import Timing, interleaved
from peers import QUICK, Size, medium

from interp import Knockout
from interp.execution import Run
from interp.many import run_many


def main(arguments: Sequence[str] | None = None) -> Timing:
    parser = argparse.ArgumentParser(description="What run_many saves.")
    parser.add_argument("--edits", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--batch-size", type=int, help="of run_many; its own choice by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny model; its times say nothing")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else Size.with_tokens(args.tokens)
    model, x, cut = medium(size, dtype=torch.float32, device=args.device)
    depth = max(1, model.cfg.n_layers // 2)
    edits = [
        Knockout(cut, layers=i * depth // args.edits, heads=i % model.cfg.n_heads)
        for i in range(args.edits)
    ]
    read = f"blocks.{depth - 1}.hook_resid_post"

    def one_by_one() -> list[Run]:
        return [model.run(x, edit, read=read, logits=False) for edit in edits]

    def many() -> list[Run]:
        return run_many(model, x, edits, read=read, logits=False, batch_size=args.batch_size)

    apart = 0.0
    for ours, alone in zip(many(), one_by_one(), strict=True):
        apart = max(apart, float((ours[read] - alone[read]).abs().max()))
        for a, b in zip(ours.receipts, alone.receipts, strict=True):
            if (a.edit, a.layer, a.changed) != (b.edit, b.layer, b.changed):
                raise RuntimeError(f"receipts differ: {a} and {b}")
    if apart > 1e-4:
        raise RuntimeError(f"states differ by {apart:.1e}")
    times, plain = interleaved({"many": many}, one_by_one, rounds=args.rounds, warmup=0)
    timing = times["many"]
    low, high = timing.quartiles
    print(
        f"{args.edits} single-head edits in layers 0 to {depth - 1}, {read} read, {x.n_pos} "
        f"tokens, {args.threads} thread(s): one by one {min(plain):.2f} s, run_many "
        f"{min(timing.seconds):.2f} s. run_many / one by one: {timing.median:.2f} "
        f"({low:.2f}-{high:.2f}), so {1 / timing.median:.1f} times as fast; states agree to "
        f"{apart:.0e}."
    )
    return timing


if __name__ == "__main__":
    main()
