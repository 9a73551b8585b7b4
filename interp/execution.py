"""The one place that opens a trace: edits and reads in, a `Run` out.

A run is a list of *steps*, each bound to a place in the forward pass, and one nnsight trace that
takes them in the order in which the forward pass reaches them (nnsight refuses any other order):

1. mask edits go in at each edited attention module's input, before anything there is computed;
2. functions (`run_with_hooks`) edit values where they stand;
3. reads take values *after* the edits at the same place;
4. if the logits are not wanted, the forward stops after the last step.

Everything else in the library (`run_with_cache`, studies, attribution) asks `execute`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.attention import bool_mask
from interp.edits.masks import MaskBook, MaskEdit
from interp.edits.receipts import Receipt, Receipts, attention_mass
from interp.errors import EditHadNoEffect, NotRead, nearest
from interp.hooks import canonical
from interp.inputs import Inputs
from interp.points import Point
from interp.tokens import TokenGrid

if TYPE_CHECKING:
    from interp.model import MLLM

HookFunction = Callable[..., Tensor | None]


@dataclass(repr=False)
class Run:
    """What one run gave.

    `run["blocks.3.hook_resid_post"]` is a state by hook name, `run.tokens(name)` its image tokens
    in grid order, `run.logits` the logits (None if not wanted), `run.receipts` what the edits did.
    """

    states: dict[str, Tensor]
    logits: Tensor | None
    receipts: Receipts
    grid: TokenGrid
    image_tokens: Callable[[str, Tensor, TokenGrid], Tensor] = field(repr=False)

    def __repr__(self) -> str:
        logits = "no logits" if self.logits is None else f"logits {list(self.logits.shape)}"
        return f"Run({len(self.states)} states, {logits}, {len(self.receipts)} receipts)"

    def __getitem__(self, name: str) -> Tensor:
        name = canonical(name)
        if name not in self.states:
            raise NotRead(
                f"{name!r} was not read in this run, which read {len(self.states)} hooks; "
                f"{nearest(name, self.states)} Pass read={name!r} to model.run"
            )
        return self.states[name]

    def __iter__(self) -> Any:
        return iter(self.states)

    def tokens(self, name: str) -> Tensor:
        """The state's image tokens, `[n_images, n_tokens, d]`, in grid order.

        For the vision tower that is the state without its CLS token, for the language model the
        positions of the image placeholders.
        """
        return self.image_tokens(canonical(name), self[name], self.grid)


@dataclass
class Step:
    """One thing to do at one place of the forward pass."""

    rank: float
    act: Callable[[], None]


def execute(
    model: MLLM,
    x: Inputs,
    *,
    edits: Sequence[MaskEdit] = (),
    read: Sequence[str] = (),
    functions: Sequence[tuple[str, HookFunction]] = (),
    logits: bool = True,
    strict: bool = True,
    allow_empty_rows: bool = False,
    mass: bool = True,
) -> Run:
    """Run the model once; `MLLM.run` documents the arguments (names are canonical here)."""
    states: dict[str, Tensor] = {}
    receipts: list[Receipt] = []
    steps = _value_steps(model, read, functions, states)
    if edits:
        book = MaskBook(
            edits,
            model.cfg.n_layers,
            model.cfg.n_heads,
            len(x),
            x.n_pos,
            strict=strict,
            allow_empty_rows=allow_empty_rows,
        )
        for layer in range(model.cfg.n_layers):
            if book.at(layer):
                steps += _mask_steps(model, book, layer, receipts, mass)
    steps.sort(key=lambda step: step.rank)
    out: dict[str, Tensor] = {}
    nn, tensors = model.nn, model.to_device(x)
    with torch.no_grad(), nn.trace(**tensors, use_cache=False) as tracer:
        for step in steps:
            step.act()
        if logits:
            out["logits"] = nn.output.logits
        else:
            tracer.stop()
    receipts.sort(key=lambda receipt: receipt.layer)
    return Run(states, out.get("logits"), Receipts(receipts), x.grid, model.image_tokens)


def _value_steps(
    model: MLLM,
    read: Sequence[str],
    functions: Sequence[tuple[str, HookFunction]],
    states: dict[str, Tensor],
) -> list[Step]:
    """One step a hook: first the functions there, in the order given, then the read."""
    by_name: dict[str, list[HookFunction]] = {name: [] for name in read}
    for name, function in functions:
        by_name.setdefault(name, []).append(function)

    def step(name: str, edits: list[HookFunction], keep: bool) -> Step:
        off_path = model.off_path(name)

        def act() -> None:
            site = model.hook(name)
            value = site.output
            for edit in edits:
                version = value._version if off_path else 0  # torch counts edits in place
                edited = edit(value, hook=Point(name))
                if off_path and (edited is not None or value._version != version):
                    raise EditHadNoEffect(
                        f"an edit at {name!r} cannot reach the logits: the adapter reads "
                        f"{model.adapter_reads!r}, and this lies behind it"
                    )
                if edited is not None:
                    site.output = edited
                    value = site.output
            if keep:
                # blocks hand the same tensor on (resid_post of one is resid_pre of the next), so
                # where functions may write in place, what was read before must be a copy
                states[name] = value.detach().clone() if functions else value.detach()

        return Step(model.hooks.rank(name), act)

    wanted = set(read)
    return [step(name, edits, name in wanted) for name, edits in by_name.items()]


def _mask_steps(
    model: MLLM, book: MaskBook, layer: int, receipts: list[Receipt], mass: bool
) -> list[Step]:
    """Put the edited mask in before the layer's attention, and write the receipts after it."""
    attention = model.envoy(model.family.block_path(layer, "attn"))
    prefix = f"blocks.{layer}.attn"
    scaling = float(attention._module.scaling)
    effects: list[Any] = []
    query: list[Tensor] = []

    def edit() -> None:
        args, kwargs = attention.inputs
        base = kwargs.get("attention_mask")
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if base is None:
            base = book.causal(hidden.device)
        else:
            base = bool_mask(base, hidden[:, None], hidden[:, None], True)
        mask, found = book.mask(base, layer)
        effects.extend(found)
        attention.inputs = (args, {**kwargs, "attention_mask": mask})
        if not mass:
            write(None)

    def keep_query() -> None:
        query.append(model.hook(f"{prefix}.hook_rot_q").output)

    def write(key: Tensor | None) -> None:
        for number, effect in zip(book.at(layer), effects, strict=True):
            done = book.edits[number]
            share = None
            if key is not None:
                share = attention_mass(
                    query[0],
                    key,
                    scaling=scaling,
                    mask=effect.after if done.opens else effect.before,
                    edges=effect.edges,
                    heads=done.heads,  # type: ignore[arg-type]
                )
            receipts.append(
                Receipt(
                    edit=repr(done),
                    layer=layer,
                    asked=len(done.edges),
                    changed=effect.changed,
                    mass=share,
                    empty_rows=effect.empty_rows,
                )
            )

    steps = [Step(model.hooks.rank(f"{prefix}.hook_q") - 0.5, edit)]
    if mass:
        steps.append(Step(model.hooks.rank(f"{prefix}.hook_rot_q") + 0.1, keep_query))
        steps.append(
            Step(
                model.hooks.rank(f"{prefix}.hook_rot_k") + 0.1,
                lambda: write(model.hook(f"{prefix}.hook_rot_k").output),
            )
        )
    return steps
