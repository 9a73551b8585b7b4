"""Claim 3: attention from correctly classified tokens is what corrects their neighbours.

The protocol (PAPER's third claim, the details are ours):

1. A frozen probe at the reference stage (the adapter's output) calls every token right or wrong.
2. Two classes *conflict* if each is often taken for the other. Queries are tokens of a class A
   that are taken for its conflicting class; their *anchors* are the earlier tokens of the same
   region that are rightly taken for A.
3. The attention edges anchor -> query are cut in every layer, before the softmax, and the frozen
   probe at the end reads the queries again. Always the same tokens, cut against not cut: a token
   chosen for its error gets better by itself (regression to the mean), and that is in both.
4. Controls cut as many edges of the same queries elsewhere (`interp.studies.conditions`). The
   finding holds only if the anchors' cut beats *every* one of them, paired, on the queries for
   which that control could cut as much.
5. Without any probe to choose tokens: in scenes whose marks are known, marked -> unmarked edges of
   a region are cut, against as many unmarked -> unmarked ones.

What is reported is the share of the queries' recovery that is gone: 1 - accuracy cut / accuracy
clean, which is 0 when nothing changes and 1 when no query is ever right any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.errors import Untestable
from interp.model import MLLM
from interp.stats import Interval, bootstrap, ratio
from interp.studies.conditions import (
    ANCHORS,
    MASS_MATCHED,
    MATCHED,
    MIN_CONFUSION,
    NO_OP,
    Condition,
    anchor_edges,
    conditions,
)
from interp.studies.recovery import Baseline
from interp.studies.result import Finding, Result, difference, percent, rate
from interp.studies.split import Progress, Split

TITLE = "Correct neighbours cause it"


def knockout(base: Baseline, *, seed: int = 0, on_batch: Progress | None = None) -> Result:
    """Run the protocol with every control, by windows of layers, and probe-free."""
    test = base.test
    queries, anchors = anchor_edges(base)
    if not queries.any():
        raise Untestable(
            f"no token of {test.name} is taken for a conflicting class and has an anchor: no class "
            f"pair is confused at least {MIN_CONFUSION:.0%} both ways, so there is nothing to cut"
        )
    curves, effects = [], []
    llm = [stage for stage in base.bank.stages if stage.startswith("blocks.")]
    right: dict[str, np.ndarray] = {}
    shares: dict[str, Interval] = {}
    figures: dict[str, Interval] = {}
    clean = base.right(base.readout)
    for condition in conditions(base, queries, anchors, seed):
        found = _verdicts(base, condition, llm, None, on_batch)
        right[condition.name] = found[base.readout]
        curves += _curve(base, condition, found, queries, seed, probe_free=False)
        if condition.edges is None:
            continue
        share = share_gone(test, clean, found[base.readout], queries, seed)
        shares[condition.name] = share
        effects.append(_effect(condition, "all", share, queries))
        if condition.name == ANCHORS:
            anchored = condition
        elif (clean & condition.complete).any():
            figures[f"knockout_beyond {condition.name}"] = _beyond(
                clean, right[ANCHORS], right[condition.name], condition.complete, seed
            )
    for window in windows(test.model.cfg.n_layers):
        cut = _verdicts(base, anchored, [base.readout], window, on_batch)[base.readout]
        share = share_gone(test, clean, cut, queries, seed)
        name = f"{window[0]}" if len(window) == 1 else f"{window[0]}-{window[-1]}"
        effects.append(_effect(anchored, name, share, queries))
    if test.marks is not None:
        free_curves, free_figures = _probe_free(base, llm, seed, on_batch)
        curves += free_curves
        figures |= free_figures
    figures["knockout_accuracy_change"] = difference(
        test.counts(right[ANCHORS], queries), test.counts(clean, queries), seed
    )
    beaten = {
        key: interval.low > 0
        for key, interval in figures.items()
        if key.startswith("knockout_beyond ") and not key.endswith(NO_OP)
    }
    holds = shares[ANCHORS].low > 0 and bool(beaten) and all(beaten.values())
    text = (
        f"Of {int(queries.sum())} misclassified tokens, {int((clean & queries).sum())} are right "
        f"at the end. Cutting what they read from the correct tokens of their region takes "
        f"{percent(shares[ANCHORS])} of that away; as many random edges {percent(shares[MATCHED])}"
        f", random edges with as much attention {percent(shares[MASS_MATCHED])}. It beats "
        f"{sum(beaten.values())} of {len(beaten)} controls."
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


def passes(model: MLLM, marks: bool) -> int:
    """How often `knockout` goes over the test images, for a progress bar."""
    return 8 + len(windows(model.cfg.n_layers)) + (3 if marks else 0)


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
    clean: np.ndarray, cut: np.ndarray, control: np.ndarray, queries: np.ndarray, seed: int
) -> Interval:
    """Share gone beyond the control's, paired, on queries for which the control is complete."""
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
    row = {
        "condition": condition.name,
        "probe_free": probe_free,
        "layers": "all",
        "n_tokens": int(queries.sum()),
        "edges_per_query": condition.n_edges / max(int(queries.sum()), 1),
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


def _effect(
    condition: Condition, layers: str, share: Interval, queries: np.ndarray
) -> dict[str, Any]:
    return {
        "condition": condition.name,
        "layers": layers,
        "is_control": condition.is_control,
        "edges_per_query": condition.n_edges / int(queries.sum()),
        "complete": float(condition.complete.sum() / queries.sum()),
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


def _probe_free(
    base: Baseline, llm: Sequence[str], seed: int, on_batch: Progress | None
) -> tuple[list[dict[str, Any]], dict[str, Interval]]:
    """Marked against unmarked sources; tokens are chosen by what was drawn, not by a probe."""
    test = base.test
    assert test.marks is not None
    marked, unmarked = test.marks[:, None, :], ~test.marks[:, None, :]
    reach = test.same_region & test.visible & ~test.marks[:, :, None]
    from_marked, from_unmarked = reach & marked, reach & unmarked
    enough = (from_marked.sum(2) > 0) & (from_unmarked.sum(2) >= from_marked.sum(2))
    queries = enough & (test.purity == 1) & test.labelled
    cut = test.edges(from_marked & queries[:, :, None])
    pools = test.edges(from_unmarked & queries[:, :, None])
    control = [
        edges.random_like(pool, seed=seed + i)
        for i, (edges, pool) in enumerate(zip(cut, pools, strict=True))
    ]
    curves, right = [], {}
    for condition in (
        Condition("clean", None, False, queries),
        Condition("marked -> unmarked", cut, False, queries),
        Condition("unmarked -> unmarked", control, True, queries),
    ):
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
