"""Which heads carry the recovery, and from which tokens they read it.

For every token that the probe at the reference stage gets wrong, the margin at the end (true class
minus the class it was confused with) is split into what each head read from which group of source
tokens, what the MLPs wrote, and what was there at the start (`interp.attribution.direct`, exact).
Averaged over tokens that gives each head's share of the recovery.

A large share is a claim, not yet evidence. So heads are *ranked* on the first half of the
images, by what they read from the correct tokens of a region, and *tested* on the second half: the
anchor edges of the knockout study are cut in the top heads alone, against as many of the other
heads (several draws, pooled: their interval is over images, not over draws).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from interp.attribution.asking import ask
from interp.attribution.direct import DirectAttribution, direct
from interp.attribution.sources import REGION as GROUPS
from interp.edges import EdgeSet
from interp.edits import Knockout, MaskEdit
from interp.errors import Untestable
from interp.stats import Interval, bootstrap, ratio
from interp.studies.conditions import anchor_edges
from interp.studies.knockout import share_gone
from interp.studies.recovery import Baseline
from interp.studies.result import Finding, Result, percent
from interp.studies.split import Progress

TITLE = "A few heads carry it"
N_TOP = 4
N_DRAWS = 10
SIZES = (1, 2, N_TOP, 2 * N_TOP)  # sets of top heads that are cut; all heads come on top

Head = tuple[int, int]  # layer, head


def heads(base: Baseline, *, seed: int = 0, on_batch: Progress | None = None) -> Result:
    """Attribute the recovery to heads, then knock the top ones out."""
    parts = _attribute(base, on_batch)
    counts = base.wrong(base.reference).sum(1)
    change = _sums(parts.change, counts)
    per_head = _sums(parts.heads, counts)  # [image, layer, head, group]

    first_half = np.arange(len(counts)) < len(counts) // 2
    score = per_head[first_half][..., GROUPS.index("same-region correct")].sum(0)
    if score.size < 2 * N_TOP:
        raise Untestable(f"the model has {score.size} heads, and the study needs {2 * N_TOP}")
    ranked = [
        (int(i) // score.shape[1], int(i) % score.shape[1])
        for i in np.argsort(-score, axis=None, kind="stable")
    ]
    tables = {
        "heads": _heads_table(per_head, counts, change, seed),
        "head_totals": _totals_table(per_head, counts, change, ranked, seed),
        "components": _components_table(parts, counts, seed),
    }
    table, top, control, beyond = _cut_heads(base, ranked, first_half, seed, on_batch)
    tables["head_knockout"] = table
    second = ~first_half
    top_share = bootstrap(ratio, _over(per_head[second], ranked[:N_TOP]), change[second], seed=seed)
    holds = top.low > 0 and beyond.low > 0
    n = score.size
    text = (
        f"The top {N_TOP} of {n} heads write {percent(top_share)} of the margin's change of "
        f"misclassified tokens; cutting the anchors' edges in them alone removes {percent(top)} of "
        f"the recovery, in {N_TOP} other heads {percent(control)}."
    )
    finding = Finding(TITLE, top, control, f"{N_TOP} other heads", holds, text, unit="share")
    figures = {"top_heads_margin_share": top_share, "heads_beyond_others": beyond}
    return Result(finding, tables, figures)


def passes() -> int:
    """How often `heads` goes over the test images: attribution, top sets, random sets."""
    return 1 + len(SIZES) + 1 + N_DRAWS


def _attribute(base: Baseline, on_batch: Progress | None) -> DirectAttribution:
    """Direct attribution of the wrong tokens of the test split, a mean over each image's."""
    test = base.test
    asked = ask(
        test.model,
        test.batches,
        base.bank,
        labels=test.labels,
        start=base.reference,
        end=base.readout,
        sources="region",
    )
    return direct(asked, on_images=on_batch)


def _sums(means: torch.Tensor, counts: np.ndarray) -> np.ndarray:
    """Means over each image's tokens as sums over them; 0 for an image without any."""
    return np.nan_to_num(means.numpy()) * counts.reshape(-1, *[1] * (means.ndim - 1))


def _over(per_head: np.ndarray, chosen: Sequence[Head]) -> np.ndarray:
    layers, numbers = zip(*chosen, strict=True)
    return np.asarray(per_head[:, list(layers), list(numbers)].sum((1, 2)))


def _heads_table(
    per_head: np.ndarray, counts: np.ndarray, change: np.ndarray, seed: int
) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for layer, head, group in np.ndindex(per_head.shape[1:]):
        sums = per_head[:, layer, head, group]
        mean = bootstrap(ratio, sums, counts, seed=seed)
        rows.append(
            {
                "layer": layer,
                "head": head,
                "source": GROUPS[group],
                **mean.as_dict(),
                "share": sums.sum() / change.sum(),
            }
        )
    return pd.DataFrame(rows)


def _totals_table(
    per_head: np.ndarray,
    counts: np.ndarray,
    change: np.ndarray,
    ranked: Sequence[Head],
    seed: int,
) -> pd.DataFrame:
    rows = []
    for rank, (layer, head) in enumerate(ranked):
        sums = per_head[:, layer, head].sum(1)
        mean = bootstrap(ratio, sums, counts, seed=seed)
        share = sums.sum() / change.sum()
        rows.append({"layer": layer, "head": head, **mean.as_dict(), "share": share, "rank": rank})
    return pd.DataFrame(rows)


def _components_table(parts: DirectAttribution, counts: np.ndarray, seed: int) -> pd.DataFrame:
    """Start, every attention (with its bias), every MLP, deepstack, and their sum, the margin."""
    sums = {"start": parts.start}
    for layer in range(parts.mlps.shape[1]):
        sums[f"attention {layer}"] = parts.heads[:, layer].sum((1, 2)) + parts.biases[:, layer]
        sums[f"mlp {layer}"] = parts.mlps[:, layer]
        if (parts.rest[:, layer].nan_to_num() != 0).any():
            sums[f"deepstack {layer}"] = parts.rest[:, layer]
    sums["margin"] = parts.target
    rows = []
    for name, values in sums.items():
        mean = bootstrap(ratio, _sums(values, counts), counts, seed=seed)
        rows.append({"component": name, **mean.as_dict()})
    return pd.DataFrame(rows)


def _cut_heads(
    base: Baseline,
    ranked: Sequence[Head],
    first_half: np.ndarray,
    seed: int,
    on_batch: Progress | None,
) -> tuple[pd.DataFrame, Interval, Interval, Interval]:
    """Cut the anchor edges in the top heads and in random ones; second half of the images."""
    test, rng = base.test, np.random.default_rng(seed)
    queries, anchors = anchor_edges(base)
    queries = queries & ~first_half[:, None]
    edges = test.edges(anchors & queries[:, :, None])
    clean = base.right(base.readout)

    def cut(chosen: Sequence[Head]) -> np.ndarray:
        said = base.reread(lambda number: _edits(edges[number], chosen), on_batch=on_batch)
        return base.hits(said[base.readout])

    def share(right: np.ndarray) -> Interval:
        return share_gone(test, clean, right, queries, seed)

    rows = []
    for n in (*SIZES, len(ranked)):
        if n < len(ranked) or n not in SIZES:
            name = "all heads" if n == len(ranked) else f"top {n}"
            right = cut(ranked[:n])
            if n == N_TOP:
                top = right
            rows.append({"set": name, "n_heads": n, "measure": "share", **share(right).as_dict()})
    others = ranked[N_TOP:]
    drawn = [
        cut([others[i] for i in rng.choice(len(others), N_TOP, replace=False)])
        for _ in range(N_DRAWS)
    ]
    # draws are pooled per image, so an image's weight covers all draws of it
    kept = sum((right & queries).sum(1) for right in drawn)
    all_ = (clean & queries).sum(1)
    control = bootstrap(lambda k, a: 1 - ratio(k, N_DRAWS * a), kept, all_, seed=seed)
    beyond = bootstrap(
        lambda t, k, a: ratio(k / N_DRAWS - t, a), (top & queries).sum(1), kept, all_, seed=seed
    )
    name = f"{N_TOP} other heads ({N_DRAWS} draws)"
    rows.append({"set": name, "n_heads": N_TOP, "measure": "share", **control.as_dict()})
    return pd.DataFrame(rows), share(top), control, beyond


def _edits(edges: EdgeSet, chosen: Sequence[Head]) -> list[MaskEdit]:
    """One knockout a layer, in the chosen heads of that layer."""
    if not len(edges):
        return []
    layers = sorted({layer for layer, _ in chosen})
    return [
        Knockout(edges, layers=layer, heads=[h for at, h in chosen if at == layer])
        for layer in layers
    ]
