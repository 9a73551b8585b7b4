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

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp import attention
from interp.edits.base import Edit
from interp.edits.masks import MaskEdit
from interp.edits.receipts import Receipt, Receipts
from interp.edits.values import ValueEdit, check_together
from interp.execution import Run, as_function, forward, require_a_reader, require_felt, value_steps
from interp.hooks import Pattern
from interp.inputs import Inputs
from interp.instrumented import Instrumented
from interp.masking import LayerMask, RunMasks
from interp.onset import Onset
from interp.rows import Batch, Rows
from interp.steps import BEFORE, Step

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


@dataclass
class Clean:
    """What the clean run left.

    Attributes:
        states: what was read.
        logits: if they were wanted.
        inputs: what the language model was given, (args, kwargs).
        before: by block, what the block before it put out.
        onsets: by block, all that is needed to leave the clean run there.
    """

    states: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    inputs: tuple[Any, dict[str, Any]] = ((), {})
    before: dict[int, Tensor] = field(default_factory=dict)
    onsets: dict[int, Onset] = field(default_factory=dict)


def run_many(
    model: Instrumented,
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
    clean = _run_clean(model, x, variants, names, logits)
    groups: dict[tuple[int, bool], list[Variant]] = {}
    for variant in variants:
        if not variant.edits:
            variant.states, variant.logits = dict(clean.states), clean.logits
        else:
            start = -1 if variant.start is None else variant.start
            groups.setdefault((start, variant.onset), []).append(variant)
    for (start, _), group in sorted(groups.items()):
        # in a packed tower all pictures lie in one row: such states are not cut along a batch
        size = 1 if start < 0 and model.family.vision.packed else batch_size
        for first in range(0, len(group), size):
            _run_batch(model, x, group[first : first + size], clean, names, logits, strict)
    return [
        Run(
            {name: variant.states[name] for name in names},
            variant.logits,
            Receipts(variant.receipts),
            x.grid,
            lambda name: model.grid_of(name, x),
        )
        for variant in variants
    ]


def _variant(
    model: Instrumented,
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
    attention.require(model.module, [*names, *at])
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
    model: Instrumented, x: Inputs, variants: list[Variant], names: list[str], logits: bool
) -> Clean:
    """The run that all variants share, as deep as one of them needs it."""
    clean, rank = Clean(), model.hooks.rank
    shared = [variant for variant in variants if variant.start is not None]
    whole = any(not variant.edits for variant in variants)  # a clean run was asked for
    last = max((rank(f"blocks.{v.start}.hook_resid_pre") for v in shared), default=-1)
    wanted = [name for name in names if whole or rank(name) <= last]
    steps = value_steps(model, x, wanted, [], clean.states)
    if shared:

        def keep_inputs() -> None:
            clean.inputs = _language(model).inputs

        steps.append(Step(rank("blocks.0.hook_resid_pre") + BEFORE, keep_inputs))
    for start in sorted({v.start for v in shared if v.start is not None and v.onset}):
        clean.onsets[start] = Onset(model, start)
        steps += clean.onsets[start].steps()
    for start in sorted({v.start for v in shared if v.start and not v.onset}):

        def keep(start: int = start) -> None:
            clean.before[start] = model.hook(f"blocks.{start - 1}.hook_resid_post").output

        steps.append(Step(rank(f"blocks.{start - 1}.hook_resid_post"), keep))
    if steps or (whole and logits):
        clean.logits = forward(model, model.to_device(x), steps, whole and logits)
    return clean


def _run_batch(
    model: Instrumented,
    x: Inputs,
    variants: list[Variant],
    clean: Clean,
    names: list[str],
    logits: bool,
    strict: bool,
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
            state = clean.before[start] if start else torch.empty(0)
        steps += _skip_to(model, start, state, clean.inputs, len(x), n)
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


def _skip_to(
    model: Instrumented, start: int, state: Tensor, inputs: Any, n_rows: int, n: int
) -> list[Step]:
    """Steps that hand the language model its clean inputs and skip its first `start` blocks.

    `state` is what a block put out, not what the next one takes: Qwen3-VL adds to it in between.
    """
    rank = model.hooks.rank

    def hand_over() -> None:
        _language(model).inputs = _repeated(inputs, n_rows, n)

    steps = [Step(rank("blocks.0.hook_resid_pre") + BEFORE, hand_over)]
    if start:
        state = torch.cat([state] * n)
    for layer in range(start):

        def skip(layer: int = layer) -> None:
            model.envoy(model.family.block_path(layer)).skip(state)

        steps.append(Step(rank(f"blocks.{layer}.hook_resid_pre") + BEFORE / 2, skip))
    return steps


def _language(model: Instrumented) -> Any:
    """The envoy of the stack that holds the language model's blocks."""
    return model.envoy(model.family.language.blocks.rpartition(".")[0])


def _repeated(value: Any, n_rows: int, n: int, name: str = "") -> Any:
    """What the language model is given, for `n` copies of its batch of `n_rows`."""
    if isinstance(value, dict):
        return {key: _repeated(one, n_rows, n, key) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_repeated(one, n_rows, n, name) for one in value)
    if not isinstance(value, Tensor):
        return value
    if name == "deepstack_visual_embeds":  # the image tokens of all rows, one after the other
        return torch.cat([value] * n)
    axis = int(name == "position_ids" and value.ndim == 3)  # [time, height and width, row, pos]
    if value.shape[axis] == 1 and n_rows > 1:
        return value  # the same for all rows
    return torch.cat([value] * n, dim=axis)


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
