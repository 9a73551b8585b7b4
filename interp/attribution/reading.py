"""What the heads of some layers read at chosen positions, from one forward pass.

Attention patterns are square in the number of tokens, and nearly all of such a square is of no
interest to an attribution: it asks about a few reading positions ("dst"). So the pass keeps queries
at those positions only, with all keys and values, and the lines of the pattern are made from them
when they are needed. The model itself attends as always, through its fast kernel.

The same pass keeps the graph behind the target, if gradients are wanted. Weights are frozen
meanwhile, and the graph starts at the first layer's heads: neither the vision tower nor anything
before them is in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp.attention import as_bool, repeat_heads
from interp.clean import Clean, handing_over, keeping_inputs
from interp.execution import Run, forward, value_steps
from interp.hooked import Hooked
from interp.inputs import Inputs
from interp.narrow import narrowing
from interp.onset import Onset
from interp.steps import BEFORE, Step


class Look:
    """One layer's attention at the reading positions.

    Args:
        model: a loaded model.
        layer: of the language model.
        row, position: `[n]` the reading positions.
        n_pos: length of the sequence.

    Attributes:
        q: `[n, head, d_head]` queries as attention takes them.
        k, v: `[batch, pos, kv_head, d_head]`.
        z: `[batch, pos, head, d_head]`, with its graph where there is one.
        mask: `[n, pos]` bool, what each reading position may attend to.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    mask: Tensor

    def __init__(
        self, model: Hooked, layer: int, row: Tensor, position: Tensor, n_pos: int
    ) -> None:
        self.model, self.layer, self.row, self.position = model, layer, row, position
        self.n_pos = n_pos
        self.prefix = f"blocks.{layer}.attn"
        self.path = model.family.block_path(layer, "attn")
        self.module: Any = model.module.get_submodule(self.path)
        rot = "rot_" if model.family.language.rotary else ""
        self.hooks = {"q": f"hook_{rot}q", "k": f"hook_{rot}k", "v": "hook_v", "z": "hook_z"}
        model.require([f"{self.prefix}.{hook}" for hook in self.hooks.values()])

    def steps(self, offset: Tensor | None, leaf: bool, grad: bool) -> list[Step]:
        """What the pass does here.

        Args:
            offset: `[n, head, d_head]` added to z at the reading positions.
            leaf: start the graph at z.
            grad: keep z with its graph.
        """
        rank = self.model.hooks.rank

        def keep_mask() -> None:
            _, kwargs = self.model.envoy(self.path).inputs
            self.mask = self._visible(kwargs.get("attention_mask"))

        def keep_q() -> None:
            self.q = self.model.hook(f"{self.prefix}.{self.hooks['q']}").output.detach()
            self.q = self.q[self.row, self.position]

        def keep(part: str) -> Step:
            name = f"{self.prefix}.{self.hooks[part]}"

            def act() -> None:
                setattr(self, part, self.model.hook(name).output.detach())

            return Step(rank(name), act)

        def keep_z() -> None:
            site = self.model.hook(f"{self.prefix}.hook_z")
            z = site.output
            if leaf:
                z = z.detach()
            if offset is not None:
                z = z.clone()
                z[self.row, self.position] += offset.to(z.device, z.dtype)
            if leaf:
                z = z.requires_grad_()
            if leaf or offset is not None:
                site.output = z
            self.z = site.output if grad else z.detach()

        names = {part: f"{self.prefix}.{hook}" for part, hook in self.hooks.items()}
        return [
            Step(rank(f"{self.prefix}.hook_q") + BEFORE, keep_mask),
            Step(rank(names["q"]), keep_q),
            keep("k"),
            keep("v"),
            Step(rank(names["z"]), keep_z),
        ]

    def _visible(self, mask: Tensor | None) -> Tensor:
        if mask is None:  # SDPA's causal flag
            return torch.arange(self.n_pos) <= self.position[:, None]
        seen = as_bool(mask)
        row = self.row if seen.shape[0] > 1 else torch.zeros_like(self.row)
        return seen[row, 0, self.position].cpu()

    def patterns(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The reading positions' lines of the pattern, a row of the batch at a time.

        Yields:
            The row, which of the `n` reading positions are in it, and their pattern
            `[n_here, head, key]` float64.
        """
        n_heads = self.q.shape[1]
        scaling = float(self.module.scaling)
        softcap = getattr(self.module, "attn_logit_softcapping", None)
        for row in self.row.unique().tolist():
            at = (self.row == row).nonzero()[:, 0]
            keys = repeat_heads(self.k[row].transpose(0, 1)[None], n_heads)[0]  # [head, key, d]
            query = self.q[at.to(self.q.device)].transpose(0, 1)  # [head, n_here, d]
            scores = (query.float() @ keys.float().transpose(-1, -2)) * scaling
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            closed = ~self.mask[at].to(scores.device)
            scores = scores.masked_fill(closed, -torch.inf).double()
            yield row, at, scores.softmax(-1).nan_to_num(0.0).transpose(0, 1)

    def values(self, row: int) -> Tensor:
        """`[head, key, d_head]` of one row of the batch, one a query head."""
        return repeat_heads(self.v[row].transpose(0, 1)[None], self.q.shape[1])[0]


@dataclass(frozen=True, eq=False)
class Reading:
    """What one pass left.

    Attributes:
        looks: by layer.
        run: the states that were read, the target's with its graph if there is one.
    """

    looks: dict[int, Look]
    run: Run

    @property
    def masks(self) -> dict[int, Tensor]:
        """By layer, `[n, pos]` bool, what each reading position may attend to."""
        return {layer: look.mask for layer, look in self.looks.items()}


def read(
    model: Hooked,
    x: Inputs,
    row: Tensor,
    position: Tensor,
    layers: Sequence[int],
    end: str,
    *,
    extra: Sequence[str] = (),
    grad: bool = False,
    offsets: Mapping[int, Tensor] | None = None,
    clean: Clean | None = None,
    keep: bool = False,
    only: Tensor | None = None,
) -> Reading:
    """One pass up to `end`.

    Args:
        model: a loaded model.
        x: a batch.
        row, position: `[n]` the reading positions.
        layers: whose attention is looked at.
        end: the hook where the target is read, or "logits".
        extra: other hooks to read, without gradients.
        grad: keep the graph from the first of the layers to `end`.
        offsets: by layer, `[n, head, d_head]` added to z at the reading positions.
        clean: of an earlier clean run of `x`; the towers are not run again if it has what the
            language model is given, and it is told that if it has not.
        keep: tell it also all that runs need to leave this one in any of the layers.
        only: `[n]` the positions at which the target is read, if it says so: the last MLP is
            computed at no others (`interp.narrow`).
    """
    states: dict[str, Tensor] = {}
    looks = {layer: Look(model, layer, row, position, x.n_pos) for layer in layers}
    steps: list[Step] = []
    for number, (layer, look) in enumerate(looks.items()):
        offset = None if offsets is None else offsets[layer]
        steps += look.steps(offset, leaf=grad and number == 0, grad=grad)
    logits = end == "logits"
    if only is not None and not logits and not extra:
        steps += narrowing(model, layers[-1], only)
    rest = [name for name in extra if name != end]
    steps += value_steps(model, x, rest, [], states)
    if not logits:

        def keep_end() -> None:
            states[end] = model.hook(end).output

        steps.append(Step(model.hooks.rank(end), keep_end))
    tensors = model.to_device(x)
    if clean is not None and clean.inputs is not None:
        steps.append(handing_over(model, clean.inputs))
        tensors = {name: tensors[name] for name in ("input_ids", "attention_mask")}
    elif clean is not None:
        steps.append(keeping_inputs(model, clean))
    onsets = {layer: Onset(model, layer) for layer in layers} if keep else {}
    steps += [step for onset in onsets.values() for step in onset.steps()]
    with frozen(model.module):
        made = forward(model, tensors, steps, logits, grad=grad)
    if clean is not None and keep:
        clean.onsets |= onsets
        clean.states |= {name: state.detach() for name, state in states.items()}
        clean.logits = None if made is None else made.detach()
    run = Run(states, made, (), x.grid, lambda name: model.grid_of(name, x))
    return Reading(looks, run)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No weight asks for gradients while the block runs."""
    asking = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
