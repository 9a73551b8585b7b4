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
from typing import Any

import torch
from torch import Tensor

from interp.attention import as_bool
from interp.edits.masks import Effect, MaskBook, MaskEdit
from interp.edits.receipts import Receipt, Receipts, attention_mass
from interp.errors import EditHadNoEffect, NotRead, nearest
from interp.hooks import canonical
from interp.inputs import Inputs
from interp.instrumented import Instrumented
from interp.points import Point
from interp.pooling import pool
from interp.tokens import TokenGrid

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
    grid_of: Callable[[str], TokenGrid] = field(repr=False)

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

        For the language model those are the positions of the image placeholders, for the vision
        tower its patches without CLS: as many as image tokens, or four times as many where the
        adapter merges. `run.grid_of(name)` is the grid they are counted in.
        """
        return self.grid_of(name).gather(self[name])

    def per_token(self, name: str) -> Tensor:
        """One vector an image token, `[n_images, n_tokens, d]`, at any stage.

        What `tokens` gives, but where the adapter merges patches the mean of a token's patches, so
        that stages can be compared token by token (`interp.pooling`).
        """
        return pool(self.tokens(name), self.grid_of(name), self.grid)


#: a step just before the value at a rank is made, and one just after the reads there
BEFORE, AFTER = -0.5, 0.5


@dataclass
class Step:
    """One thing to do at one place of the forward pass; ranks are `Vocabulary.rank`'s."""

    rank: float
    act: Callable[[], None]


def execute(
    model: Instrumented,
    x: Inputs,
    *,
    edits: Sequence[MaskEdit] = (),
    read: Sequence[str] = (),
    functions: Sequence[tuple[str, HookFunction]] = (),
    logits: bool = True,
    strict: bool = True,
    allow_empty_rows: bool = False,
    mass: bool = True,
    stop: str | None = None,
) -> Run:
    """Run the model once; `MLLM.run` documents the arguments (names are canonical here).

    `stop` names a hook, among those read, behind which nothing is run or edited.
    """
    states: dict[str, Tensor] = {}
    receipts: list[Receipt] = []
    steps = _value_steps(model, x, read, functions, states)
    if edits:
        book = MaskBook(
            edits,
            model.cfg.n_layers,
            model.cfg.n_heads,
            x.tensors["attention_mask"].cpu().numpy().astype(bool),
            strict=strict,
            allow_empty_rows=allow_empty_rows,
        )
        if strict and not logits:
            _reaches_a_read(model, edits, read)
        for layer in range(model.cfg.n_layers):
            if book.at(layer):
                steps += _LayerMask(model, book, layer, receipts, mass).steps()
    if stop is not None:
        steps = [step for step in steps if step.rank <= model.hooks.rank(stop)]
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
    if edits:
        book.require_effects()
    receipts.sort(key=lambda receipt: receipt.layer)
    return Run(
        states, out.get("logits"), Receipts(receipts), x.grid, lambda name: model.grid_of(name, x)
    )


def _reaches_a_read(model: Instrumented, edits: Sequence[MaskEdit], read: Sequence[str]) -> None:
    """Raise for an edit that acts only after everything that is read."""
    last = max((model.hooks.rank(name) for name in read), default=-1)
    for edit in edits:
        layers = [layer for layer in range(model.cfg.n_layers) if edit.applies(layer)]
        if layers and model.hooks.rank(f"blocks.{layers[0]}.attn.hook_q") > last:
            raise EditHadNoEffect(
                f"{edit!r} acts from layer {layers[0]} on, after everything that is read "
                f"({', '.join(read) or 'nothing'}), and the logits are not wanted"
            )


def _value_steps(
    model: Instrumented,
    x: Inputs,
    read: Sequence[str],
    functions: Sequence[tuple[str, HookFunction]],
    states: dict[str, Tensor],
) -> list[Step]:
    """One step a hook: first the functions there, in the order given, then the read."""
    by_name: dict[str, list[HookFunction]] = {name: [] for name in read}
    for name, function in functions:
        by_name.setdefault(name, []).append(function)

    def step(name: str, edits: list[HookFunction], keep: bool) -> Step:
        def act() -> None:
            site = model.hook(name)
            value = site.output
            before = value.clone() if edits and name == "hook_embed" else value
            off_path = bool(edits) and model.off_path(name)
            for edit in edits:
                version = value._version if off_path else 0  # torch counts edits in place
                edited = edit(value, hook=Point(name))
                if off_path and (edited is not None or value._version != version):
                    raise EditHadNoEffect(
                        f"an edit at {name!r} cannot reach the logits: the adapter reads "
                        f"{model.adapter_reads!r}, and this lies behind it"
                    )
                if edited is not None:
                    _same_shape(name, edited, value)
                    site.output = edited
                    value = site.output
            if edits and name == "hook_embed":
                _not_only_placeholders(before, value, x)
            if keep:
                # blocks hand the same tensor on (resid_post of one is resid_pre of the next), so
                # where functions may write in place, what was read before must be a copy
                states[name] = value.detach().clone() if functions else value.detach()

        return Step(model.hooks.rank(name), act)

    wanted = set(read)
    return [step(name, edits, name in wanted) for name, edits in by_name.items()]


def _same_shape(name: str, edited: Any, value: Tensor) -> None:
    """A result of another shape may broadcast into wrong numbers, so it is refused."""
    if not isinstance(edited, Tensor) or edited.shape != value.shape:
        came = list(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
        raise ValueError(
            f"the function at {name!r} returned {came}, but the tensor there is "
            f"{list(value.shape)}; return one of that shape, or None"
        )


def _not_only_placeholders(before: Tensor, after: Tensor, x: Inputs) -> None:
    """`hook_embed` at image positions is overwritten by the adapter's output."""
    changed = (before != after).any(-1).cpu().numpy()
    if changed.any() and not (changed & ~x.grid.is_placeholder).any():
        raise EditHadNoEffect(
            "an edit of hook_embed at image tokens only cannot reach the logits: placeholders are "
            "overwritten by the adapter's output; edit adapter.hook_out"
        )


class _LayerMask:
    """The mask edits of one layer during a run: put the mask in, then write the receipts."""

    def __init__(
        self, model: Instrumented, book: MaskBook, layer: int, receipts: list[Receipt], mass: bool
    ) -> None:
        self.model, self.book, self.layer, self.receipts = model, book, layer, receipts
        self.mass = mass
        self.attention = model.envoy(model.family.block_path(layer, "attn"))
        self.prefix = f"blocks.{layer}.attn"
        self.effects: list[Effect] = []

    def steps(self) -> list[Step]:
        """In at the attention module's input; receipts where queries and keys are at hand."""
        rank = self.model.hooks.rank
        steps = [Step(rank(f"{self.prefix}.hook_q") + BEFORE, self.put_in)]
        if self.mass:
            steps.append(Step(rank(f"{self.prefix}.hook_rot_q") + AFTER, self.keep_query))
            steps.append(Step(rank(f"{self.prefix}.hook_rot_k") + AFTER, self.weigh))
        return steps

    def put_in(self) -> None:
        args, kwargs = self.attention.inputs
        base = kwargs.get("attention_mask")
        base = self.book.causal(self.model.device) if base is None else as_bool(base)
        mask, effects = self.book.mask(base, self.layer)
        self.attention.inputs = (args, {**kwargs, "attention_mask": mask})
        if self.mass:
            self.effects = effects
        else:
            for effect in effects:
                self.write(effect, None)

    def keep_query(self) -> None:
        self.query = self.model.hook(f"{self.prefix}.hook_rot_q").output

    def weigh(self) -> None:
        key = self.model.hook(f"{self.prefix}.hook_rot_k").output
        for effect in self.effects:
            share = attention_mass(
                self.query,
                key,
                scaling=float(self.attention._module.scaling),
                softcap=getattr(self.attention._module, "attn_logit_softcapping", None),
                mask=effect.after if effect.edit.opens else effect.before,
                edges=effect.edges,
                heads=effect.edit.heads,  # type: ignore[arg-type]
            )
            self.write(effect, share)
        self.effects = []  # they hold masks, and this object lives as long as the run
        del self.query

    def write(self, effect: Effect, share: float | None) -> None:
        self.receipts.append(
            Receipt(
                edit=repr(effect.edit),
                layer=self.layer,
                asked=len(effect.edit.edges),
                changed=effect.changed,
                mass=share,
                empty_rows=effect.empty_rows,
            )
        )
