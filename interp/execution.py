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

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp.edits.base import Edit
from interp.edits.masks import MaskEdit
from interp.edits.receipts import Receipt, Receipts
from interp.edits.values import ValueEdit, check_together
from interp.errors import EditHadNoEffect, NotRead, nearest
from interp.hooked import Hooked
from interp.hooks import HookName, canonical
from interp.inputs import Inputs
from interp.keeping import Keep, check_keep, keeper, slim
from interp.masking import RunMasks
from interp.pooling import pool
from interp.shipping import at_model
from interp.sites import fits
from interp.steps import Step
from interp.tokens import TokenGrid

HookFunction = Callable[..., Tensor | None]


@dataclass(repr=False)
class Run:
    """What one run gave.

    `run["blocks.3.hook_resid_post"]` is a state by hook name, `run.tokens(name)` its image tokens
    in grid order, `run.logits` the logits (None if not wanted), `run.receipts` what the edits did.
    `run.traffic` is what a server's answer took (None here), `run.whole` whether all of each state
    was kept.
    """

    states: dict[str, Tensor]
    logits: Tensor | None
    receipts: Receipts | tuple[Receipt, ...]
    grid: TokenGrid
    grid_of: Callable[[str], TokenGrid] = field(repr=False)
    whole: bool = True
    traffic: Any = None

    def __repr__(self) -> str:
        logits = "no logits" if self.logits is None else f"logits {list(self.logits.shape)}"
        went = "" if self.traffic is None else f"; {self.traffic}"
        return f"Run({len(self.states)} states, {logits}, {len(self.receipts)} receipts{went})"

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
        if not self.whole:
            raise NotRead(f"run[{name!r}] is what keep= made of the state, which is not here")
        return self.grid_of(name).gather(self[name])

    def per_token(self, name: str) -> Tensor:
        """One vector an image token, `[n_images, n_tokens, d]`, at any stage.

        What `tokens` gives, but where the adapter merges patches the mean of a token's patches, so
        that stages can be compared token by token (`interp.pooling`).
        """
        return pool(self.tokens(name), self.grid_of(name), self.grid)


def execute(
    model: Hooked,
    x: Inputs,
    *,
    edits: Sequence[Edit] = (),
    read: Sequence[str] = (),
    functions: Sequence[tuple[str, HookFunction]] = (),
    logits: bool = True,
    strict: bool = True,
    allow_empty_rows: bool = False,
    mass: bool = True,
    change: bool = False,
    stop: str | None = None,
    keep: Keep = None,
) -> Run:
    """Run the model once; `MLLM.run` documents the arguments (names are canonical here).

    `stop` names a hook, among those read, behind which nothing is run or edited.
    """
    if strict and not logits:
        require_a_reader(model, edits, read)
    named = [name for name, _ in functions]
    settings = {
        "strict": strict,
        "allow_empty_rows": allow_empty_rows,
        "mass": mass,
        "change": change,
    }
    check_keep(keep, model, list(read))
    check_edits(model, x, edits, read, named, settings)
    keep = slim(keep, list(read))
    left = _execute(
        model, x, edits, read, functions, logits, stop, settings, keep, attn=kernel_for(read)
    )
    return run_of(model, x, left, whole=keep is None)


def check_edits(
    model: Hooked,
    x: Inputs,
    edits: Sequence[Edit],
    read: Sequence[str],
    named: Sequence[str],
    settings: dict[str, bool],
) -> None:
    """Raise for what cannot be done, before anything runs or is sent.

    Args:
        model: to be run.
        x: its inputs.
        edits: of values and masks.
        read: hooks to be read.
        named: hooks that functions edit.
        settings: of the masks, see `RunMasks`.
    """
    values = [edit for edit in edits if isinstance(edit, ValueEdit)]
    check_together(values, model, x)
    for edit in values:
        edit.check(model, x)
    edited = [name for edit in values for name in edit.names(model)]
    model.require(read)
    model.require([*edited, *named], edited=True)
    masks = [edit for edit in edits if isinstance(edit, MaskEdit)]
    if model.host is not None and masks:  # here they are made, and checked, when it runs
        RunMasks(model, x, masks, [], **settings)


def kernel_for(read: Sequence[str]) -> str:
    """The kernel that a hosted model is to attend through: eager gives patterns."""
    return "eager" if any(name.endswith("attn.hook_pattern") for name in read) else "sdpa"


@at_model
def _execute(
    model: Hooked,
    x: Inputs,
    edits: Sequence[Edit],
    read: Sequence[str],
    functions: Sequence[tuple[str, HookFunction]],
    logits: bool,
    stop: str | None,
    settings: dict[str, bool],
    keep: Keep,
    *,
    attn: str,
) -> dict[str, Any]:
    """The run, as plain data: "states", "logits", "receipts"."""
    states: dict[str, Tensor] = {}
    receipts: list[Receipt] = []
    masks = [edit for edit in edits if isinstance(edit, MaskEdit)]
    values = [edit for edit in edits if isinstance(edit, ValueEdit)]
    edited = [
        (name, as_function(edit, model, x, receipts))
        for edit in values
        for name in edit.names(model)
    ]
    model.require(read)
    steps = value_steps(model, x, read, [*edited, *functions], states, keeper(keep, model, x))
    run_masks = RunMasks(model, x, masks, receipts, **settings)
    steps += run_masks.steps()
    if stop is not None:
        steps = [step for step in steps if step.rank <= model.hooks.rank(stop)]
    made = forward(model, model.to_device(x), steps, logits)
    run_masks.require_effects()
    if settings["strict"]:
        require_felt(values, receipts)
    return {"states": states, "logits": made, "receipts": rows_of(model, receipts)}


def rows_of(model: Hooked, receipts: Sequence[Receipt]) -> list[dict[str, Any]]:
    """Receipts as plain data, in execution order."""
    ordered = sorted(receipts, key=lambda receipt: model.hooks.rank(receipt.hook))
    return [dict(vars(receipt)) for receipt in ordered]


def run_of(model: Hooked, x: Inputs, left: dict[str, Any], *, whole: bool = True) -> Run:
    """A `Run` of the plain data that one left; `whole` if its states are all that was read."""
    receipts = Receipts(Receipt(**row) for row in left["receipts"])

    def grid_of(name: str) -> TokenGrid:
        return model.grid_of(name, x)

    traffic = None if model.host is None else model.host.last
    return Run(left["states"], left["logits"], receipts, x.grid, grid_of, whole, traffic)


def forward(
    model: Hooked,
    tensors: dict[str, Tensor],
    steps: list[Step],
    logits: bool,
    *,
    grad: bool = False,
) -> Tensor | None:
    """One forward pass with its steps, in the one trace of this library; the logits if wanted.

    With `grad` a graph is kept from whatever a step lets require gradients.
    """
    steps = sorted(steps, key=lambda step: step.rank)
    out: dict[str, Tensor] = {}
    nn = model.nn
    model.begin()
    try:
        with torch.set_grad_enabled(grad), nn.trace(**tensors, use_cache=False) as tracer:
            for step in steps:
                step.act()
            if logits:
                out["logits"] = nn.output.logits
            else:
                tracer.stop()
        model.untouched()
    finally:
        model.end()
    return out.get("logits")


def require_a_reader(model: Hooked, edits: Sequence[Edit], read: Sequence[str]) -> None:
    """Raise for an edit that acts only after everything that is read."""
    last = max((model.hooks.rank(name) for name in read), default=-1)
    for edit in edits:
        names = edit.names(model)  # type: ignore[attr-defined]
        if names and model.hooks.rank(names[0]) > last:
            first = names[0].removesuffix(".attn.hook_mask")
            shown = ", ".join(read[-3:]) or "nothing"
            raise EditHadNoEffect(
                f"{edit!r} acts from {first} on, after everything that is read "
                f"({shown}), and the logits are not wanted"
            )


def as_function(edit: ValueEdit, model: Hooked, x: Inputs, receipts: list[Receipt]) -> HookFunction:
    """A value edit as a hook function that writes its receipt."""

    def function(value: Tensor, hook: HookName) -> Tensor | None:
        name = hook.name
        after = edit.change(value, name, model, x)
        fits(name, after, value)
        changed = int(((after != value) & ~(after.isnan() & value.isnan())).any(-1).sum())
        # scores have minus infinity where the mask closes them, before and after
        before, moved = (t.float().nan_to_num(0, 0, 0) for t in (value, after - value))
        receipts.append(
            Receipt(
                edit=repr(edit),
                hook=name,
                layer=hook.layer() if "blocks." in name else None,
                asked=edit.n_selected(value, name, model, x),
                open=None,
                changed=changed,
                size=float(moved.norm() / before.norm().clamp_min(1e-30)),
            )
        )
        return after if changed else None

    return function


def require_felt(edits: Sequence[ValueEdit], receipts: Sequence[Receipt]) -> None:
    """Raise for a value edit that changed nothing anywhere.

    Of edits that print alike each has its receipt at every hook, in the order of the edits.
    """
    alike = Counter[str]()
    for edit in edits:
        at_hook: dict[str, list[Receipt]] = {}
        for receipt in receipts:
            if receipt.edit == repr(edit):
                at_hook.setdefault(receipt.hook, []).append(receipt)
        own = [some[alike[repr(edit)]] for some in at_hook.values()]
        alike[repr(edit)] += 1
        if not any(receipt.changed for receipt in own):
            raise EditHadNoEffect(
                f"{edit!r} changes nothing: what it writes is there already at "
                f"{', '.join(receipt.hook for receipt in own[:3])}; pass strict=False to let that "
                "pass"
            )


def value_steps(
    model: Hooked,
    x: Inputs,
    read: Sequence[str],
    functions: Sequence[tuple[str, HookFunction]],
    states: dict[str, Tensor],
    make: Callable[[Tensor, str], Tensor] | None = None,
) -> list[Step]:
    """One step a hook: first the functions there, in the order given, then the read.

    `make` gives what of a state is put into `states`.
    """
    by_name: dict[str, list[HookFunction]] = {name: [] for name in read}
    for name, function in functions:
        by_name.setdefault(name, []).append(function)

    def step(name: str, edits: list[HookFunction], keep: bool) -> Step:
        def act() -> None:
            site = model.hook(name)
            value = site.output
            partly = edits and name in ("hook_embed", model.adapter_reads)
            before = value.clone() if partly else value
            off_path = bool(edits) and model.off_path(name)
            for edit in edits:
                kept = value.clone() if off_path else value
                edited = edit(value, hook=HookName(name))
                if off_path and (edited is not None or not torch.equal(kept, value)):
                    raise EditHadNoEffect(
                        f"an edit at {name!r} cannot reach the logits: the adapter reads "
                        f"{model.adapter_reads!r}, and this lies behind it"
                    )
                if edited is not None:
                    fits(name, edited, value)
                    site.output = edited
                    value = site.output
            if partly:
                _goes_on(name, before, value, x)
            if keep:
                # blocks hand the same tensor on (resid_post of one is resid_pre of the next), so
                # where functions may write in place, what was read before must be a copy
                value = value.detach()
                if make is not None:
                    value = make(value, name)
                states[name] = value.clone() if functions else value

        return Step(model.hooks.rank(name), act)

    wanted = set(read)
    return [step(name, edits, name in wanted) for name, edits in by_name.items()]


def _goes_on(name: str, before: Tensor, after: Tensor, x: Inputs) -> None:
    """Raise for an edit at positions only that nothing reads on.

    At image positions `hook_embed` is overwritten; CLS is dropped behind the stage that the adapter
    reads.
    """
    changed = (before != after).any(-1).cpu().numpy()
    embed = name == "hook_embed"
    if not embed and x.adapter.n_pos == x.patches.n_pos:
        return  # CLS and all go into the adapter
    read = ~x.grid.is_placeholder if embed else x.patches.is_placeholder
    if changed.any() and not (changed & read).any():
        raise EditHadNoEffect(
            "an edit of hook_embed at image tokens only cannot reach the logits: placeholders are "
            "overwritten by the adapter's output; edit adapter.hook_out"
            if embed
            else f"an edit of {name!r} at the CLS token only cannot reach the logits: the adapter "
            "drops it; edit it in an earlier block"
        )
