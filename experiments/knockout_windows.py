"""Where tokens are corrected: the knockout of `knockout_global.py` by windows of layers, by head.

Each cell cuts the edges from right tokens to the wrong ones of their region in those layers only,
or in that head only, and shows which share of the wrong tokens' recovery is gone.
"""

import pandas as pd
import typer

from interp import MLLM, Knockout
from interp.datasets import scenes
from interp.edits.base import window
from interp.studies import Split
from interp.studies.conditions import anchor_edges
from interp.studies.knockout import share_gone
from interp.studies.recovery import Baseline


def main(model: str = "tiny", n: int = 60, seed: int = 0, remote: str = "") -> None:
    vlm, ask = MLLM.load(model, remote=remote), "What is in the picture?"
    probe, test = (Split.prepare(vlm, scenes(s), n, ask, batch_size=20) for s in ("probe", "test"))
    base = Baseline.fit(probe, test)
    queries, anchors = anchor_edges(base)  # [image, token], [image, dst, src]
    edges, layers = test.edges(anchors), range(vlm.cfg.n_layers)  # one EdgeSet a batch

    def gone(where: range, head: int | None = None) -> str:
        known = [layer for layer in where if layer in layers]  # the last windows are cut off
        edits = [[Knockout(one, known, head)] if len(one) else [] for one in edges]
        right = base.hits(base.reread(edits.__getitem__)[base.readout])
        return f"{share_gone(test, base.right(base.readout), right, queries, seed):.0%}"

    table = {f"{wide} around": [gone(window(at, wide)) for at in layers] for wide in (1, 3, 5)}
    for head in range(vlm.cfg.n_heads):
        table[f"head {head}"] = [gone(window(at, 1), head) for at in layers]
    print(pd.DataFrame(table, index=[f"layer {at}" for at in layers]).T.to_string())


if __name__ == "__main__":
    typer.run(main)
