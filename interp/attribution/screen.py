"""Screen by gradients, verify by knockouts, and say what may have been missed.

    table = attribute(model, x, bank, labels=labels, budget=0.05)
    print(table)                        # the last line tells how far the screening can be trusted

A gradient ranks all heads for the price of a few runs, and is wrong where something is saturated.
Knockouts are right and cost a run each. So:

1. all units (a head and a source group) are ranked by their gradient estimates;
2. the top share of them, the *budget*, is cut exactly, and these effects replace the estimates;
3. as many others are drawn *at random* from what the gradient thought little of, and cut as well.

The third step is what makes the first one honest. From the random ones one learns how often the
gradient overlooks a unit whose exact effect belongs among the largest `k`. If that happened to `s`
of `m`, then with 95% confidence it happens to at most a share `p` of all that were not cut (Clopper
and Pearson 1934), so that at most `p` times their number were missed. And the largest error seen
tells which estimates are too near the threshold to be sure of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
from scipy.stats import beta, spearmanr
from torch import Tensor

from interp.attribution.asking import ask, check_words
from interp.attribution.cost import Cost, batch_size_within, cost_of, pace
from interp.attribution.exact import all_units, exact, losses_of
from interp.attribution.gradient import check_steps, gradient
from interp.attribution.heads import OnStep, as_table, counting
from interp.attribution.question import Question
from interp.attribution.strongest import Strongest
from interp.attribution.table import HeadTable
from interp.edges import EdgeSet
from interp.edits import Knockout
from interp.errors import TableError
from interp.inputs import Inputs
from interp.model import MLLM
from interp.probes import ProbeBank
from interp.report.tables import records

CONFIDENCE = 0.95
#: random units below which a recall would rest on one of them
FEW = 10


@overload
def attribute(
    model: MLLM, batch: Any, probes: Any = None, *, dry_run: Literal[True], **options: Any
) -> Cost: ...
@overload
def attribute(
    model: MLLM, batch: Any, probes: Any = None, *, dry_run: Literal[False] = False, **options: Any
) -> HeadTable: ...
def attribute(
    model: MLLM,
    batch: Inputs | Sequence[Inputs],
    probes: ProbeBank | None = None,
    *,
    budget: float = 0.05,
    sample: float | None = None,
    k: int = 10,
    steps: int = 0,
    corrected: bool = True,
    edges: int = 0,
    memory: float | None = None,
    seed: int = 0,
    dry_run: bool = False,
    on_step: OnStep | None = None,
    **question: Any,
) -> HeadTable | Cost:
    """Rank all heads by gradient, verify the top ones exactly (see the module docstring).

    Args:
        model, batch, probes, memory, dry_run, on_step, question: as in `head_attribution`.
        budget: share of all units that is verified, the top ones.
        sample: share that is drawn at random from the others and verified; by default the budget.
        k: how many of the largest effects the verification speaks of.
        steps, corrected: of the gradient, see `head_attribution`.
        edges: keep so many of the strongest edges of each image, by their estimates.
        seed: of the draw.

    Returns:
        A `HeadTable` whose column `verified` tells which estimates are exact effects, and whose
        `about["verification"]` holds `n_units`, `n_verified` (the top ones), `n_sampled`,
        `spearman` of estimates and effects over all that were cut and `spearman_sample` over the
        random ones, `recall` of the exact top k (estimated, from ten random units on),
        `missed_at_most` (with `confidence`), `threshold` (the k-th largest effect),
        `largest_error` of an estimate in the random sample, and `within_reach`, how many estimates
        such an error would lift over the threshold.

    Raises:
        ValueError: a budget that is no share.
    """
    sample = budget if sample is None else sample
    check_steps(steps)
    if not 0 < budget <= 1 or not 0 <= sample <= 1 or k < 1:
        raise ValueError(
            f"budget={budget}, sample={sample}, k={k}: shares of all units, 0.05 is one in "
            "twenty, and at least the largest one (k=1)"
        )
    check_words("attribute", question)
    asked = ask(model, batch, probes, **question)
    size = None if memory is None else batch_size_within(asked, memory)
    n_units = math.prod(asked.shape)
    n_top = min(n_units, math.ceil(budget * n_units))
    n_sample = min(n_units - n_top, math.ceil(sample * n_units))
    cost = _cost(asked, n_top + n_sample, steps, size, timed=dry_run)
    if dry_run:
        return cost
    done = counting(on_step, asked.n_images + (n_top + n_sample) * len(asked.parts))
    strongest = Strongest(edges) if edges else None
    alone = len(asked.parts) == 1  # states of several batches would have to be held together
    estimates = gradient(
        asked, corrected=corrected, steps=steps, strongest=strongest, on_images=done, keep=alone
    )
    units, sizes = all_units(asked), mean_over_images(estimates).abs().flatten().numpy()
    order = np.argsort(-sizes, kind="stable")
    drawn = np.random.default_rng(seed).choice(order[n_top:], n_sample, replace=False)
    top, random = order[:n_top], np.sort(drawn)
    truth = exact(asked, [units[i] for i in (*top, *random)], batch_size=size, on_run=done)
    verified = ~truth.isnan().all(0, keepdim=True).expand_as(truth)
    values = truth.where(verified, estimates)
    about = {
        "method": "gradient, top verified",
        "steps": steps,
        "corrected": corrected,
        "budget": budget,
        "seed": seed,
        "cost": cost.as_dict(),
        "verification": _verification(estimates, truth, top, random, k),
    }
    return as_table(asked, values, about, strongest, verified=verified.numpy())


def verify_edges(
    table: HeadTable,
    model: MLLM,
    batch: Inputs | Sequence[Inputs],
    probes: ProbeBank | None = None,
    *,
    n: int = 20,
    **question: Any,
) -> HeadTable:
    """The table with the `n` strongest edges of each image cut one by one, and no others.

    Args:
        table: made with `edges=`, of the same question.
        model, batch, probes, question: of that question.
        n: edges of each image, the strongest by their estimates.

    Returns:
        A table whose edges have their exact effects as `estimate`, and what was estimated as
        `screened`; the strongest first.

    Raises:
        TableError: the table holds no edges, or is of another question.
    """
    check_words("verify_edges", question)
    if n < 1:
        raise ValueError(f"n={n} edges of each image; at least one")
    asked = ask(model, batch, probes, **question)
    if table.edges is None:
        raise TableError("the table has no edges: ask for some with edges=N")
    other = [key for key, value in asked.about().items() if table.about.get(key) != value]
    if other:
        raise TableError(
            f"this table answers another question: its {other[0]} is "
            f"{table.about.get(other[0])!r}, asked is {asked.about()[other[0]]!r}"
        )
    edges = table.edges.groupby("image", sort=True).head(n).reset_index(drop=True)
    edges["screened"] = edges["estimate"]
    for number, part in enumerate(asked.parts):
        here = edges["image"].between(part.first_image, part.first_image + len(part.x) - 1)
        variants = []
        for edge in records(edges[here]):
            row = edge["image"] - part.first_image
            one = EdgeSet.of(
                [(row, edge["src_position"], edge["dst_position"])], len(part.x), part.x.n_pos
            )
            variants.append([Knockout(one, layers=edge["layer"], heads=edge["head"])])
        row = edges.loc[here, "image"].to_numpy() - part.first_image
        found = losses_of(model, asked.alone(number), variants, None).numpy()
        edges.loc[here, "estimate"] = found[np.arange(len(row)), row]
    order = edges["estimate"].abs().sort_values(ascending=False, kind="stable").index
    return HeadTable(table.rows, edges.loc[order], table.about)


def mean_over_images(values: Tensor) -> Tensor:
    """Mean over the images that have a value, `[layer, head, group]`."""
    return values[~values.isnan().flatten(1).all(1)].mean(0)


def _verification(
    estimates: Tensor, effects: Tensor, top: np.ndarray, random: np.ndarray, k: int
) -> dict[str, Any]:
    """What cutting the top units and some random ones says about the ranking."""
    guess = mean_over_images(estimates).flatten().numpy()
    there = ~estimates.isnan().flatten(1).all(1)
    truth = effects[there].mean(0).flatten().numpy()  # NaN where nothing was cut
    cut = np.concatenate([top, random])
    best = np.where(np.isnan(truth), guess, truth)
    k = min(k, len(guess))
    threshold = float(np.sort(np.abs(best))[-k])
    # of the random ones: those that belong among the k, and that the gradient left out of them
    screened = set(np.argsort(-np.abs(guess), kind="stable")[:k].tolist())
    overlooked = sum(abs(truth[i]) >= threshold and int(i) not in screened for i in random.tolist())
    rest = np.setdiff1d(np.arange(len(guess)), cut)
    out: dict[str, Any] = {
        "k": k,
        "n_units": len(guess),
        "n_verified": len(top),
        "n_sampled": len(random),
        "spearman": _spearman(guess[cut], truth[cut]),
        "spearman_sample": _spearman(guess[random], truth[random]),
        "recall": None,
        "missed_at_most": None,
        "confidence": CONFIDENCE,
        "threshold": threshold,
        "largest_error": None,
        "within_reach": None,
    }
    if not len(rest):
        return {**out, "recall": 1.0, "missed_at_most": 0}
    if len(random):
        share = overlooked / len(random)
        upper = (
            1.0
            if overlooked == len(random)
            else float(beta.ppf(CONFIDENCE, overlooked + 1, len(random) - overlooked))
        )
        error = float(np.abs(guess - truth)[random].max())
        low = (np.abs(guess[rest]) < threshold) & (np.abs(guess[rest]) + error >= threshold)
        if len(random) >= FEW:
            out["recall"] = max(0.0, 1 - share * len(rest) / k)
        out["missed_at_most"] = math.floor(upper * len(rest))
        out["largest_error"], out["within_reach"] = error, int(low.sum())
    return out


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)


def _cost(
    question: Question, n_cut: int, steps: int, batch_size: int | None, *, timed: bool
) -> Cost:
    """Of the gradient, and of so many exact units, taken to lie evenly over the layers."""
    n_layers = len(question.layers)
    even = [n_cut // n_layers + (i < n_cut % n_layers) for i in range(n_layers)]
    measured = pace(question) if timed else None
    screening = cost_of(question, "gradient", steps=steps, measured=measured)
    verifying = cost_of(question, "exact", n_units=even, batch_size=batch_size, measured=measured)
    return screening + verifying
