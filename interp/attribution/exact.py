"""Exact effects: every head cut in turn, and the target read again.

`effects` is the one place where attribution runs edits: it takes lists of them, runs each on the
question's batches through `interp.many` (the vision tower once, blocks before an edit once, nothing
behind `end`), takes the target of each run, and forgets the run. `exact` makes the lists: a unit is
a head and a source group, and its edit cuts the head's edges from that group. What the layer's mask
closes is left out; a unit without an open edge has the effect 0, and is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from interp.attribution.question import Part, Question
from interp.attribution.reading import read
from interp.clean import Clean
from interp.edges import EdgeSet
from interp.edits import Knockout, Patch
from interp.edits.base import Edit
from interp.errors import HeadError
from interp.execution import Run, execute
from interp.inputs import Inputs
from interp.many import each_run
from interp.model import MLLM
from interp.shipping import at_model

#: (layer, head, number of the source group)
Unit = tuple[int, int, int]


def exact(
    question: Question,
    units: Iterable[Unit] | None = None,
    *,
    patch: Sequence[Inputs] | None = None,
    batch_size: int | None = None,
    on_run: Callable[[int], None] | None = None,
) -> Tensor:
    """Effects by knockout, `[n_images, layer, head, group]`; NaN where nothing was asked.

    Args:
        question: what is asked.
        units: which (layer, head, group) to cut; by default all.
        patch: one other batch a batch, whose heads' outputs are put in instead of cutting.
        batch_size: edits in one forward pass at most, see `interp.many`.
        on_run: called with the number of edits done.
    """
    wanted = all_units(question) if units is None else list(units)
    there = set(all_units(question))
    if strange := [unit for unit in wanted if unit not in there]:
        raise HeadError(
            f"unit {strange[0]}: (layer, head, group) with layers {question.layers[0]} to "
            f"{question.layers[-1]}, {question.shape[1]} heads and groups {list(question.groups)}"
        )
    if patch is not None:
        patch = question.patched_by(patch)
    here = question.model.host is None  # a server tells when it is done
    found = []
    for number, part in enumerate(question.parts):
        other = None if patch is None else patch[number]
        alone, told = question.alone(number), on_run if here else None
        found.append(_part(question.model, alone, wanted, other, batch_size, told))
        part.clean.forget()
        if on_run and not here:
            on_run(len(wanted))
    return torch.cat(found)


@at_model
def _part(
    model: MLLM,
    question: Question,
    wanted: Sequence[Unit],
    patch: Inputs | None,
    batch_size: int | None,
    on_run: Callable[[int], None] | None,
) -> Tensor:
    """The effects on the one batch of a question."""
    (part,) = question.parts
    layers, n_heads, n_groups = question.shape
    out = torch.full((len(part.x), layers, n_heads, n_groups), torch.nan, dtype=torch.float64)
    if patch is None:
        edits = [cuts(question, part, [unit]) for unit in wanted]
    else:
        edits = _patches(question, part, patch, wanted)
    effect = effects(
        question,
        part,
        edits,
        strict=patch is None,  # a head may give the same on both batches
        batch_size=batch_size,
        on_run=on_run,
    )
    for one, (layer, head, group) in zip(effect, wanted, strict=True):
        out[:, layer - question.layers[0], head, group] = one
    return out


@at_model
def losses_of(
    model: MLLM, question: Question, variants: Sequence[Sequence[Edit]], batch_size: int | None
) -> Tensor:
    """`effects` of lists of edits on the one batch of a question, wherever the model is."""
    (part,) = question.parts
    return effects(question, part, variants, batch_size=batch_size)


def all_units(question: Question) -> list[Unit]:
    """Every (layer, head, group) of a question, in order."""
    _, n_heads, n_groups = question.shape
    return [(i, h, g) for i in question.layers for h in range(n_heads) for g in range(n_groups)]


def effects(
    question: Question,
    part: Part,
    variants: Sequence[Sequence[Edit]],
    *,
    strict: bool = True,
    batch_size: int | None = None,
    clean: Clean | None = None,
    on_run: Callable[[int], None] | None = None,
) -> Tensor:
    """What the target loses by each list of edits, on one batch: `[n_variants, n_rows]`.

    Args:
        question: what is asked.
        part: on which batch.
        variants: lists of edits; an empty one has the effect 0.
        strict: raise for edits that change nothing.
        batch_size: of `interp.many`.
        clean: a clean run of the batch; by default what the question holds of it.
        on_run: called with the number of variants done.
    """
    scores = torch.zeros(len(variants), len(part.x), dtype=torch.float64)
    before = torch.zeros(len(part.x), dtype=torch.float64)
    doing = [number for number, edits in enumerate(variants) if edits]
    made = each_run(
        question.model,
        part.x,
        [(), *(variants[number] for number in doing)],
        read=None if question.end == "logits" else question.end,
        logits=question.end == "logits",
        strict=strict,
        mass=False,
        allow_empty_rows=True,
        batch_size=batch_size,
        clean=part.clean if clean is None else clean,
        only=part.read_at,
    )
    for number, run in made:
        score = _score(part, run)
        if number == 0:
            before = score
        else:
            scores[doing[number - 1]] = score
        if on_run and number:
            on_run(1)
    untouched = [number for number, edits in enumerate(variants) if not edits]
    scores[untouched] = before
    if on_run and untouched:
        on_run(len(untouched))
    return before - scores


def cuts(question: Question, part: Part, units: Iterable[Unit]) -> list[Edit]:
    """The knockouts of some units on one batch; none for those without an open edge."""
    edits: list[Edit] = []
    for layer, head, group in units:
        edges = open_edges(question, part, layer, group)
        if len(edges):
            edits.append(Knockout(edges, layers=layer, heads=head))
    return edits


def open_edges(question: Question, part: Part, layer: int, group: int) -> EdgeSet:
    """The edges from a source group to the readers that a layer's mask leaves open."""
    if not part.masks:
        sources = part.sources
        reading = read(
            question.model,
            part.x,
            sources.row,
            sources.position,
            question.layers,
            question.end,
            clean=part.clean,
            keep=True,
            only=part.read_at,
        )
        part.masks.update(reading.masks)
    mask = part.masks[layer]
    # most layers have the same mask: their edges are made once
    same = next(at for at, other in part.masks.items() if torch.equal(other, mask))
    if (same, group) not in part.edges:
        part.edges[same, group] = part.sources.edges(group, mask, len(part.x))
    return part.edges[same, group]


def _patches(
    question: Question, part: Part, other: Inputs, units: Sequence[Unit]
) -> list[list[Edit]]:
    """Edits that put in what heads give on another batch, at the reading positions."""
    read_z = [f"blocks.{layer}.attn.hook_z" for layer in question.layers]
    run = execute(question.model, other, read=read_z, logits=False)
    at = torch.zeros(len(part.x), part.x.n_pos, dtype=torch.bool)
    at[part.sources.row, part.sources.position] = True
    return [
        [Patch(f"blocks.{layer}.attn.hook_z", from_=run, heads=head, positions=at)]
        for layer, head, _ in units
    ]


def _score(part: Part, run: Run) -> Tensor:
    with torch.no_grad():
        return part.score.of(run)
