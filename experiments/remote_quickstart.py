"""A first run on a server: the last token's states with the picture in sight and without.

In another terminal: `interp serve tiny --port 5001`. Here: export the NDIF_API_KEY line it printed.
"""

import typer

from interp import MLLM, Knockout
from interp.datasets import scenes


def main(model: str = "tiny", remote: str = "http://127.0.0.1:5001") -> None:
    vlm = MLLM.load(model, remote=remote)  # its weights stay on the server
    x = vlm.prepare(scenes("test")[0].image, "What is in the picture?")
    where = "blocks.*.hook_resid_post"
    seeing = vlm.run(x, read=where, keep=lambda state, hook: state[:, -1])  # cut there, then sent
    cut = Knockout(x.edges(src="image", dst="last"), layers=range(1, 4))
    blind = vlm.run(x, cut, read=where, keep=lambda state, hook: state[:, -1])
    print(blind.receipts)  # edges cut, and the attention they carried
    for name in seeing:
        moved = (blind[name] - seeing[name]).norm() / seeing[name].norm()
        print(f"{name:<26}{list(seeing[name].shape)}  moved by {moved:.0%}")
    best = [run.logits[0, -1].argmax() for run in (seeing, blind) if run.logits is not None]
    print("next token, seeing and blind:", *map(vlm.tokenizer.decode, best))
    print(vlm.host.traffic)


if __name__ == "__main__":
    typer.run(main)
