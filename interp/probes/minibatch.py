"""Minibatch steps over a stream that is not kept.

A fixed number of passes, in an order that is shuffled by the seed, with a step every so many parts:
the gradient of all stages of a width in one product, times the inverse of the metric of
`interp.probes.newton`. Such steps are Newton's, made shorter where a class has few tokens in a
step; they shrink as 1/sqrt(t), and the mean over the last half of them is the result (Polyak and
Juditsky 1992, SIAM J. Control Optim. 30:838). In the last pass the gradient at that mean is taken
as well, so that a fit that ended too early can be told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from interp.probes.newton import Metric, choose_start, loss, start
from interp.probes.source import Targets
from interp.probes.stream import Tokens, TokenStream
from interp.probes.units import Fold, Sums
from interp.world import World

#: largest entry of the mean gradient with which minibatches may end; see `descend`
STREAM_TOL = 5e-3
#: what is added to a class's curvature, times features a token of the step: the variance of its
#: gradient's mean, in units of the metric (found by trial on 10 and 150 classes)
NOISE = 0.4
FULL_STEPS = 5  # steps after which their length has fallen to 1 / sqrt(2)
Progress = Callable[[int, int], None]  # pass, part


@dataclass
class Group:
    """Stages of one width, and what was found for them: tensors [S, ...]."""

    stages: tuple[str, ...]
    sums: Sums
    fold: Fold
    weight: Tensor | None = None
    intercept: Tensor | None = None
    n_iter: Tensor | None = None
    gradient: Tensor | None = None


class UnitStream(TokenStream, Protocol):
    """A stream that brings tokens into units."""

    def in_units(self, tokens: Tokens) -> tuple[dict[str, Tensor], Targets]:
        """Labelled tokens: stage -> [m, d] float32, and what they are."""
        ...


def descend(
    stream: UnitStream,
    groups: list[Group],
    seen: Tensor,
    ridge: float,
    epochs: int,
    parts_a_step: int,
    seed: int,
    world: World,
    progress: Progress | None = None,
) -> None:
    """Minibatch steps for all groups together; fills in what they are to hold.

    `gradient` is taken in the last pass, at the mean of the steps as it was then: the last one is
    hardly elsewhere.
    """
    n_parts = stream.n_parts
    walks = [Walk(group, ridge) for group in groups]
    for epoch in range(epochs):
        # in the order of the data, parts of one kind of picture would follow each other
        shuffle = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(n_parts, generator=shuffle).tolist()
        steps = [order[i : i + parts_a_step] for i in range(0, n_parts, parts_a_step)]
        mine = [world.share(step) for step in steps]
        # one reading of all of them: a stream may read ahead
        reading = stream.read([part for step in mine for part in step])
        for i, (step, own) in enumerate(zip(steps, mine, strict=True)):
            pieces = []
            for _ in own:
                part, tokens = next(reading)
                z, targets = stream.in_units(tokens)
                pieces.append((z, targets.only(seen)))
                if progress:
                    progress(epoch + 1, part)
            count = torch.tensor(float(sum(len(next(iter(z.values()))) for z, _ in pieces)))
            world.sum_(count)
            if not int(count):
                continue  # no token of these parts has a label
            at = epoch * len(steps) + i
            for walk in walks:
                stacks = [torch.stack([z[stage] for stage in walk.group.stages]) for z, _ in pieces]
                chunks = [
                    (z, targets.to(z)) for z, (_, targets) in zip(stacks, pieces, strict=True)
                ]
                walk.step(chunks, n_parts / len(step), float(count), at, epochs * len(steps), world)
                if epoch == epochs - 1:
                    walk.look(chunks, world)
    for walk in walks:
        walk.finish(epochs)


class Walk:
    """The steps of one group."""

    def __init__(self, group: Group, ridge: float) -> None:
        self.group, self.ridge = group, ridge
        self.theta = start(group.sums, group.fold)
        self.metric: Metric | None = None
        self.total, self.n_total = torch.zeros_like(self.theta), 0
        self.gradient = torch.zeros_like(self.theta)

    def step(
        self, chunks: list[tuple[Tensor, Targets]], times: float, n: float, t: int, of: int,
        world: World,
    ) -> None:  # fmt: skip
        """One step: `times` such chunks, of `n` tokens in all processes, would be all tokens."""
        fold = self.group.fold
        if self.metric is None:
            self.theta, bend = choose_start(fold, self.theta, self.ridge, lambda: chunks, world)
            self.metric = Metric.of(self.group.sums, fold, self.ridge, bend)
        _, weight, bias = loss(chunks, fold, self.theta)
        world.sum_(weight, bias)
        gradient = fold.back(weight, bias) * times
        gradient[..., :-1] += self.ridge * self.theta[..., :-1]
        # Few tokens of a class say little about d weights: Newton's step would follow their noise.
        slow = replace(self.metric, bend=self.metric.bend + NOISE * fold.n_axes / n)
        self.theta = self.theta - slow.solve(gradient) / (1 + t / FULL_STEPS) ** 0.5
        if 2 * (t + 1) > of:
            self.total += self.theta
            self.n_total += 1

    def look(self, chunks: list[tuple[Tensor, Targets]], world: World) -> None:
        """Count the gradient at the mean so far into that of the last pass."""
        _, weight, bias = loss(chunks, self.group.fold, self.mean)
        world.sum_(weight, bias)
        self.gradient += self.group.fold.back(weight, bias)

    @property
    def mean(self) -> Tensor:
        """The mean of the last half of the steps, as far as they have been made."""
        return self.total / self.n_total if self.n_total else self.theta

    def finish(self, epochs: int) -> None:
        """Hand over the mean of the steps."""
        group, mean = self.group, self.mean
        self.gradient[..., :-1] += self.ridge * mean[..., :-1]
        group.weight, group.intercept = group.fold.raw(mean, group.sums)
        group.gradient = self.gradient.abs().amax((1, 2)) / group.sums.n
        group.n_iter = torch.full((len(mean),), epochs)
