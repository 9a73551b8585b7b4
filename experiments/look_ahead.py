"""Bidirectional attention by degrees: image tokens see 0 rows ahead (causal), 1, 2, 4, and all.

Points of accuracy at the end that this adds; linear probes are fitted anew under each mask.
"""

import numpy as np
import pandas as pd
import typer

from interp import MLLM, Unmask
from interp.datasets import scenes
from interp.studies import Split
from interp.studies.bidirectional import THIRDS, thirds
from interp.studies.result import difference, points


def main(model: str = "tiny", n: int = 60, seed: int = 0, remote: str = "") -> None:
    vlm, ask = MLLM.load(model, remote=remote), "What is in the picture?"
    probe, test = (Split.prepare(vlm, scenes(s), n, ask, batch_size=20) for s in ("probe", "test"))
    row, end = np.arange(test.n_tokens) // test.shape[1], vlm.stages[-1]
    groups = {name: test.labelled & (thirds(test) == i) for i, name in enumerate(THIRDS)}
    hits, table = [], pd.DataFrame()
    for rows in sorted({min(n_rows, row[-1]) for n_rows in (0, 1, 2, 4, row[-1])}):
        edits = []
        for split in (probe, test):
            sees = np.tile(row <= row[:, None] + rows, (len(split), 1, 1))  # [image, dst, src]
            edits.append([[Unmask(edges)] if rows else [] for edges in split.edges(sees)])
        bank = probe.fit([end], edits[0].__getitem__)
        hits.append(test.judge(bank, edits[1].__getitem__)[end] == test.labels)
        for name, among in {"all": test.labelled, **groups}.items():
            gain = difference(test.counts(hits[-1], among), test.counts(hits[0], among), seed)
            table.loc[f"{rows} rows ahead", name] = points(gain)
    print(table.to_string())


if __name__ == "__main__":
    typer.run(main)
