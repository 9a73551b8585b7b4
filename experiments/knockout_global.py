"""Knockout: do tokens recover if they may not look at their neighbours that are right already?

A probe at the adapter calls image tokens right or wrong. For the wrong ones, the attention edges
from the right tokens of their region are cut in all layers; as many random edges are the control.
"""

import pandas as pd
import typer

from interp import MLLM, Knockout
from interp.datasets import scenes
from interp.studies import Split
from interp.studies.conditions import anchor_edges
from interp.studies.recovery import Baseline
from interp.studies.result import rate


def main(model: str = "tiny", n: int = 60, seed: int = 0, remote: str = "") -> None:
    vlm, ask = MLLM.load(model, remote=remote), "What is in the picture?"
    probe, test = (Split.prepare(vlm, scenes(s), n, ask, batch_size=20) for s in ("probe", "test"))
    base = Baseline.fit(probe, test)
    queries, anchors = anchor_edges(base)  # [image, token], [image, dst, src]
    others = queries[:, :, None] & test.visible & ~anchors
    anchors &= (others.sum(2) >= anchors.sum(2))[:, :, None]  # what a control can match
    if not (queries := queries & anchors.any(2)).any():
        raise SystemExit("nothing to cut: no right token beside a wrong one; try a larger --n")
    cut, pools = test.edges(anchors), test.edges(others)  # one EdgeSet a batch
    control = [edges.random_like(pool, seed=seed) for edges, pool in zip(cut, pools)]
    none, shares = [edges - edges for edges in cut], {}
    for name, sets in {"none": none, "right -> wrong": cut, "as many random": control}.items():
        edits = [[Knockout(edges)] if len(edges) else [] for edges in sets]
        right = base.hits(base.reread(edits.__getitem__)[base.readout])
        shares[name] = f"{rate(test.counts(right, queries), seed):.0%}"
    print(f"Right at the end, of {queries.sum()} wrong tokens, by the edges cut in all layers:")
    print(pd.Series(shares).to_string())


if __name__ == "__main__":
    typer.run(main)
