"""Claim 3: attention from correctly classified tokens is what corrects their neighbours.

The protocol (PAPER's third claim, the details are ours):

1. A frozen probe at the reference stage (the adapter's output) calls every token right or wrong.
2. Two classes *conflict* if each is often taken for the other. Queries are tokens of a class A
   that are taken for its conflicting class; their *anchors* are the earlier tokens of the same
   region that are rightly taken for A.
3. The attention edges anchor -> query are cut in every layer, before the softmax, and the frozen
   probe at the end reads the queries again. Always the same tokens, cut against not cut: a token
   chosen for its error gets better by itself (regression to the mean), and that is in both.
4. Controls cut as many edges of the same queries: random earlier image tokens, with the count or
   with the attention mass of the anchors; tokens of other regions; wrong tokens of the same
   region; right tokens of unrelated classes; and the anchors' edges cut and opened again.
5. Without any probe to choose tokens: in scenes whose marks are known, marked -> unmarked edges of
   a region are cut, against as many unmarked -> unmarked ones.

What is reported is the share of the queries' recovery that is gone: 1 - accuracy cut / accuracy
clean, which is 0 when nothing changes and 1 when no query is ever right any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from interp.edges import EdgeSet
from interp.edits import Knockout, MaskEdit, Unmask
from interp.errors import Untestable
from interp.probes.metrics import confusion
from interp.stats import Interval, bootstrap, ratio
from interp.studies.recovery import Baseline
from interp.studies.result import Finding, Result, difference, percent, rate
from interp.studies.split import Progress, Split

TITLE = "Correct neighbours cause it"
ANCHORS = "correct -> wrong"
MATCHED = "random image tokens"
MIN_CONFUSION = 0.1


@dataclass(frozen=True, eq=False)
class Condition:
    """Edges to cut in every batch; `edges` is None for the clean run."""

    name: str
    edges: list[EdgeSet] | None
    is_control: bool
    reopen: bool = False  # cut and opened again: must change nothing

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


def knockout(base: Baseline, *, seed: int = 0, on_batch: Progress | None = None) -> Result:
    """Run the protocol with every control, by windows of layers, and probe-free."""
    test = base.test
    queries, anchors = anchor_edges(base)
    if not queries.any():
        raise Untestable(
            f"no token of {test.name} is taken for a conflicting class and has an anchor: no class "
            f"pair is confused at least {MIN_CONFUSION:.0%} both ways, so there is nothing to cut"
        )
    conditions = _conditions(base, queries, anchors, seed)
    curves, effects = [], []
    llm = [stage for stage in base.bank.stages if stage.startswith("blocks.")]
    right: dict[str, np.ndarray] = {}
    for condition in conditions:
        found = _verdicts(base, condition, llm, None, on_batch)
        right[condition.name] = found[base.readout]
        curves += _curve(base, condition, found, queries, seed, probe_free=False)
    clean = right["clean"]
    shares: dict[str, Interval] = {}
    for condition in conditions[1:]:
        shares[condition.name] = share_gone(test, clean, right[condition.name], queries, seed)
        effects.append(_effect(condition, "all", shares[condition.name], seed))
    anchor_condition = conditions[1]
    for window in windows(base.test.model.cfg.n_layers):
        cut = _verdicts(base, anchor_condition, [base.readout], window, on_batch)[base.readout]
        share = share_gone(test, clean, cut, queries, seed)
        name = f"{window[0]}" if len(window) == 1 else f"{window[0]}-{window[-1]}"
        effects.append(_effect(anchor_condition, name, share, seed))
    beyond = _beyond(test, clean, right[ANCHORS], right[MATCHED], queries, seed)
    figures = {"knockout_beyond_control": beyond}
    if test.marks is not None:
        free_curves, free_figures = _probe_free(base, llm, seed, on_batch)
        curves += free_curves
        figures |= free_figures
    lost = difference(test.counts(right[ANCHORS], queries), test.counts(clean, queries), seed)
    figures["knockout_accuracy_change"] = lost
    holds = shares[ANCHORS].low > 0 and beyond.low > 0
    text = (
        f"Cutting what {int(queries.sum())} misclassified tokens read from the correct tokens of "
        f"their region removes {percent(shares[ANCHORS])} of their recovery; as many random "
        f"edges remove {percent(shares[MATCHED])}."
    )
    finding = Finding(
        TITLE,
        shares[ANCHORS],
        shares[MATCHED],
        "as many random edges",
        holds,
        text,
        unit="share",
    )
    tables = {"knockout": pd.DataFrame(curves), "knockout_effect": pd.DataFrame(effects)}
    return Result(finding, tables, figures)


def passes(n_layers: int) -> int:
    """How often `knockout` goes over the test images: cuts, windows, probe-free version."""
    return 7 + len(windows(n_layers)) + 2


def anchor_edges(base: Baseline) -> tuple[np.ndarray, np.ndarray]:
    """The queries `[n_images, tokens]` and the edges from their anchors `[n_images, dst, src]`."""
    test = base.test
    said = base.predicted[base.reference]
    right = base.right(base.reference)
    pairs = conflicting_pairs(base)
    safe = np.where(test.labelled, test.labels, 0)
    queries = base.wrong(base.reference) & pairs[safe, said]
    anchors = queries[:, :, None] & right[:, None, :] & test.same_region & test.earlier
    queries &= anchors.any(2)
    return queries, anchors


def share_gone(
    test: Split, clean: np.ndarray, cut: np.ndarray, queries: np.ndarray, seed: int
) -> Interval:
    """1 - accuracy under the cut / accuracy clean, over the queries."""
    kept, all_ = (cut & queries).sum(1), (clean & queries).sum(1)
    if not all_.any():
        raise Untestable(
            f"none of {int(queries.sum())} misclassified tokens is right at the end, so there is "
            "no recovery to remove"
        )
    return bootstrap(lambda k, a: 1 - ratio(k, a), kept, all_, seed=seed)


def windows(n_layers: int) -> list[list[int]]:
    """Every single layer, then every pair of neighbouring layers."""
    single = [[layer] for layer in range(n_layers)]
    return single + [[layer, layer + 1] for layer in range(n_layers - 1)]


def _beyond(
    test: Split,
    clean: np.ndarray,
    cut: np.ndarray,
    control: np.ndarray,
    queries: np.ndarray,
    seed: int,
) -> Interval:
    """Share gone beyond the control's, paired."""
    counted = [(a & queries).sum(1) for a in (cut, control, clean)]
    return bootstrap(lambda k, c, a: ratio(c - k, a), *counted, seed=seed)


def _curve(
    base: Baseline,
    condition: Condition,
    right: Mapping[str, np.ndarray],
    queries: np.ndarray,
    seed: int,
    *,
    probe_free: bool,
) -> list[dict[str, Any]]:
    """Table rows: the queries' accuracy at every stage read, under one condition."""
    n_edges = 0 if condition.edges is None else sum(map(len, condition.edges))
    row = {
        "condition": condition.name,
        "probe_free": probe_free,
        "layers": "all",
        "n_tokens": int(queries.sum()),
        "edges_per_query": n_edges / max(int(queries.sum()), 1),
    }
    return [
        {
            **row,
            "stage": stage,
            "order": order,
            **rate(base.test.counts(hits, queries), seed).as_dict(),
        }
        for order, (stage, hits) in enumerate(right.items())
    ]


def _effect(condition: Condition, layers: str, share: Interval, seed: int) -> dict[str, Any]:
    return {
        "condition": condition.name,
        "layers": layers,
        "is_control": condition.is_control,
        **share.as_dict(),
    }


def _verdicts(
    base: Baseline,
    condition: Condition,
    stages: Sequence[str],
    layers: Sequence[int] | None,
    on_batch: Progress | None,
) -> Mapping[str, np.ndarray]:
    """Which test tokens the frozen probes get right under a condition, by stage."""
    said = base.reread(lambda number: condition.edits(number, layers), stages, on_batch)
    return {stage: base.hits(said[stage]) for stage in stages}


def _conditions(
    base: Baseline, queries: np.ndarray, anchors: np.ndarray, seed: int
) -> list[Condition]:
    test = base.test
    right, wrong = base.right(base.reference), base.wrong(base.reference)
    visible = queries[:, :, None] & test.earlier
    pairs = conflicting_pairs(base)
    safe = np.where(test.labelled, test.labels, 0)
    unrelated = ~(
        pairs[safe[:, :, None], safe[:, None, :]] | (safe[:, :, None] == safe[:, None, :])
    )
    cut = test.edges(anchors)

    def drawn(candidates: np.ndarray) -> list[EdgeSet]:
        pools = test.edges(visible & candidates)
        return [
            edges.random_like(pool, seed=seed + i, allow_fewer=True)
            for i, (edges, pool) in enumerate(zip(cut, pools, strict=True))
        ]

    everywhere = np.ones_like(anchors)
    return [
        Condition("clean", None, False),
        Condition(ANCHORS, cut, False),
        Condition(MATCHED, drawn(everywhere), True),
        Condition(
            "random, same attention mass",
            test.edges(_mass_matched(base, anchors, visible, seed)),
            True,
        ),
        Condition("other regions", drawn(~test.same_region), True),
        Condition("wrong, same region", drawn(test.same_region & wrong[:, None, :]), True),
        Condition("correct, unrelated class", drawn(right[:, None, :] & unrelated), True),
        Condition("no-op (cut and reopened)", cut, True, reopen=True),
    ]


def _mass_matched(
    base: Baseline, anchors: np.ndarray, visible: np.ndarray, seed: int
) -> np.ndarray:
    """Random non-anchor edges whose attention mass reaches that of the query's anchors.

    Mass is the clean pattern averaged over layers and heads. Candidates are taken in random order
    until their sum is at least the anchors'; a query whose other tokens hold less gets all of them.
    """
    test, rng = base.test, np.random.default_rng(seed)
    chosen = np.zeros_like(anchors)
    for x, at in test.slices():
        read = test.model.run(x, read="blocks.*.attn.hook_pattern", logits=False)
        mean = torch.stack([state.mean(1) for state in read.states.values()]).mean(0)
        grid, n = x.grid, test.n_tokens
        row, position = (a.reshape(grid.n_images, n) for a in (grid.row, grid.position))
        mass = mean[row[:, :1, None], position[:, :, None], position[:, None, :]].numpy()
        wanted = (mass * anchors[at]).sum(2)
        order = rng.random(mass.shape).argsort(2)
        pool = (visible[at] & ~anchors[at]) & (wanted > 0)[:, :, None]
        shuffled = np.take_along_axis(np.where(pool, mass, 0), order, 2)
        before = shuffled.cumsum(2) - shuffled
        take = np.zeros_like(pool)
        np.put_along_axis(take, order, before < wanted[:, :, None], 2)
        chosen[at] = take & pool
    return chosen


def _probe_free(
    base: Baseline, llm: Sequence[str], seed: int, on_batch: Progress | None
) -> tuple[list[dict[str, Any]], dict[str, Interval]]:
    """Marked against unmarked sources; tokens are chosen by what was drawn, not by a probe."""
    test = base.test
    assert test.marks is not None
    marked, unmarked = test.marks[:, None, :], ~test.marks[:, None, :]
    reach = test.same_region & test.earlier & ~test.marks[:, :, None]
    from_marked, from_unmarked = reach & marked, reach & unmarked
    enough = (from_marked.sum(2) > 0) & (from_unmarked.sum(2) >= from_marked.sum(2))
    queries = enough & (test.purity == 1) & test.labelled
    cut = test.edges(from_marked & queries[:, :, None])
    pools = test.edges(from_unmarked & queries[:, :, None])
    control = [
        edges.random_like(pool, seed=seed + i)
        for i, (edges, pool) in enumerate(zip(cut, pools, strict=True))
    ]
    conditions = [
        Condition("clean", None, False),
        Condition("marked -> unmarked", cut, False),
        Condition("unmarked -> unmarked", control, True),
    ]
    curves, right = [], {}
    for condition in conditions:
        found = _verdicts(base, condition, llm, None, on_batch)
        right[condition.name] = found[base.readout]
        curves += _curve(base, condition, found, queries, seed, probe_free=True)
    clean = test.counts(right["clean"], queries)
    names = {
        "marked -> unmarked": "probe_free_change",
        "unmarked -> unmarked": "probe_free_control",
    }
    figures = {
        key: difference(test.counts(right[name], queries), clean, seed)
        for name, key in names.items()
    }
    return curves, figures
