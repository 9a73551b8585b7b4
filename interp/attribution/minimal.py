"""`minimal_heads`: the fewest heads that carry a target, found on some images, judged on others.

    found = minimal_heads(model, batches, bank, labels=labels, sources="same-region correct")
    print(found)

**What is removed.** Cutting a head's edges from the question's source groups to its readers takes
something from the target m; so does cutting a set S of heads together, and cutting all heads
between `start` and `end`. What the last takes is what the target owes to that reading (for the
default target: the recovery carried by attention), and

    share(S) = sum over images of [m(clean) - m(S cut)] / sum over images of [m(clean) - m(all cut)]

It may lie above 1 or below 0: some heads work against the target, and effects do not add up.

**How the set is found.** Greedily with exact steps: every candidate left is cut together with the
heads taken so far, and the one with which most is removed is taken, until the share is reached or
no candidate is left. Each step is the best single addition; the set as a whole need not be the
smallest there is (two heads that replace each other look worthless one by one). Candidates are the
heads with the largest first-order effects, since exact steps over all heads would take
n (n + 1) / 2 runs.

**How it is judged.** On images that took no part in the choice (`held_out`, or the second half of
the batches), against random sets of as many heads, drawn from all heads of the question. A set is
worth something if it removes more than those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import numpy as np
import pandas as pd
import torch

from interp.attribution.asking import Labels, ask, check_words
from interp.attribution.cost import (
    Cost,
    Pace,
    batch_size_within,
    cost_of,
    default_batch_size,
    onset_share,
    pace,
)
from interp.attribution.exact import effects, open_edges
from interp.attribution.gradient import gradient
from interp.attribution.head_set import HELD_OUT, Head, MinimalHeads
from interp.attribution.question import Part, Question
from interp.attribution.text import head_name
from interp.edges import EdgeSet
from interp.edits import Knockout
from interp.edits.tensors import Frozen
from interp.errors import HeadError, Untestable
from interp.inputs import Inputs
from interp.model import MLLM
from interp.probes import ProbeBank
from interp.shipping import at_model
from interp.stats import bootstrap, ratio

N_CANDIDATES = 16
CUT = "cut"  # the one source group that is left: all that the question names
SLACK = 1e-6  # a share that misses its goal by rounding has reached it


@overload
def minimal_heads(
    model: MLLM, batch: Any, probes: Any = None, *, dry_run: Literal[True], **options: Any
) -> Cost: ...
@overload
def minimal_heads(
    model: MLLM, batch: Any, probes: Any = None, *, dry_run: Literal[False] = False, **options: Any
) -> MinimalHeads: ...
def minimal_heads(
    model: MLLM,
    batch: Inputs | Sequence[Inputs],
    probes: ProbeBank | None = None,
    *,
    share: float = 0.8,
    candidates: int | Iterable[Head] = N_CANDIDATES,
    held_out: Inputs | Sequence[Inputs] | None = None,
    held_out_labels: Labels | None = None,
    n_random: int = 20,
    seed: int = 0,
    memory: float | None = None,
    dry_run: bool = False,
    **question: Any,
) -> MinimalHeads | Cost:
    """The fewest heads whose joint knockout removes a share (see the module docstring).

    Args:
        model: of whose heads.
        batch: prepared pictures to choose on, one picture a row. Without `held_out` at least two
            batches, of which the second half is held out.
        probes: frozen probes at the question's `start` and `end`.
        share: how much of what cutting all heads removes is to be removed, above 0 and up to 1.
        candidates: heads (layer, head) to choose from, or how many: those with the largest
            first-order effects on the selection images.
        held_out: prepared pictures to judge on, none of them in `batch`.
        held_out_labels: their `labels`.
        n_random: random sets to compare with.
        seed: of these sets and of the intervals.
        memory: GB beyond the weights that may be in use.
        dry_run: say what it costs at most, and do nothing else than time one clean pass.
        question: what is asked: `labels`, `start`, `end`, `target`, `sources`, `dst`, see
            `interp.attribution.asking.ask`. What is cut is the edges from `sources`.

    Returns:
        `MinimalHeads`, or with `dry_run` a `Cost`. A share that all candidates together do not
        reach is no error: `reached` is False.

    Raises:
        ValueError: options that do not fit together; nothing held out; the same picture twice.
        HeadError: candidates that the question is not about.
        Untestable: cutting all heads does not lower the target, or too few images have one.
    """
    check_words("minimal_heads", question)
    if not 0 < share <= 1:
        raise ValueError(f"share={share}; above 0 and up to 1 of what cutting all heads removes")
    if n_random < 1:
        raise ValueError(f"n_random={n_random}; at least one random set to compare with")
    chosen_on, judged_on = _halves(model, batch, probes, held_out, held_out_labels, question)
    groups = chosen_on.groups
    chosen_on, judged_on = _merged(chosen_on), _merged(judged_on)
    every = [(layer, head) for layer in chosen_on.layers for head in range(chosen_on.shape[1])]
    given = None if isinstance(candidates, int) else _checked(candidates, every)
    n_wanted = min(candidates, len(every)) if isinstance(candidates, int) else len(given or ())
    if n_wanted < 1:
        raise ValueError("no candidates to choose from; give some heads, or how many to screen for")
    size = None
    if memory is not None:
        size = min(batch_size_within(one, memory) for one in (chosen_on, judged_on))

    def cost(n_steps: int, measured: Pace | None = None) -> Cost:
        counts = [n_wanted - i for i in range(n_steps)], [n_steps + n_random]
        return _cost(chosen_on, judged_on, counts, given is None, size, measured)

    if dry_run:
        return cost(n_wanted, pace(chosen_on))
    all_chosen = _lost(chosen_on, [every], size)[0]
    all_judged = _lost(judged_on, [every], size)[0]
    _require_effect(all_chosen, all_judged, len(every))
    tried = _largest(chosen_on, every, n_wanted) if given is None else given
    taken, shares = _greedy(chosen_on, tried, all_chosen, share, size)
    rng = np.random.default_rng(seed)
    drawn = [
        tuple(sorted(every[i] for i in rng.choice(len(every), len(taken), replace=False)))
        for _ in range(n_random)
    ]
    judged = _judged(judged_on, taken, drawn, all_judged, size, seed)
    steps = judged.pop("steps")
    steps.insert(3, "selection", shares)
    about = {
        "method": "minimal heads",
        **chosen_on.about(),
        "groups": list(groups),
        "n_images": chosen_on.n_images + judged_on.n_images,
        "n_selection": int((~np.isnan(all_chosen)).sum()),
        "n_held_out": int((~np.isnan(all_judged)).sum()),
        "n_heads": len(every),
        "n_random": n_random,
        "seed": seed,
        "cost": cost(len(taken)).as_dict(),
    }
    return MinimalHeads(
        heads=tuple(taken),
        goal=share,
        reached=shares[-1] >= share - SLACK,
        steps=steps,
        random_sets=tuple(drawn),
        candidates=tuple(tried),
        about=about,
        **judged,
    )


# -- what is asked ---------------------------------------------------------------------------------


def _halves(
    model: MLLM,
    batch: Inputs | Sequence[Inputs],
    probes: ProbeBank | None,
    held_out: Inputs | Sequence[Inputs] | None,
    held_out_labels: Labels | None,
    question: dict[str, Any],
) -> tuple[Question, Question]:
    """The question on the selection images, and on those held out."""
    asked = ask(model, batch, probes, **question)
    if held_out is None:
        if held_out_labels is not None:
            raise ValueError("held_out_labels= are those of held_out=, which is not given")
        if len(asked.parts) < 2:
            raise ValueError(
                "one batch, and nothing held out: heads are judged on images that they were not "
                "chosen on; give held_out=, or the pictures in two batches or more"
            )
        half = (len(asked.parts) + 1) // 2
        first, second = asked.parts[:half], asked.parts[half:]
        halves = replace(asked, parts=first), replace(asked, parts=second)
    else:
        if (question.get("labels") is None) != (held_out_labels is None):
            raise ValueError("labels= and held_out_labels= go together: one each, or none")
        other = ask(model, held_out, probes, **{**question, "labels": held_out_labels})
        halves = asked, other
    _require_others(*halves)
    return halves


def _require_others(chosen_on: Question, judged_on: Question) -> None:
    """Raise for a picture in both."""
    known = {digest for part in chosen_on.parts for digest in _pictures(part.x)}
    for number, part in enumerate(judged_on.parts):
        for row, digest in enumerate(_pictures(part.x)):
            if digest in known:
                raise ValueError(
                    f"a picture that heads are to be judged on (batch {number} of those held out, "
                    f"row {row}) is among those that they are chosen on; hold out others"
                )


def _pictures(x: Inputs) -> list[str]:
    """What tells pictures apart: one a row, or one for all where they are not kept by row."""
    pixels = x.tensors["pixel_values"]
    return [Frozen(one).digest for one in (pixels if len(pixels) == len(x) else [pixels])]


def _merged(question: Question) -> Question:
    """The same with all source groups as one."""
    parts = []
    for part in question.parts:
        group = torch.where(part.sources.group >= 0, 0, -1).to(torch.int8)
        sources = replace(part.sources, names=(CUT,), group=group)
        parts.append(replace(part, sources=sources, edges={}))
    return replace(question, parts=tuple(parts), groups=(CUT,))


def _checked(candidates: Iterable[Head], every: Sequence[Head]) -> list[Head]:
    wanted = list(dict.fromkeys((int(layer), int(head)) for layer, head in candidates))
    for head in wanted:
        if head not in every:
            raise HeadError(
                f"no head {head_name(*head)} here: the question is about heads "
                f"{head_name(*every[0])} to {head_name(*every[-1])}"
            )
    return wanted


def _require_effect(chosen: np.ndarray, judged: np.ndarray, n_heads: int) -> None:
    """Raise unless there is something to remove, in both halves."""
    for lost, name, least in ((chosen, "selection", 1), (judged, "held-out", 2)):
        n = int((~np.isnan(lost)).sum())
        if n < least:
            raise Untestable(
                f"{n} of the {len(lost)} {name} images have a target, and {least} must; give more"
            )
        if np.nansum(lost) <= 0:
            raise Untestable(
                f"cutting all {n_heads} heads does not lower the target on the {name} images "
                f"(mean loss {np.nanmean(lost):+.3g}): attention carries nothing there of which a "
                "share could be removed"
            )


# -- the search ------------------------------------------------------------------------------------


def _largest(question: Question, every: Sequence[Head], n: int) -> list[Head]:
    """The `n` heads with the largest first-order effects, the largest first."""
    mean = np.nanmean(gradient(question).numpy(), 0)[..., 0]  # [layer, head]
    order = np.argsort(-mean, axis=None, kind="stable")[:n]
    return [every[i] for i in order]


def _greedy(
    question: Question,
    candidates: Sequence[Head],
    whole: np.ndarray,
    share: float,
    batch_size: int | None,
) -> tuple[list[Head], list[float]]:
    """Heads in the order they are taken, and the share that is removed after each."""
    left, taken, shares = list(candidates), list[Head](), list[float]()
    while left and not (shares and shares[-1] >= share - SLACK):
        lost = _lost(question, [[*taken, head] for head in left], batch_size)
        removed = np.nansum(lost, 1) / np.nansum(whole)
        best = int(removed.argmax())
        taken.append(left.pop(best))
        shares.append(float(removed[best]))
    return taken, shares


def _lost(question: Question, sets: Sequence[Sequence[Head]], batch_size: int | None) -> np.ndarray:
    """What the target loses when each set is cut, `[n_sets, n_images]`; nan without a target."""
    found = []
    for number, part in enumerate(question.parts):
        found.append(_lost_of(question.model, question.alone(number), sets, batch_size))
        part.clean.forget()  # all batches' states together might not fit
    return torch.cat(found, 1).numpy()


@at_model
def _lost_of(
    model: MLLM, question: Question, sets: Sequence[Sequence[Head]], batch_size: int | None
) -> torch.Tensor:
    """The same on the one batch of a question, `[n_sets, n_rows]`."""
    (part,) = question.parts
    edits = [_knockouts(question, part, heads) for heads in sets]
    return effects(question, part, edits, batch_size=batch_size)


def _judged(
    question: Question,
    taken: Sequence[Head],
    drawn: Sequence[Sequence[Head]],
    whole: np.ndarray,
    batch_size: int | None,
    seed: int,
) -> dict[str, Any]:
    """Shares of the first n heads taken and of the random sets, with intervals, on other images."""
    there = ~np.isnan(whole)
    prefixes = [taken[: n + 1] for n in range(len(taken))]
    lost, whole = _lost(question, [*prefixes, *drawn], batch_size)[:, there], whole[there]
    mine, theirs = lost[: len(taken)], lost[len(taken) :]
    pooled = theirs.mean(0)  # an image's weight covers all sets of it
    rows = [
        (n + 1, *taken[n], *bootstrap(ratio, one, whole, seed=seed).as_dict().values())
        for n, one in enumerate(mine)
    ]
    return {
        "steps": pd.DataFrame(rows, columns=["n", "layer", "head", *HELD_OUT]),
        "whole": bootstrap(ratio, whole, np.ones(len(whole)), seed=seed),
        "random": bootstrap(ratio, pooled, whole, seed=seed),
        "beyond": bootstrap(lambda a, b, c: ratio(a - b, c), mine[-1], pooled, whole, seed=seed),
        "random_shares": tuple((theirs.sum(1) / whole.sum()).tolist()),
    }


def _knockouts(question: Question, part: Part, heads: Sequence[Head]) -> list[Knockout]:
    """One knockout for all layers that close the same edges."""
    by_edges: dict[int, tuple[EdgeSet, dict[int, list[int]]]] = {}
    for layer, head in sorted(heads):
        edges = open_edges(question, part, layer, 0)
        if len(edges):
            _, chosen = by_edges.setdefault(id(edges), (edges, {}))
            chosen.setdefault(layer, []).append(head)
    return [Knockout(edges, heads=chosen) for edges, chosen in by_edges.values()]


def _cost(
    chosen_on: Question,
    judged_on: Question,
    counts: tuple[list[int], list[int]],
    screened: bool,
    batch_size: int | None,
    measured: Pace | None,
) -> Cost:
    """At most: sets that begin in different layers go apart, each from the first layer on.

    Args:
        chosen_on, judged_on: the two halves.
        counts: for each of them, how many sets are cut in each round, after one of all heads.
        screened: whether candidates are to be found.
        batch_size: sets that go together.
        measured: for the time.
    """
    n_layers = len(chosen_on.layers)
    total = cost_of(chosen_on, "gradient", measured=measured) if screened else None
    for question, rounds in zip((chosen_on, judged_on), counts, strict=True):
        size = batch_size or default_batch_size(question, question.parts[0])
        clean = cost_of(
            question, "exact", n_units=[0] * n_layers, batch_size=size, measured=measured
        )
        n_parts = len(question.parts)
        for n in (1, *rounds):
            forwards = n_parts * min(n, math.ceil(n / size) + n_layers - 1)
            blocks = n_parts * n * (n_layers - 1 + onset_share(question))
            seconds = None if measured is None else blocks * measured.block
            cut = Cost(forwards, 0, blocks, 0.0, seconds, size)
            total = clean + cut if total is None else total + clean + cut
    assert total is not None
    return total
