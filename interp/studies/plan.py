"""What a probe run will take, said before it starts: pictures, tokens, passes, bytes, time.

Everything but the time is arithmetic on sizes. Time is measured: the first batch is run through the
model (once to warm up, then for the clock), and through the statistics where the solver takes them.

    statistics   8 d^2 bytes a stage of width d, in float64; a device holds those of one shard and
                 of one batch, main memory those of up to 8 that wait in the tree
    states       of one batch at all stages, in the model's precision
    scores       confusion matrices and replicates (`interp.probes.scores`)
    features     if `logistic` keeps them: 4 bytes each in memory, 2 on disk
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from interp.probes.moments import Frame, Moments
from interp.probes.ridge import HELD_EVERY, N_SHARDS
from interp.probes.scores import Scores
from interp.probes.store import Place, bytes_needed
from interp.studies.probing import MAP, SHUFFLED, Asked, ProbeArguments


@dataclass(frozen=True)
class Plan:
    """The cost of a probe run.

    Attributes:
        pictures: (fitted on, scored).
        tokens: image tokens of a picture (the mean of the first batch).
        widths: stage -> width.
        n_classes: how many classes there are.
        passes: (over the pictures fitted on, over those scored).
        kept: where features are kept between passes.
        memory: what -> bytes of main memory or of the device.
        disk: bytes on disk.
        seconds: (run a picture, take its statistics, prepare it) measured; 0 where not.
        processes: how many share the work.
    """

    pictures: tuple[int, int]
    tokens: float
    widths: dict[str, int]
    n_classes: int
    passes: tuple[int, int]
    kept: Place
    memory: dict[str, int]
    disk: int
    seconds: tuple[float, float, float]
    processes: int = 1

    @property
    def duration(self) -> float:
        """Seconds that the whole run takes, preparing beside the model, writing not counted."""
        run, sums, prepare = self.seconds
        fit, test = (p * n for p, n in zip(self.passes, self.pictures, strict=True))
        return (fit * max(run + sums, prepare) + test * max(run, prepare)) / self.processes

    def __str__(self) -> str:
        fit, test = self.pictures
        total = self.tokens * fit
        d = sorted(set(self.widths.values()))
        width = f"width {d[0]}" if len(d) == 1 else f"widths {d[0]} to {d[-1]}"
        memory = ", ".join(f"{name} {amount(n)}" for name, n in self.memory.items())
        kept = {
            "memory": f"in memory, {amount(self._bytes('memory'))}",
            "disk": f"on disk in bfloat16, {amount(self._bytes('disk'))}",
            "stream": f"not kept ({amount(self._bytes('disk'))} in bfloat16 would be)",
        }[self.kept]
        run, sums, prepare = (1000 * s for s in self.seconds)
        each = f"{run:.3g} ms a picture in the model, {sums:.2g} ms for its sums, "
        each += f"{prepare:.3g} ms to prepare it meanwhile"
        grows = "none of it grows with the number of pictures"
        if self.kept == "memory":
            grows = "features alone grow with the number of pictures, up to --memory"
        several = f", {self.processes} processes" if self.processes > 1 else ""
        return "\n".join(
            [
                f"pictures   {fit:,} fitted on, {test:,} scored",
                f"tokens     {self.tokens:,.0f} a picture, {_count(total)} fitted on, at "
                f"{len(self.widths)} stages of {width}, {self.n_classes} classes",
                f"passes     {self.passes[0]} to fit (a control of logistic is a fit of its own), "
                f"{self.passes[1]} to score",
                f"features   {kept}",
                f"memory     of a process: {memory}; {grows}",
                f"time       {_duration(self.duration)}: {each}{several}",
            ]
        )

    def _bytes(self, place: Place) -> int:
        return bytes_needed(round(self.tokens * self.pictures[0]), self.widths)[place]


def plan(asked: Asked, arguments: ProbeArguments, *, processes: int = 1) -> Plan:
    """The cost of a run, from its first batch.

    Args:
        asked: what `interp.studies.probing.prepare` gave.
        arguments: what decides the run.
        processes: how many will share the work.
    """
    a, stream = arguments, asked.fit
    started = time.perf_counter()
    part = next(stream.source.parts([0]))
    prepare = time.perf_counter() - started
    stream.tokens(part)  # warms up
    started = time.perf_counter()
    tokens = stream.tokens(part)
    _wait()
    run = time.perf_counter() - started
    widths, k = dict(stream.widths), len(stream.classes)
    n = len(part.names)
    n_tokens = round(len(tokens) / n * asked.pictures[0])
    kept = a.fitting.where(n_tokens, widths, k if a.soft else 0)
    passes = a.fitting.passes(n_tokens, widths, k if a.soft else 0)
    if a.controls and a.fitting.solver == "logistic":
        passes *= 2
    started = time.perf_counter()
    some = tokens.labelled()
    if len(some):
        Moments.of(some, some.targets(k), Frame.of(some))
        _wait()
    taken = time.perf_counter() - started
    rows = [*widths, *(f"{s}{SHUFFLED}" for s in stream.stages if a.controls)]
    scores = Scores(
        rows, stream.classes, n_boot=a.n_boot, shape=(MAP, MAP), pixels=a.pixels, majority=0
    )
    targets = k * (1 + a.controls)
    one = 8 * sum(d * d + d * targets for d in widths.values())
    memory = {
        "statistics": one * 2,
        "waiting statistics": one * _waiting(stream.n_parts),
        "states of a batch": sum(x.nbytes for x in tokens.features.values()),
        "scores": scores.nbytes,
    }
    needed = bytes_needed(n_tokens, widths, k if a.soft else 0)
    if kept == "memory":
        memory["features"] = needed["memory"]
    return Plan(
        pictures=asked.pictures,
        tokens=len(tokens) / n,
        widths=widths,
        n_classes=k,
        passes=(passes, 1),
        kept=kept,
        memory=memory,
        disk=needed["disk"] if kept == "disk" else 0,
        seconds=(run / n, taken / n, prepare / n),
        processes=processes,
    )


def amount(n: float) -> str:
    """Bytes for people.

    >>> amount(5_200_000_000), amount(81_000)
    ('5.2 GB', '81 kB')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:.2g} {unit}" if n < 9.95 * size else f"{n / size:.0f} {unit}"
    return f"{n / 1e3:.0f} kB"


def _waiting(n_parts: int) -> int:
    """Nodes that wait in the trees of both kinds of shards, one a level at most."""
    shards = min(N_SHARDS, n_parts)
    held = shards // HELD_EVERY
    return (shards - held).bit_length() + held.bit_length()


def _count(n: float) -> str:
    return f"{n / 1e6:.3g} million" if n >= 1e6 else f"{n:,.0f}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{max(1, left)} s"


def _wait() -> None:
    """Until a GPU has done what it was told, so that the clock is read when it has."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
