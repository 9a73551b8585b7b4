"""What looking inside costs: this library beside plain transformers, nnsight, TransformerBridge.

    python experiments/benchmarks/overhead.py --docs docs/benchmarks.md

1. Build one medium LLaVA and give each tool a copy (`peers.py`).
2. Check that the comparison is one of equals: every tool runs the model exactly once a call, gives
   the same logits, keeps the same tensors, and every edit moves the logits (`check`).
3. Time all calls, interleaved (`measure.py`), as ratios to plain transformers with SDPA.
4. Measure the peak memory of those that keep something.
5. Print two tables (`tables.py`); `--json` keeps all numbers, `--docs` puts the tables into a
   page, between its markers.

A new row is one function in `settings.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch loads: its profiler chatters

import torch
from measure import interleaved, kept_bytes, peak_bytes
from peers import QUICK, Bench, Size, count_forwards, plain
from settings import SETTINGS, Call, Setting
from tables import Cell, Memory, Report, into_page
from torch import Tensor


class Unequal(RuntimeError):
    """The peers do not compute the same, so their times must not be compared."""


def measure(
    bench: Bench,
    settings: Sequence[Setting],
    *,
    rounds: int,
    warmup: int = 1,
    seed: int = 0,
    about: dict[str, Any] | None = None,
) -> Report:
    """Check, time and weigh every setting on every peer."""
    device = str(bench.sdpa.device)
    calls: dict[Cell, Call] = {}
    reasons: dict[Cell, str] = {}
    for setting in settings:
        for peer, call in setting.make(bench).items():
            if isinstance(call, str):
                reasons[setting.title, peer] = call
            else:
                calls[setting.title, peer] = call
    sizes: dict[Cell, tuple[int, int]] = {}
    difference = max(check(bench, setting, calls, sizes) for setting in settings)

    def reference() -> Tensor:
        return plain(bench.sdpa, bench.tensors)

    gc.collect()
    gc.freeze()  # the models are no garbage: nobody should pay for looking through them
    try:
        times, plain_seconds = interleaved(
            calls, reference, rounds=rounds, warmup=warmup, seed=seed, device=device
        )
        memory = {
            cell: Memory(*sizes[cell], peak_bytes(calls[cell], device))
            for cell in calls
            if sizes[cell][0]
        }
        plain_peak = peak_bytes(reference, device)
    finally:
        gc.unfreeze()
    return Report(
        settings, times, plain_seconds, reasons, memory, plain_peak, difference, about or {}
    )


def check(
    bench: Bench,
    setting: Setting,
    calls: dict[Cell, Call],
    sizes: dict[Cell, tuple[int, int]] | None = None,
) -> float:
    """The largest difference between two peers' logits in one setting.

    Args:
        bench: the peers.
        setting: the row.
        calls: of all rows.
        sizes: receives `kept_bytes` of what each call keeps.

    Raises:
        Unequal: a call runs the model not once, logits or kept tensors differ, or an edit leaves
            the logits as they are.
    """
    clean = plain(bench.sdpa, bench.tensors)
    half = clean.dtype != torch.float32
    tolerance = 0.1 * float(clean.abs().max()) if half else 1e-4
    share = 0.1 if half else 1e-4  # of the largest entry of what is kept, if that is above 1
    first: tuple[str, Tensor, list[Tensor]] | None = None
    worst = 0.0
    for (title, peer), call in calls.items():
        if title != setting.title:
            continue
        results: list[tuple[Tensor, list[Tensor]]] = []
        forwards = count_forwards(lambda call=call, to=results: to.append(call()))  # type: ignore[misc]
        if forwards != 1:
            raise Unequal(f"{title!r} on {peer} runs the model {forwards} times instead of once")
        (logits, kept), *_ = results
        if sizes is not None:
            sizes[title, peer] = kept_bytes(kept)
        if setting.edits and _distance(logits, clean) < 0.01:
            raise Unequal(f"{title!r} on {peer} does not move the logits")
        if first is None:
            first = (peer, logits, kept)
        name, reference, states = first
        difference = _distance(logits, reference)
        worst = max(worst, difference)
        if difference > tolerance:
            raise Unequal(f"{title!r}: logits of {peer} and {name} differ by {difference:.2e}")
        if setting.same_kept:
            if len(kept) != len(states):
                raise Unequal(
                    f"{title!r}: {peer} keeps {len(kept)} tensors, {name} keeps {len(states)}"
                )
            for number, (ours, theirs) in enumerate(zip(kept, states)):
                apart = _distance(ours, theirs)
                if apart > share * max(1.0, float(theirs.abs().max())):
                    raise Unequal(
                        f"{title!r}: tensor {number} of {peer} and {name} differs by {apart:.2e}"
                    )
    return worst


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description="What looking inside costs.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the calls")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=600, help="a square of them is the picture")
    parser.add_argument("--only", default="", help="rows whose title contains this")
    parser.add_argument("--quick", action="store_true", help="a tiny model; its times say nothing")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--docs", type=Path, help="put the tables into this page")
    args = parser.parse_args(arguments)
    settings = [s for s in SETTINGS if args.only in s.title]
    if not settings:
        titles = ", ".join(repr(s.title) for s in SETTINGS)
        parser.error(f"no row's title contains {args.only!r}; there are {titles}")
    page = args.docs.read_text() if args.docs else None
    if page is not None:
        into_page(page, "")  # before minutes are spent
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else Size.with_tokens(args.tokens)
    bench = Bench.build(size, dtype=getattr(torch, args.dtype), device=args.device)
    about = {
        "tokens": size.n_pos,
        "dtype": args.dtype,
        "device": _device_name(args.device),
        "threads": args.threads,
        "rounds": args.rounds,
        **{
            name: version(name) for name in ("torch", "transformers", "nnsight", "transformer-lens")
        },
    }
    report = measure(bench, settings, rounds=args.rounds, seed=args.seed, about=about)
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python experiments/benchmarks/overhead.py", *given])
    block = f"```\n{command}\n```\n\n{report.markdown()}"
    print(block)
    if args.json:
        args.json.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    if page is not None:
        args.docs.write_text(into_page(page, block))
    return report


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()


if __name__ == "__main__":
    main()
