"""Many edits of one input, in as few forward passes and through as few layers as they need.

`model.run_many(x, [edit, [edit, edit], ...])` gives what `model.run(x, *edits)` gives for each item
of the list, one `Run` each, but does what they have in common only once:

1. Each *variant* (an item of the list) starts at the first language block that one of its edits
   reaches. One clean run goes as far as the last of these starts, and no further than the variants
   need; it keeps what the language model was given and the state at each start. The vision tower
   runs there, and nowhere else.
2. Variants with the same start go through the model together, a copy of `x` each, along the batch
   dimension: the language model is handed its own clean inputs again, the blocks before the start
   are skipped with the clean state, and the pass ends at the last hook that is read.
3. What is read before the start comes from the clean run. It is the same tensor in all runs.

Variants whose edits act before the language model's blocks (vision tower, adapter, embedding) share
nothing but the batch: their towers differ, so the whole model runs on copies of `x`.

A variant sees nothing of the others. Its edits are handed a model in which every hook is cut down
to the variant's rows (`interp.rows`), so they check, change and count as they do in `model.run`.

>>> # heads = [Knockout(edges, layers=2, heads=h) for h in range(model.cfg.n_heads)]
>>> # runs = model.run_many(x, heads, read="blocks.4.hook_resid_post", logits=False)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp.clean import Clean, clean_run, skip_to
from interp.edits.base import Edit
from interp.edits.masks import MaskEdit
from interp.edits.receipts import Receipt
from interp.edits.values import ValueEdit, check_together
from interp.execution import (
    Run,
    as_function,
    check_edits,
    forward,
    kernel_for,
    require_a_reader,
    require_felt,
    rows_of,
    run_of,
    value_steps,
)
from interp.hooked import Hooked
from interp.hooks import Pattern
from interp.inputs import Inputs
from interp.masking import LayerMask, RunMasks
from interp.narrow import narrowing
from interp.onset import Onset
from interp.rows import Batch, Rows
from interp.shipping import at_model
from interp.steps import Step

#: positions that go through the model together unless `batch_size` says otherwise; a CPU is busy
#: with few, and slower once they do not fit its cache
POSITIONS, POSITIONS_ELSEWHERE = {"cpu": 1280}, 16384


@dataclass
class Variant:
    """One item of the list: its edits, where they start, and what came of them.

    Attributes:
        number: in the list.
        edits: in the order given.
        rows: the model as they see it.
        receipts: what they did.
        masks: its mask edits, if there are any.
        values: its value edits.
        start: the first language block that they reach, None if they act before all of them.
        onset: whether that block can be computed at the changed positions only.
    """

    number: int
    edits: tuple[Edit, ...]
    rows: Any
    receipts: list[Receipt]
    masks: RunMasks | None
    values: list[ValueEdit]
    start: int | None = None
    onset: bool = False
    states: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


def run_many(
    model: Hooked,
    x: Inputs,
    edits: Iterable[Edit | Sequence[Edit]],
    *,
    read: Pattern | None = None,
    logits: bool = True,
    strict: bool = True,
    allow_empty_rows: bool = False,
    mass: bool = True,
    change: bool = False,
    batch_size: int | None = None,
) -> list[Run]:
    """Run `x` once for each of many edits; what `model.run` gives, one `Run` each, in order.

    Args:
        model: a loaded model.
        x: a prepared batch.
        edits: the variants, each an edit or several; an empty list is the clean run.
        read: as in `model.run`. States that a variant's edits cannot reach are the clean run's, one
            tensor for all runs: do not write into them.
        logits: compute them; without, each pass stops after the last hook read.
        strict, allow_empty_rows, mass, change: as in `model.run`.
        batch_size: variants in one forward pass at most; by default as many as make `POSITIONS`
            positions. Memory grows with it, results do not depend on it.

    Raises:
        ValueError: nothing to do, or a `batch_size` below 1.
        Whatever `model.run` raises for one of the variants, with a note that says which.
    """
    names = model.hooks.expand(read)
    variants = [(item,) if isinstance(item, Edit) else tuple(item) for item in edits]
    settings = {
        "strict": strict,
        "allow_empty_rows": allow_empty_rows,
        "mass": mass,
        "change": change,
    }
    if model.host is not None:  # here each is checked when it is made ready
        for number, given in enumerate(variants):
            with _noted(number, given):
                check_edits(model, x, given, names, (), settings)
    left = _run_many(
        model, x, variants, names, logits, batch_size, settings, attn=kernel_for(names)
    )
    return [run_of(model, x, one) for one in left]


@at_model
def _run_many(
    model: Hooked,
    x: Inputs,
    variants: Sequence[Sequence[Edit]],
    names: Sequence[str],
    logits: bool,
    batch_size: int | None,
    settings: dict[str, Any],
    *,
    attn: str,
) -> list[dict[str, Any]]:
    """What each run left, as plain data, in order."""
    left: list[dict[str, Any]] = [{}] * len(variants)
    for number, run in each_run(
        model,
        x,
        variants,
        read=names or None,
        logits=logits,
        batch_size=batch_size,
        **settings,
    ):
        rows = rows_of(model, run.receipts)
        left[number] = {"states": run.states, "logits": run.logits, "receipts": rows}
    return left


def each_run(
    model: Hooked,
    x: Inputs,
    edits: Iterable[Edit | Sequence[Edit]],
    *,
    read: Pattern | None = None,
    logits: bool = True,
    strict: bool = True,
    allow_empty_rows: bool = False,
    mass: bool = True,
    change: bool = False,
    batch_size: int | None = None,
    clean: Clean | None = None,
    only: Tensor | None = None,
) -> Iterator[tuple[int, Run]]:
    """The runs of `run_many` one by one as they are made, each with its number in the list.

    So that a number can be taken from each and its states forgotten. Arguments and errors are
    those of `run_many`; all edits are checked before anything runs. `clean` is what an earlier
    clean run of `x` has left (`interp.clean`): what is in it is not computed again. `only` are the
    positions `[n]` at which what is read is looked at: the output of one block, whose MLP is then
    computed at no others (`interp.narrow`).

    Raises:
        ValueError: `only` with reads other than one "blocks.<layer>.hook_resid_post", or logits.
    """
    names = model.hooks.expand(read)
    last = [name for name in names if re.fullmatch(r"blocks\.\d+\.hook_resid_post", name)]
    if only is not None and (logits or len(names) != 1 or names != last):
        raise ValueError(
            f"only= is for reading one blocks.<layer>.hook_resid_post, not {', '.join(names)}"
            f"{' and logits' * logits}"
        )
    if batch_size is None:
        limit = POSITIONS.get(model.device.type, POSITIONS_ELSEWHERE)
        batch_size = max(1, limit // (len(x) * x.n_pos))
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least one variant goes at a time")
    if not (names or logits):
        raise ValueError("nothing to do: no read, and logits=False")
    options = {
        "strict": strict,
        "allow_empty_rows": allow_empty_rows,
        "mass": mass,
        "change": change,
    }
    variants = []
    for number, item in enumerate(edits):
        given = (item,) if isinstance(item, Edit) else tuple(item)
        with _noted(number, given):
            if strict and not logits:
                require_a_reader(model, given, names)
            variants.append(_variant(model, x, number, given, names, options))
    left = _run_clean(model, x, variants, names, logits, clean)
    groups: dict[tuple[int, bool], list[Variant]] = {}
    for variant in variants:
        if not variant.edits:
            variant.states, variant.logits = dict(left.states), left.logits
            yield variant.number, _run_of(model, x, variant, names)
        else:
            start = -1 if variant.start is None else variant.start
            groups.setdefault((start, variant.onset), []).append(variant)
    for (start, _), group in sorted(groups.items()):
        # in a packed tower all pictures lie in one row: such states are not cut along a batch
        size = 1 if start < 0 and model.family.vision.packed else batch_size
        for first in range(0, len(group), size):
            together = group[first : first + size]
            _run_batch(model, x, together, left, names, logits, strict, only)
            for variant in together:
                yield variant.number, _run_of(model, x, variant, names)
                variant.states, variant.logits = {}, None  # large, and the caller has them


def _run_of(model: Hooked, x: Inputs, variant: Variant, names: list[str]) -> Run:
    states = {name: variant.states[name] for name in names}
    # as a tuple: the table that `Receipts` is needs pandas, which a server may lack
    return Run(
        states, variant.logits, tuple(variant.receipts), x.grid, lambda n: model.grid_of(n, x)
    )


def _variant(
    model: Hooked,
    x: Inputs,
    number: int,
    edits: tuple[Edit, ...],
    names: list[str],
    options: dict[str, bool],
) -> Variant:
    """A variant, checked, that knows where it starts."""
    for edit in edits:
        if not isinstance(edit, Edit):
            raise TypeError(f"{edit!r} is no edit; each item is an edit or a list of edits")
    masks = [edit for edit in edits if isinstance(edit, MaskEdit)]
    values = [edit for edit in edits if isinstance(edit, ValueEdit)]
    check_together(values, model, x)
    for edit in values:
        edit.check(model, x)
    at = [name for edit in values for name in edit.names(model)]
    model.require(names)
    model.require(at, edited=True)
    receipts: list[Receipt] = []
    rows: Any = Rows(model)
    run_masks = RunMasks(rows, x, masks, receipts, **options) if masks else None
    variant = Variant(number, edits, rows, receipts, run_masks, values)
    rank = model.hooks.rank
    masked = [f"{layer.prefix}.attn.hook_q" for layer in _layers(variant)]
    first = min(map(rank, [*at, *masked]), default=-1)
    starts = [rank(f"blocks.{i}.hook_resid_pre") for i in range(model.cfg.n_layers)]
    if reached := sum(place <= first for place in starts):
        variant.start = reached - 1
        prefix = f"blocks.{variant.start}."
        outside = (f"{prefix}hook_resid_pre", f"{prefix}hook_resid_post")
        variant.onset = Onset.possible(model, variant.start) and not any(
            name.startswith(prefix) and name not in outside for name in names
        )
        variant.onset &= not any(name.startswith(prefix) for name in at)
        variant.onset &= first < rank("ln_final.hook_scale")
    return variant


def _layers(variant: Variant) -> list[LayerMask]:
    return variant.masks.layers if variant.masks else []


def _run_clean(
    model: Hooked,
    x: Inputs,
    variants: list[Variant],
    names: list[str],
    logits: bool,
    given: Clean | None,
) -> Clean:
    """The run that all variants share, as deep as one of them needs it."""
    rank = model.hooks.rank
    shared = [variant for variant in variants if variant.start is not None]
    whole = any(not variant.edits for variant in variants)  # a clean run was asked for
    last = max((rank(f"blocks.{v.start}.hook_resid_pre") for v in shared), default=-1)
    wanted = [name for name in names if whole or rank(name) <= last]
    return clean_run(
        model,
        x,
        wanted,
        logits=whole and logits,
        onsets={v.start for v in shared if v.start is not None and v.onset},
        starts={v.start for v in shared if v.start is not None and not v.onset},
        given=given,
    )


def _run_batch(
    model: Hooked,
    x: Inputs,
    variants: list[Variant],
    clean: Clean,
    names: list[str],
    logits: bool,
    strict: bool,
    only: Tensor | None,
) -> None:
    """Variants with the same start, in one forward pass."""
    n, rank = len(variants), model.hooks.rank
    start, onset = variants[0].start, variants[0].onset
    from_here = -1 if start is None else rank(f"blocks.{start}.hook_resid_pre") + onset
    late = [name for name in names if rank(name) >= from_here]
    batch = Batch(model, n)
    steps: list[Step] = []
    departing: list[tuple[Rows, list[Step]]] = []
    for number, variant in enumerate(variants):
        variant.rows.bind(batch, number)
        functions = [
            (name, as_function(edit, variant.rows, x, variant.receipts))
            for edit in variant.values
            for name in edit.names(model)
        ]
        own = value_steps(variant.rows, x, late, functions, variant.states)
        first: list[Step] = []
        for layer in _layers(variant):
            here = onset and layer.prefix == f"blocks.{start}"
            (first if here else own).extend(layer.steps())
        steps += [_noting(variant, step) for step in own]
        departing.append((variant.rows, [_noting(variant, step) for step in first]))
    tensors = {name: torch.cat([t] * n) for name, t in model.to_device(x).items()}
    if start is not None:
        tensors = {name: tensors[name] for name in ("input_ids", "attention_mask")}
        if onset:
            left = clean.onsets[start]
            steps += left.depart(departing)
            state = left.leaving  # its numbers do not matter: the block is given others
        else:
            before = clean.block_before(start)
            state = torch.empty(0) if before is None else before
        assert clean.inputs is not None
        steps += skip_to(model, start, state, clean.inputs, len(x), n)
    if only is not None and not (onset and names == [f"blocks.{start}.hook_resid_post"]):
        steps += narrowing(model, int(names[0].split(".")[1]), only)
    all_logits = forward(model, tensors, steps, logits)
    for number, variant in enumerate(variants):
        with _noted(variant.number, variant.edits):
            if variant.masks is not None:
                variant.masks.require_effects()
            if strict:
                require_felt(variant.values, variant.receipts)
        variant.receipts.sort(key=lambda receipt: rank(receipt.hook))
        early = {name: clean.states[name] for name in names if rank(name) < from_here}
        variant.states = {**early, **variant.states}
        if all_logits is not None:
            variant.logits = all_logits.narrow(0, number * len(x), len(x))


@contextmanager
def _noted(number: int, edits: Sequence[Any]) -> Iterator[None]:
    """Say in an error which variant it came from."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in variant {number} of run_many: {list(edits)!r}")
        raise


def _noting(variant: Variant, step: Step) -> Step:
    """The step, saying whose it is if it fails."""

    def act() -> None:
        with _noted(variant.number, variant.edits):
            step.act()

    return Step(step.rank, act)
