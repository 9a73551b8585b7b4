"""The reference for attribution: plain transformers, float64, and an attention written out here.

`Plain` is another copy of a case's random weights, which `interp` never touches, on transformers'
eager masks. Its norms are in float64 too, and its language model's attention is the function
`_attend` below: scores, softmax, mean, as in a textbook, with what the tests want to do to it:

* `cut`: edges whose scores are minus infinity (a row with nothing left writes zeros);
* `gate`: edges whose unnormalised weights are multiplied by a number;
* `add`, `put`: something added to a head's output z, or put in its place;
* `leaf`: z starts a graph, so that `torch.autograd` gives gradients.

What `interp.attribution` calls an effect is a difference of two of these runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from interp import MLLM
from interp.attribution.asking import ask
from interp.attribution.question import Question
from interp.families.base import module_at
from interp.inputs import Inputs
from interp.labels import IGNORE
from interp.probes import ProbeBank
from tests.zoo import ZOO, build, picture

BY_HAND = "attribution_by_hand"
CLASSES = ("sky", "sea", "sand", "dog")
START = "adapter.hook_out"


@dataclass
class Doing:
    """What a run does and what it saw, by layer."""

    cut: Mapping[int, Tensor] = field(default_factory=dict)  # [batch, head, q, k] bool
    gate: Mapping[int, Tensor] = field(default_factory=dict)  # [batch, head, q, k], a factor
    add: Mapping[int, Tensor] = field(default_factory=dict)  # [batch, pos, head, d_head]
    put: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # bool and values
    leaf: int | None = None
    z: dict[int, Tensor] = field(default_factory=dict)
    pattern: dict[int, Tensor] = field(default_factory=dict)  # [batch, head, q, k]
    value: dict[int, Tensor] = field(default_factory=dict)  # [batch, head, k, d_head]
    state: dict[str, Tensor] = field(default_factory=dict)  # by hook name
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any
) -> tuple[Tensor, None]:
    doing, layer = module.__dict__["doing"], module.layer_idx
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * module.scaling
    if (softcap := getattr(module, "attn_logit_softcapping", None)) is not None:
        scores = softcap * torch.tanh(scores / softcap)
    closed = attention_mask < -1.0
    if layer in doing.cut:
        closed = closed | doing.cut[layer]
    if layer in doing.gate:
        scores = scores + doing.gate[layer].log()
    scores = scores.masked_fill(closed, -math.inf)
    pattern = scores.softmax(-1).nan_to_num(0.0)
    z = (pattern @ value).transpose(1, 2)  # [batch, pos, head, d_head]
    if layer in doing.add:
        z = z + doing.add[layer]
    if layer in doing.put:
        at, values = doing.put[layer]
        z = torch.where(at, values, z)
    if doing.leaf == layer:
        z = z.detach().requires_grad_()
    doing.z[layer], doing.pattern[layer], doing.value[layer] = z, pattern, value
    return z.contiguous(), None


def _norm(norm: Any, offset: float, state: Tensor) -> Tensor:
    """A root mean square norm in float64; transformers' own is in float32."""
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    scale = (state.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return state / scale * (norm.weight + offset)


AttentionInterface.register(BY_HAND, _attend)
AttentionMaskInterface.register(BY_HAND, eager_mask)


class Plain:
    """A case's random weights in plain transformers.

    Args:
        name: of a case in `ZOO`.
        model: the same weights as `interp` has them, asked for names and edited weights only.
    """

    def __init__(self, name: str, model: MLLM) -> None:
        self.module = build(name)[0].double()
        self.module.load_state_dict(model.module.state_dict())
        self.module.requires_grad_(False)
        self.module.set_attn_implementation("eager")
        self.family = model.family
        self.blocks: list[Any] = [*module_at(self.module, model.family.language.blocks).children()]
        for block in self.blocks:
            block.self_attn.config._attn_implementation_internal = BY_HAND
        stack: Any = module_at(self.module, model.family.language.blocks.rpartition(".")[0])
        for norm in stack.modules():
            if type(norm).__name__.endswith("RMSNorm"):
                norm.forward = partial(_norm, norm, model.family.language.names.norm_offset)

    def run(self, x: Inputs, **doing: Any) -> Doing:
        """One pass."""
        made = Doing(**doing)
        handles = []
        for number, block in enumerate(self.blocks):
            block.self_attn.__dict__["doing"] = made
            name = f"blocks.{number}"
            handles += [
                block.register_forward_pre_hook(_keep_given(made.state, f"{name}.hook_resid_pre")),
                block.self_attn.register_forward_hook(_keep(made.state, f"{name}.attn")),
                block.register_forward_hook(_keep(made.state, f"{name}.hook_resid_post")),
            ]
        tensors = {k: v.double() if v.is_floating_point() else v for k, v in x.tensors.items()}
        try:
            with torch.set_grad_enabled(made.leaf is not None or bool(made.gate)):
                made.logits = self.module(**tensors, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return made


def _keep(states: dict[str, Tensor], name: str) -> Any:
    def hook(module: Any, args: Any, out: Any) -> None:
        states[name] = out[0] if isinstance(out, tuple) else out

    return hook


def _keep_given(states: dict[str, Tensor], name: str) -> Any:
    def hook(module: Any, args: Any) -> None:
        states[name] = args[0]

    return hook


@dataclass
class Asked:
    """A question written out token by token, without the library's `ask`.

    Attributes:
        row, position: of the tokens that are wrong at the start.
        true, confused: their classes.
        n: images.
    """

    bank: ProbeBank
    end: str
    row: np.ndarray
    position: np.ndarray
    true: np.ndarray
    confused: np.ndarray
    n: int

    def margin(self, doing: Doing) -> Tensor:
        """Mean margin an image, `[n]` float64."""
        return self.of(doing.state[self.end])

    def of(self, state: Tensor) -> Tensor:
        """The same of states `[batch, pos, d_model]`."""
        weight, bias = (t[self.end].double() for t in (self.bank.weights, self.bank.intercepts))
        out = []
        for image in range(self.n):
            tokens = np.flatnonzero(self.row == image)
            each = [
                state[image, self.position[i]] @ (weight[self.true[i]] - weight[self.confused[i]])
                + bias[self.true[i]]
                - bias[self.confused[i]]
                for i in tokens
            ]
            out.append(torch.stack(each).mean() if each else torch.tensor(torch.nan).double())
        return torch.stack(out)


def random_bank(model: MLLM, x: Inputs, seed: int = 0) -> ProbeBank:
    """Random probes of four classes at the adapter and behind every block."""
    generator = torch.Generator().manual_seed(seed)
    read = model.run(x, read=[START, "blocks.*.hook_resid_post"], logits=False)
    weights, intercepts = {}, {}
    for name in read:
        width = read[name].shape[-1]
        scale = float(read[name].float().std()) * width**0.5
        weights[name] = torch.randn(4, width, generator=generator) / scale
        intercepts[name] = torch.randn(4, generator=generator) * 0.1
    ones, true = dict.fromkeys(weights, 1), dict.fromkeys(weights, True)
    return ProbeBank(tuple(weights), CLASSES, weights, intercepts, (True,) * 4, ones, true)


def load(name: str, dtype: torch.dtype = torch.float32, n_images: int = 2, **change: Any) -> Any:
    """(model, batch of pictures with prompts of different lengths) of a case."""
    module, processor = build(name)
    model = MLLM.load(module.to(dtype), processor=processor)
    prompt = ZOO[name].prompt
    prompts = [prompt + " a red dog"[: 6 * (i % 3)].rsplit(" ", 1)[0] for i in range(n_images)]
    x = model.prepare([picture(seed=i) for i in range(n_images)], prompts)
    return model, x


def predicted(model: MLLM, x: Inputs, bank: ProbeBank) -> np.ndarray:
    """What the probe at the adapter takes every token for, `[n_tokens]`."""
    state = model.run(x, read=START, logits=False)[START]
    tokens = torch.stack([state[r, p] for r, p in zip(x.adapter.row, x.adapter.position)])
    logits = tokens.double() @ bank.weights[START].double().T + bank.intercepts[START].double()
    return logits.argmax(-1).numpy()


def random_labels(x: Inputs, seed: int = 0) -> np.ndarray:
    """A class a token, one token in eight without."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, len(x.grid))
    labels[rng.random(len(labels)) < 0.125] = IGNORE
    return labels


def asked_by_hand(model: MLLM, x: Inputs, bank: ProbeBank, labels: np.ndarray, end: str) -> Asked:
    """The default question."""
    said = predicted(model, x, bank)
    at = [i for i in range(len(labels)) if labels[i] != IGNORE and labels[i] != said[i]]
    grid = x.grid
    return Asked(bank, end, grid.row[at], grid.position[at], labels[at], said[at], len(x))


@dataclass
class Cuts:
    """Every head's z with a group of sources cut, from the clean patterns of a plain run.

    Attributes:
        row, position: `[n]` readers.
        z, cut: `[n, head, d_head]`, `[n, head, group, d_head]`, by layer.
    """

    row: Tensor
    position: Tensor
    z: dict[int, Tensor]
    cut: dict[int, Tensor]


def cuts(doing: Doing, row: Tensor, position: Tensor, inside: Tensor) -> Cuts:
    """Cut groups `inside` `[n, n_pos, n_groups]` bool out of the rows of attention, one by one."""
    z, cut = {}, {}
    for layer, pattern in doing.pattern.items():
        pattern, value = pattern.detach(), doing.value[layer].detach()
        z[layer] = doing.z[layer].detach()[row, position]
        lines = []
        for n in range(len(row)):
            groups = []
            for group in range(inside.shape[-1]):
                line = pattern[row[n], :, position[n]] * ~inside[n, :, group]  # [head, k]
                left = line.sum(-1, keepdim=True)
                line = torch.where(left > 0, line / left, 0.0)
                groups.append(torch.einsum("hk,hkd->hd", line, value[row[n]]))
            lines.append(torch.stack(groups, 1))
        cut[layer] = torch.stack(lines)
    return Cuts(row, position, z, cut)


def gradients(asked: Asked, doing: Doing) -> dict[int, Tensor]:
    """By layer, the gradient of all images' margins at z, `[batch, pos, head, d_head]`."""
    margin = asked.margin(doing)
    layers = [layer for layer in doing.z if doing.z[layer].requires_grad]
    made = torch.autograd.grad(margin[~margin.isnan()].sum(), [doing.z[i] for i in layers])
    return dict(zip(layers, made, strict=True))


def by_image(values: Tensor, row: Tensor, n: int) -> Tensor:
    """Sums over the readers of each image, `[n, ...]`."""
    return torch.stack([values[row == image].sum(0) for image in range(n)])


class Case:
    """A family, the default question of its wrong tokens, and the same by hand.

    Args:
        name: in `ZOO`.
        dtype: of the weights; the plain copy has the same rounded ones, in float64.
        n_images: rows, whose prompts differ in length.
        end: of the question.
        few: three wrong tokens an image, instead of most.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype = torch.float32,
        n_images: int = 2,
        end: str = "blocks.2.hook_resid_post",
        few: bool = False,
    ) -> None:
        self.name, self.end = name, end
        self.model, self.x = load(name, dtype, n_images)
        self.bank = random_bank(self.model, self.x)
        self.labels = random_labels(self.x)
        if few:
            self.labels = predicted(self.model, self.x, self.bank)
            for image in range(n_images):
                at = np.flatnonzero(self.x.grid.image == image)[[0, 1, -1]]
                self.labels[at] = (self.labels[at] + 1) % 4
        self.plain = Plain(name, self.model)
        self.asked = asked_by_hand(self.model, self.x, self.bank, self.labels, end)

    def ask(self, **options: Any) -> Question:
        """The question as a user asks it."""
        return ask(self.model, self.x, self.bank, labels=self.labels, **options)

    def by_hand(self, question: Question, **doing: Any) -> tuple[Doing, Cuts]:
        """(run, cuts) of plain transformers for a question's readers and groups."""
        run = self.plain.run(self.x, **{"leaf": question.layers[0], **doing})
        sources = question.parts[0].sources
        return run, cuts(run, sources.row, sources.position, self.inside(question))

    def inside(self, question: Question) -> Tensor:
        """`[n, n_pos, n_groups]` bool of the question's groups, over the whole prompt.

        A question may leave out what follows the pictures; the runs by hand never do.
        """
        inside = question.parts[0].sources.is_in
        missing = self.x.n_pos - inside.shape[1]
        return torch.nn.functional.pad(inside, (0, 0, 0, missing))


def near(ours: Tensor, reference: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to a share of the largest, NaNs in the same places."""
    assert ours.shape == reference.shape
    assert torch.equal(ours.isnan(), reference.isnan())
    scale = float(reference.nan_to_num().abs().max())
    assert scale > 1e-3, "nothing to compare"
    error = float((ours - reference).nan_to_num().abs().max())
    assert error <= tolerance * scale, f"{error / scale:.1e} of the largest"
