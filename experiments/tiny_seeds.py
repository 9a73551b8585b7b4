"""The four claims on folders of trained models, with plain transformers: the card's table.

    python experiments/tiny_seeds.py DIR [DIR ...]

A second, independent look at what `interp study` measures: it uses the library's probes and
bootstrap, but runs the models through stock transformers with 4D masks of its own, so it needs
none of the library's hooks. One linear probe a stage is fitted on the probe scenes and judged on
the test scenes, a patch labelled by its majority class:

- *drop*: accuracy at the projector's output minus that at the encoder's layer it reads;
- *recovery*: accuracy after the last block minus that at the projector's output;
- *knockout*: accuracy after the last block of the patches that are wrong at the projector, when
  nothing is cut, when their edges from earlier right patches of the same region are cut in all
  layers, and when as many edges from random earlier patches are;
- *marks*: the same without a probe: bare patches of a region, edges from its earlier patches with
  a digit cut, or as many from those without;
- *bidirectional*: accuracy after the last block with image patches seeing each other both ways,
  minus causal, probes refitted; in the picture's early and late third.

All intervals are 95%, bootstrapped over images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_questions as tq
from tiny_model import pixels_of
from train_tiny import encode

from interp.datasets.scenes import CELL, CLASSES, scenes
from interp.probes import ProbeBank
from interp.stats import Interval, bootstrap

T = tq.N_IMAGE
IMAGE = slice(tq.N_PREFIX, tq.N_PREFIX + T)


class Split:
    """Labels, regions and marks of a split's scenes, a row of patches in raster order each."""

    def __init__(self, name: str, n: int, first: int = 0) -> None:
        drawn = list(scenes(name)[first : first + n])
        self.scenes = drawn
        self.pixels = torch.stack([pixels_of(s.image) for s in drawn])
        self.labels = torch.tensor(np.stack([tq.cell_labels(s).ravel() for s in drawn]))
        self.marks = torch.tensor(np.stack([s.marks.ravel() for s in drawn]))
        centre = slice(CELL // 2, None, CELL)
        self.regions = torch.tensor(np.stack([s.regions[centre, centre].ravel() for s in drawn]))


@torch.no_grad()
def states(
    model: LlavaForConditionalGeneration, features: Tensor, prefix: Tensor, seen: Tensor
) -> dict[str, Tensor]:
    """Image tokens at the projector's output and after every block.

    `seen` is [n or 1, T, T], true where the query (row) sees the key among image tokens; the
    text before the image stays as it is.
    """
    kept: dict[str, list[Tensor]] = {}
    current: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[object, object, Tensor], None]:
        def hook(_module: object, _inputs: object, output: Tensor) -> None:
            current[name] = output

        return hook

    layers = model.model.language_model.layers
    handles = [block.register_forward_hook(keep(f"block {i}")) for i, block in enumerate(layers)]
    n_all = IMAGE.stop
    for at in range(0, len(features), 100):
        part = features[at : at + 100]
        image = model.model.multi_modal_projector(part)
        before = model.get_input_embeddings()(prefix).expand(len(part), -1, -1)
        mask = torch.ones(n_all, n_all).tril().bool().repeat(len(part), 1, 1, 1)
        mask[:, 0, IMAGE, IMAGE] = seen[at : at + 100] if len(seen) > 1 else seen
        model.model.language_model(
            inputs_embeds=torch.cat([before, image], 1), attention_mask=mask, use_cache=False
        )
        kept.setdefault("projector", []).append(image)
        for name, state in current.items():
            kept.setdefault(name, []).append(state[:, IMAGE])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


def random_edges(like: Tensor, allowed: Tensor, rng: torch.Generator) -> Tensor:
    """[n, T, T] random edges out of `allowed`: for each query as many as in `like`, or all."""
    score = torch.rand(like.shape, generator=rng).masked_fill(~allowed, -1.0)
    rank = score.argsort(-1, descending=True).argsort(-1)
    return (rank < like.sum(-1, keepdim=True)) & allowed


def rate(right: Tensor, among: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Per image: how many of the patches `among` are right, and how many there are."""
    return (right & among).sum(1).numpy(), among.sum(1).numpy()


def difference(a: Tensor, b: Tensor, among: Tensor) -> Interval:
    """Accuracy `a` minus accuracy `b` on the same patches."""
    (top, n), (bottom, _) = rate(a, among), rate(b, among)
    return bootstrap(lambda x, y, m: (x - y) / m, top, bottom, n)


def share(right: Tensor, among: Tensor) -> float:
    return right[among].float().mean().item()


def report(folder: Path, probe: Split, test: Split) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prefix = torch.tensor(tokenizer.encode(tq.PREFIX))
    rng = torch.Generator().manual_seed(0)
    causal = torch.ones(1, T, T).tril().bool()
    fit_on = encode(model.model.vision_tower, probe.pixels)
    read = encode(model.model.vision_tower, test.pixels)

    def bank_of(features: dict[str, Tensor]) -> ProbeBank:
        flat = {name: x.flatten(0, 1) for name, x in features.items()}
        return ProbeBank.fit(flat, probe.labels.flatten(), CLASSES)

    bank = bank_of({"read": fit_on, **states(model, fit_on, prefix, causal)})
    clean = {"read": read, **states(model, read, prefix, causal)}
    right = {name: bank.predict(name, x) == test.labels for name, x in clean.items()}
    last = bank.stages[-1]
    everywhere = torch.ones_like(test.marks)
    accuracies = "  ".join(f"{name} {share(r, everywhere):.3f}" for name, r in right.items())
    print(f"\n{folder}\naccuracy       {accuracies}")
    print(f"drop           {difference(right['projector'], right['read'], everywhere):+.3f}")
    print(f"recovery       {difference(right[last], right['projector'], everywhere):+.3f}")

    def when_cut(edges: Tensor) -> Tensor:
        return bank.predict(last, states(model, read, prefix, causal & ~edges)[last]) == test.labels

    earlier = causal & ~torch.eye(T, dtype=torch.bool)
    same = earlier & (test.regions[:, :, None] == test.regions[:, None, :])
    same &= test.labels[:, :, None] == test.labels[:, None, :]
    wrong = ~right["projector"]
    anchors = same & wrong[:, :, None] & right["projector"][:, None, :]
    bare = same & ~test.marks[:, :, None]
    from_marks = bare & test.marks[:, None, :]
    cases = {
        "knockout": (anchors, random_edges(anchors, earlier.expand_as(anchors), rng), wrong),
        "marks": (
            from_marks, random_edges(from_marks, bare & ~test.marks[:, None, :], rng), everywhere,
        ),
    }  # fmt: skip
    for name, (edges, control, among) in cases.items():
        hit = edges.any(-1) & among
        cut, instead = when_cut(edges), when_cut(control)
        print(
            f"{name:14} clean {share(right[last], hit):.3f}  cut {share(cut, hit):.3f}"
            f"  control {share(instead, hit):.3f}"
            f"  cut - control {difference(cut, instead, hit):+.3f}  ({int(hit.sum())} patches)"
        )

    both = torch.ones_like(causal)
    opened = bank_of(states(model, fit_on, prefix, both))
    now = opened.predict(last, states(model, read, prefix, both)[last]) == test.labels
    third = torch.arange(T).expand_as(test.labels) * 3 // T
    for name, among in {
        "all": everywhere,
        "early third": third == 0,
        "late third": third == 2,
    }.items():
        print(f"bidirectional  {name}: {difference(now, right[last], among):+.3f}")
    counts = [rate(r, among) for among in (third == 0, third == 2) for r in (now, right[last])]
    (a, n), (b, _), (c, m), (d, _) = counts
    gap = bootstrap(lambda a, b, n, c, d, m: (a - b) / n - (c - d) / m, a, b, n, c, d, m)
    print(f"bidirectional  early minus late: {gap:+.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="The four claims on folders of trained models.")
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--probe-scenes", type=int, default=500)
    parser.add_argument("--test-scenes", type=int, default=300)
    parser.add_argument("--test-from", type=int, default=0, help="first test scene")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    probe, test = Split("probe", args.probe_scenes), Split("test", args.test_scenes, args.test_from)
    for folder in args.folders:
        report(folder, probe, test)


if __name__ == "__main__":
    main()
