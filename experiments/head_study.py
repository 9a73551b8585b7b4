"""Which heads carry the recovery, asked in every way: the whole study, on any model.

What it will cost; three methods and how far they agree; gradients with the top ones verified; which
head works through which; the fewest heads that carry most of it, judged on pictures of their own.
Heads are judged by what they read from right tokens of the same region.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import typer

from interp import MLLM
from interp.attribution import attribute, head_attribution, minimal_heads, path_attribution
from interp.datasets import scenes
from interp.studies import Split
from interp.threads import suit_threads


def main(
    model: str = "tiny", n: int = 40, seed: int = 0, out: Path | None = None, remote: str = ""
) -> None:
    vlm, ask = MLLM.load(model, remote=remote), "What is in the picture?"
    suit_threads(vlm)
    probe = Split.prepare(vlm, scenes("probe"), 200, ask, batch_size=20)
    few = max(1, min(10, n // 2))  # two batches at least: the second half is held out
    test = Split.prepare(vlm, scenes("test"), n, ask, batch_size=few)
    stages = ["adapter.hook_out", vlm.stages[-1]]
    bank = probe.fit(stages)
    study: Any = (vlm, test.batches, bank)
    asked: dict[str, Any] = {"labels": test.labels, "sources": "same-region correct"}
    for method in ("direct", "gradient", "exact"):
        print(f"{method}: {head_attribution(*study, method=method, dry_run=True, **asked)}")
    exact = head_attribution(*study, method="exact", **asked)
    print(exact)

    agree = pd.DataFrame(columns=["Spearman", "top 10"])
    ways: dict[str, Any] = {
        "direct": {"method": "direct"},
        "gradient, softmax linearised": {"corrected": False},
        "gradient": {},
        "gradient, 5 steps": {"steps": 5},
    }
    for name, options in ways.items():
        table = head_attribution(*study, **(options | asked))
        agree.loc[name] = [table.spearman(exact), table.overlap(exact)]
    print("\nAgreement with exact effects\n", agree.round(2).to_string(), "\n")

    print(attribute(*study, budget=0.1, seed=seed, **asked))
    print(path_attribution(*study, labels=test.labels, top=4))
    print(minimal_heads(*study, share=0.8, seed=seed, **asked))
    if out:
        exact.save(out)


if __name__ == "__main__":
    typer.run(main)
