"""Which edges the knockout study cuts: the anchors' and, for the same queries, the controls'.

*Queries* are tokens of a class A that the probe at the reference stage takes for a class that A is
often confused with. Their *anchors* are the earlier tokens of the same connected region that it
rightly takes for A. Every control answers one objection to "cutting the anchors' edges hurt":

| control | the objection it answers |
|---|---|
| random image tokens | any cut of as many edges hurts |
| random, same attention mass | any cut of as much attention hurts |
| other regions | any as many visible tokens elsewhere would do |
| wrong, same region | it is the region that matters, not that the anchors are right |
| correct, unrelated class | it is being right that matters, not being of this class |
| no-op (cut and reopened) | the machinery itself changes something |

Controls never contain an anchor's edge. A query may have fewer candidates than anchors; such a
query keeps what there is, and is left out where control and anchors are compared (`complete`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.edges import EdgeSet
from interp.edits import Knockout, MaskEdit, Unmask
from interp.probes.metrics import confusion
from interp.studies.recovery import Baseline

ANCHORS = "correct -> wrong"
MATCHED = "random image tokens"
MASS_MATCHED = "random, same attention mass"
NO_OP = "no-op (cut and reopened)"
MIN_CONFUSION = 0.1


@dataclass(frozen=True, eq=False)
class Condition:
    """Edges to cut in every batch.

    Attributes:
        name: what is cut.
        edges: one set a batch; None for the clean run.
        is_control: whether it is a control.
        complete: `[n_images, n_tokens]` bool, queries for which it cuts as much as the anchors'
            condition does.
        reopen: open the edges again, which must change nothing.
    """

    name: str
    edges: list[EdgeSet] | None
    is_control: bool
    complete: np.ndarray
    reopen: bool = False

    @property
    def n_edges(self) -> int:
        """How many edges are cut over all batches."""
        return sum(map(len, self.edges or []))

    def edits(self, number: int, layers: Sequence[int] | None) -> list[MaskEdit]:
        """The edits of one batch."""
        if self.edges is None or not len(self.edges[number]):
            return []
        cut = Knockout(self.edges[number], layers=layers)
        return [cut, Unmask(self.edges[number], layers=layers)] if self.reopen else [cut]


def conflicting_pairs(base: Baseline) -> np.ndarray:
    """`[n_classes, n_classes]` bool, symmetric: pairs confused in both directions.

    Confusion is read on the probe images, so that the test images choose nothing.
    """
    n = base.test.n_classes
    counts = confusion(base.probe.labels, base.predicted_probe, n).astype(float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    both = np.minimum(shares, shares.T)
    np.fill_diagonal(both, 0)
    return np.asarray(both >= MIN_CONFUSION)


def anchor_edges(base: Baseline) -> tuple[np.ndarray, np.ndarray]:
    """The queries `[n_images, tokens]` and the edges from their anchors `[n_images, dst, src]`."""
    test = base.test
    said = base.predicted[base.reference]
    right = base.right(base.reference)
    pairs = conflicting_pairs(base)
    safe = np.where(test.labelled, test.labels, 0)
    queries = base.wrong(base.reference) & pairs[safe, said]
    anchors = queries[:, :, None] & right[:, None, :] & test.same_region & test.visible
    queries &= anchors.any(2)
    return queries, anchors


def conditions(
    base: Baseline, queries: np.ndarray, anchors: np.ndarray, seed: int
) -> list[Condition]:
    """The clean run, the anchors' cut and all controls, in the order of the report."""
    test = base.test
    right, wrong = base.right(base.reference), base.wrong(base.reference)
    visible = queries[:, :, None] & test.visible & ~anchors
    pairs = conflicting_pairs(base)
    safe = np.where(test.labelled, test.labels, 0)
    related = pairs[safe[:, :, None], safe[:, None, :]] | (safe[:, :, None] == safe[:, None, :])
    cut = test.edges(anchors)
    wanted = test.per_query(cut)

    def drawn(name: str, candidates: np.ndarray) -> Condition:
        pools = test.edges(visible & candidates)
        edges = [
            anchored.random_like(pool, seed=seed + i, allow_fewer=True)
            for i, (anchored, pool) in enumerate(zip(cut, pools, strict=True))
        ]
        return Condition(name, edges, True, queries & (test.per_query(edges) == wanted))

    by_mass, reached = _mass_matched(base, anchors, visible, seed)
    found = [
        Condition("clean", None, False, queries),
        Condition(ANCHORS, cut, False, queries),
        drawn(MATCHED, np.ones_like(anchors)),
        Condition(MASS_MATCHED, test.edges(by_mass), True, queries & reached),
        drawn("other regions", ~test.same_region),
        drawn("wrong, same region", test.same_region & wrong[:, None, :]),
        drawn("correct, unrelated class", right[:, None, :] & ~related),
        Condition(NO_OP, cut, True, queries, reopen=True),
    ]
    return [condition for condition in found if condition.edges is None or condition.n_edges]


def _mass_matched(
    base: Baseline, anchors: np.ndarray, visible: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Random non-anchor edges whose attention mass reaches that of the query's anchors.

    Mass is the clean pattern averaged over layers and heads. Candidates are taken in random order
    until their sum is at least the anchors'; a query whose other tokens hold less gets all of them.

    Returns:
        The edges `[n_images, dst, src]`, and the queries `[n_images, tokens]` that reach the mass.
    """
    test, rng = base.test, np.random.default_rng(seed)
    chosen = np.zeros_like(anchors)
    reached = np.zeros(anchors.shape[:2], dtype=bool)
    for x, at in test.slices():
        grid, n = x.grid, test.n_tokens
        at_row, position = (
            torch.from_numpy(a.reshape(grid.n_images, n)) for a in (grid.row, grid.position)
        )

        read = test.model.run(
            x,
            read="blocks.*.attn.hook_pattern",
            keep=partial(_among_tokens, at_row[:, :1, None], position),
            logits=False,
        )
        mass = torch.stack(list(read.states.values())).mean(0).float().cpu().numpy()
        wanted = (mass * anchors[at]).sum(2)
        order = rng.random(mass.shape).argsort(2)
        pool = (visible[at] & ~anchors[at]) & (wanted > 0)[:, :, None]
        shuffled = np.take_along_axis(np.where(pool, mass, 0), order, 2)
        before = shuffled.cumsum(2) - shuffled
        take = np.zeros_like(pool)
        np.put_along_axis(take, order, before < wanted[:, :, None], 2)
        chosen[at] = take & pool
        reached[at] = (mass * chosen[at]).sum(2) >= wanted
    return chosen, reached


def _among_tokens(row: Tensor, position: Tensor, pattern: Tensor, hook: Any) -> Tensor:
    """The pattern between each image's tokens, `[n_images, dst, src]`, a mean over heads."""
    return pattern.mean(1)[row, position[:, :, None], position[:, None, :]]
