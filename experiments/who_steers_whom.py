"""Who steers whom in one picture: the attention edges that pull its misclassified tokens right.

Gradients rank every edge (token to token, in one head); the strongest are then cut one by one, and
drawn over the picture by what the true class's margin really loses. Blue arrows pull right.
"""

from pathlib import Path
from typing import Any

import typer

from interp import MLLM
from interp.attribution import head_attribution, verify_edges
from interp.datasets import scenes
from interp.studies import Split
from interp.threads import suit_threads

START = "adapter.hook_out"


def main(
    model: str = "tiny", image: int = 0, n: int = 12, out: Path = Path("who_steers_whom.html")
) -> None:
    vlm, question = MLLM.load(model), "What is in the picture?"
    suit_threads(vlm)
    probe = Split.prepare(vlm, scenes("probe"), 100, question, batch_size=20)
    bank = probe.fit([START, vlm.stages[-1]])

    scene = scenes("test")[image]
    x = vlm.prepare(scene.image, question)
    labels = x.grid.labels(scene.mask, len(scenes("test").classes))
    asked: dict[str, Any] = {"labels": labels, "start": START}
    table = head_attribution(vlm, x, bank, method="gradient", edges=n, **asked)
    table = verify_edges(table, vlm, x, bank, n=n, **asked)

    print(table)
    columns = ["layer", "head", "src", "dst", "screened", "estimate"]
    assert table.edges is not None
    print(table.edges[columns].round(4).to_string(index=False))
    table.edges_on(0, scene.image, n=n).write_html(out)
    print(f"drawn in {out}")


if __name__ == "__main__":
    typer.run(main)
