"""The head study that the benchmark times, and the two loops that a user would write for it.

The question is asked of one image at a time: how much of the margin (true class minus confused
one, mean over the queries) at the end is gone if this head no longer reads the anchors? *Queries*
are image tokens that the probe at the start gets wrong, *anchors* the earlier tokens of a query's
region that it gets right, and *heads* all those before the reading, which is halfway through the
language model.

The pictures have something to read: six regions around random points, each in one of ten colours,
and a tenth of the patches in the colour of another class. The probes are fitted on pictures of
their own. Weights are random, so probes are poor and more tokens are wrong than painted wrong; of
those `QUERIES` are asked about.

| loop | what it does for each head |
|---|---|
| `by_bridge` | a whole forward of TransformerBridge, the edges set to -inf in its scores |
| `by_bridge(..., stop=True)` | the same with `stop_at_layer`, which not every user knows |
| `by_nnsight` | a whole trace of a plain module (SDPA), the edges closed in its mask |

Each gives `[layer, head]`: margin of the clean run minus margin with the edges cut in that head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peers import PATCH, Bench, text_blocks
from PIL import Image
from torch import Tensor

from interp import MLLM, ProbeBank
from interp.attribution.targets import ProbeMargin
from interp.inputs import Inputs

START = "adapter.hook_out"
N_CLASSES, QUERIES = 10, 48
PAINTED_WRONG = 0.1


@dataclass(frozen=True, eq=False)
class Case:
    """One image, and the question about it in plain tensors.

    Attributes:
        x: the prepared image, a batch of one.
        labels: `[n_tokens]` class of each image token.
        target: the margin, in this library's words.
        end: where it is read.
        queries: `[n]` positions of the tokens asked about.
        direction, bias: `[n, d_model]` and `[n]` of the margin of each query.
        dst, src: `[n_edges]` positions of all edges from a query's anchors to it.
    """

    x: Inputs
    labels: np.ndarray
    target: ProbeMargin
    end: str
    queries: Tensor
    direction: Tensor
    bias: Tensor
    dst: Tensor
    src: Tensor

    @property
    def layers(self) -> range:
        """The blocks whose heads are asked about."""
        return range(int(self.end.split(".")[1]) + 1)

    def margin(self, state: Tensor) -> Tensor:
        """The target, given the stream at the end, `[1, pos, d_model]`."""
        state = state[0, self.queries].to(self.direction.dtype)
        return ((state * self.direction).sum(-1) + self.bias).mean()


# -- the study's input -----------------------------------------------------------------------------


def half_way(model: MLLM) -> str:
    """The stream in the middle of the language model."""
    return f"blocks.{max(1, model.cfg.n_layers // 2) - 1}.hook_resid_post"


def cases(
    model: MLLM, prompt: str, side: int, n_images: int, *, n_probe: int = 24
) -> tuple[list[Case], ProbeBank]:
    """Images and frozen probes at the start and the end.

    Args:
        model: a loaded model.
        prompt: a text with one image placeholder.
        side: of the picture, in patches.
        n_images: how many.
        n_probe: how many other pictures the probes are fitted on.

    Raises:
        RuntimeError: too few pictures with a wrong token that has an anchor.
    """
    end = half_way(model)
    stages = (START, end)

    def shown(seed: int) -> tuple[Inputs, np.ndarray, dict[str, Tensor]]:
        picture, labels = scene(side, seed)
        x = model.prepare(picture, prompt)
        x = replace(x, tensors=model.to_device(x))  # no run pays for moving its inputs
        run = model.run(x, read=list(stages), logits=False)
        return x, labels, {name: run.tokens(name)[0] for name in stages}

    seen = [shown(10_000 + i) for i in range(n_probe)]
    features = {name: torch.cat([states[name] for _, _, states in seen]) for name in stages}
    known = torch.from_numpy(np.concatenate([labels for _, labels, _ in seen]))
    names = [f"class {i}" for i in range(N_CLASSES)]
    bank = ProbeBank.fit(features, known, names, C=1e-3).to(model.device)
    made: list[Case] = []
    for seed in range(10 * n_images):
        x, labels, states = shown(seed)
        case = _case(x, labels, bank.predict(START, states[START]).cpu().numpy(), bank, end)
        made += [case] if case is not None else []
        if len(made) == n_images:
            return made, bank
    raise RuntimeError(f"only {len(made)} of {10 * n_images} pictures have an edge to cut")


def scene(side: int, seed: int) -> tuple[Image.Image, np.ndarray]:
    """A picture of `side` x `side` patches in six regions, and the class of each patch."""
    rng = np.random.default_rng(seed)
    n_regions = max(2, side // 4)
    centres = rng.random((n_regions, 2)) * side
    classes = rng.choice(N_CLASSES, n_regions)
    cells = np.stack(np.divmod(np.arange(side**2), side), 1) + 0.5
    labels = classes[((cells[:, None] - centres) ** 2).sum(-1).argmin(1)]
    painted = labels.copy()
    off = rng.choice(side**2, max(4, round(PAINTED_WRONG * side**2)), replace=False)
    painted[off] = (labels[off] + rng.integers(1, N_CLASSES, len(off))) % N_CLASSES
    colours = np.random.default_rng(0).integers(0, 256, (N_CLASSES, 3))
    flat = colours[painted].reshape(side, 1, side, 1, 3)
    pixels = flat + rng.normal(0, 40, (side, PATCH, side, PATCH, 3))
    pixels = pixels.clip(0, 255).astype(np.uint8).reshape(side * PATCH, side * PATCH, 3)
    return Image.fromarray(pixels), labels


def _case(
    x: Inputs, labels: np.ndarray, said: np.ndarray, bank: ProbeBank, end: str
) -> Case | None:
    """The question in tensors, from labels and verdicts alone; None if no token can be asked."""
    regions = x.grid.regions(labels)
    token = np.arange(len(labels))
    right = said == labels
    anchors = right & (regions == regions[:, None]) & (token < token[:, None])  # [dst, src]
    askable = np.flatnonzero(~right & anchors.any(1))
    if not len(askable):
        return None
    rng = np.random.default_rng(0)
    asked = np.sort(rng.permutation(askable)[:QUERIES])
    true, confused = torch.from_numpy(labels[asked]), torch.from_numpy(said[asked])
    dst, src = np.nonzero(anchors & np.isin(token, asked)[:, None])
    position = torch.from_numpy(x.grid.position).to(bank.weight(end).device)
    return Case(
        x=x,
        labels=labels,
        target=ProbeMargin(bank, end, np.isin(token, asked), labels, said),
        end=end,
        queries=position[asked],
        direction=bank.direction(end, true, confused),
        bias=bank.bias(end, true, confused),
        dst=position[dst],
        src=position[src],
    )


# -- the loops -------------------------------------------------------------------------------------


def by_bridge(b: Bench, case: Case, *, stop: bool = False) -> Tensor:
    """A forward of TransformerBridge a head, whole or stopped after the reading."""
    rest: dict[str, Any] = dict(case.x.tensors)
    ids = rest.pop("input_ids")
    if stop:
        rest["stop_at_layer"] = case.layers.stop

    def margin(hooks: list[tuple[str, Callable[..., Any]]]) -> Tensor:
        kept: list[Tensor] = []
        read = (case.end, lambda state, hook: kept.append(case.margin(state)))
        with torch.no_grad():
            b.bridge.run_with_hooks(ids, fwd_hooks=[*hooks, read], **rest)
        return kept[0]

    def cut(layer: int, head: int) -> Tensor:
        def close(scores: Tensor, hook: Any) -> Tensor:
            scores[:, head, case.dst, case.src] = -torch.inf
            return scores

        return margin([(f"blocks.{layer}.attn.hook_attn_scores", close)])

    return _minus(margin([]), cut, case, b.n_heads)


def by_nnsight(b: Bench, case: Case) -> Tensor:
    """A trace a head of a plain module under `nnsight.NNsight`."""
    blocks = text_blocks(b.traced)
    n_pos = case.x.n_pos

    def closed(mask: Tensor | None, head: int) -> Tensor:
        if mask is None:  # causal by SDPA's flag
            mask = torch.ones(n_pos, n_pos, dtype=torch.bool, device=case.dst.device).tril()[None]
        mask = mask.expand(1, b.n_heads, n_pos, n_pos).clone()
        mask[:, head, case.dst, case.src] = False
        return mask

    def margin(layer: int | None = None, head: int = 0) -> Tensor:
        out: dict[str, Tensor] = {}
        with torch.no_grad(), b.traced.trace(**case.x.tensors, use_cache=False):
            if layer is not None:
                args, kwargs = blocks[layer].self_attn.inputs
                mask = closed(kwargs["attention_mask"], head)
                blocks[layer].self_attn.inputs = (args, {**kwargs, "attention_mask": mask})
            out["margin"] = case.margin(blocks[case.layers[-1]].output)
        return out["margin"]

    return _minus(margin(), margin, case, b.n_heads)


def _minus(clean: Tensor, cut: Callable[[int, int], Tensor], case: Case, n_heads: int) -> Tensor:
    rows = [torch.stack([clean - cut(i, head) for head in range(n_heads)]) for i in case.layers]
    return torch.stack(rows).cpu()
