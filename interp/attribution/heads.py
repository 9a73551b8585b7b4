"""`head_attribution`: which heads, reading from which tokens, carry a target.

    table = head_attribution(model, x, bank, labels=labels, method="gradient")
    print(table)                            # the heads in order, with their intervals
    table.top(5); table.sources(); table.heatmap().show()

One function, one result, three methods, which answer the same question with the same sign, what
the target would lose:

| method | what it is | costs |
|---|---|---|
| "direct" | what each head wrote along the target's direction; a sum, no effect | 1 forward |
| "gradient" | what cutting it would change, to first order | 1 forward, 1 backward |
| "exact" | what cutting it does change | a partial forward a head and group |

Which heads a method names may differ: a head that another one builds on has written nothing along
the probe itself, so "direct" does not see it; one whose effect is saturated has no gradient. So
screen with one and verify with another: `interp.attribution.screen` does both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import numpy as np
import pandas as pd
from torch import Tensor

from interp.attribution.asking import ask, check_words
from interp.attribution.cost import Cost, batch_size_within, cost_of, pace
from interp.attribution.direct import direct
from interp.attribution.exact import exact
from interp.attribution.gradient import check_steps, gradient
from interp.attribution.question import Question
from interp.attribution.strongest import Strongest, edge_table
from interp.attribution.table import HeadTable
from interp.errors import Untestable
from interp.inputs import Inputs
from interp.model import MLLM
from interp.probes import ProbeBank

OnStep = Callable[[int, int], None]
METHODS = ("direct", "gradient", "exact")


@overload
def head_attribution(
    model: MLLM, batch: Any, probes: Any = None, *, dry_run: Literal[True], **options: Any
) -> Cost: ...
@overload
def head_attribution(
    model: MLLM, batch: Any, probes: Any = None, *, dry_run: Literal[False] = False, **options: Any
) -> HeadTable: ...
def head_attribution(
    model: MLLM,
    batch: Inputs | Sequence[Inputs],
    probes: ProbeBank | None = None,
    *,
    method: str = "gradient",
    corrected: bool = True,
    steps: int = 0,
    patch: Inputs | Sequence[Inputs] | None = None,
    edges: int = 0,
    memory: float | None = None,
    dry_run: bool = False,
    on_step: OnStep | None = None,
    **question: Any,
) -> HeadTable | Cost:
    """Attribute a target to heads and to the tokens they read from.

    Args:
        model: of whose heads.
        batch: prepared pictures, one batch or several; one picture a row.
        probes: frozen probes at `start` and `end`.
        method: "direct", "gradient" or "exact", see the module docstring.
        corrected: of "gradient": do the softmax exactly ("QK correction"), linearise the rest.
        steps: of "gradient": integrated gradients in so many steps.
        patch: of "gradient" and "exact": another batch of the same shape (or one a batch), whose
            heads' outputs are put in, instead of cutting edges; with sources="whole".
        edges: of "direct" and "gradient": keep so many of the strongest edges of each image, for
            `HeadTable.edges_on`.
        memory: of "exact": GB beyond the weights that may be in use.
        dry_run: say what it costs, and do nothing else than time one clean pass.
        on_step: called with (steps done, steps in all) while it runs; a step is a picture, for
            "exact" a head and group cut in a batch.
        question: what is asked: `labels`, `start`, `end`, `target`, `sources`, `dst`, see
            `interp.attribution.asking.ask`.

    Returns:
        A `HeadTable`, or with `dry_run` a `Cost`.

    Raises:
        ValueError: an unknown method, or options that do not fit together.
        Untestable: there is nothing to attribute.
        SumMismatch: the parts of "direct" do not add up.
    """
    check_words("head_attribution", question)
    asked = ask(model, batch, probes, **question)
    others = (patch,) if isinstance(patch, Inputs) else patch
    _check(method, corrected, steps, others, edges, memory)
    size = None if memory is None else batch_size_within(asked, memory)
    if dry_run:
        return cost_of(
            asked,
            method,
            steps=steps,
            patch=others is not None,
            batch_size=size,
            measured=pace(asked),
        )
    n_steps = asked.n_images if method != "exact" else math.prod(asked.shape) * len(asked.parts)
    done = counting(on_step, n_steps)
    strongest = Strongest(edges) if edges else None
    about: dict[str, Any] = {"method": method}
    if method == "direct":
        values = direct(asked, strongest, on_images=done).heads
    elif method == "gradient":
        about |= {"corrected": corrected, "steps": steps, "patched": patch is not None}
        values = gradient(
            asked,
            corrected=corrected,
            steps=steps,
            patch=others,
            strongest=strongest,
            on_images=done,
        )
    else:
        about |= {"patched": patch is not None}
        values = exact(asked, patch=others, batch_size=size, on_run=done)
    cost = cost_of(asked, method, steps=steps, patch=others is not None, batch_size=size)
    about["cost"] = cost.as_dict()
    return as_table(asked, values, about, strongest)


def counting(on_step: OnStep | None, total: int) -> Callable[[int], None] | None:
    """A function that is told how many steps were done just now, and tells `on_step` the sum."""
    if on_step is None:
        return None
    done = 0

    def more(n: int) -> None:
        nonlocal done
        done += n
        on_step(done, total)

    return more


def as_table(
    question: Question,
    values: Tensor,
    about: dict[str, Any],
    strongest: Strongest | None = None,
    **columns: np.ndarray,
) -> HeadTable:
    """Values `[n_images, layer, head, group]` as a `HeadTable`; NaNs have no row.

    Args:
        question: what was asked.
        values: of a method.
        about: of the method; what was asked is added.
        strongest: the edges that were kept.
        columns: more columns, by name, each of the shape of the values.
    """
    array = values.numpy()
    if np.isnan(array).all():
        raise Untestable(
            f"target {question.parts[0].score.name} is no number in any of the "
            f"{question.n_images} images: there is nothing to attribute"
        )
    image, layer, head, group = np.nonzero(~np.isnan(array))
    at = (image, layer, head, group)
    rows = pd.DataFrame(
        {
            "layer": layer + question.layers[0],
            "head": head,
            "source": np.asarray(question.groups, dtype=object)[group],
            "image": image,
            "estimate": array[at],
            **{name: values[at] for name, values in columns.items()},
        }
    )
    edges = edge_table(strongest, question)
    return HeadTable(rows, edges, {**question.about(), **about})


def _check(
    method: str,
    corrected: bool,
    steps: int,
    patch: Sequence[Inputs] | None,
    edges: int,
    memory: float | None,
) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r}; there are {', '.join(METHODS)}")
    given = {
        "corrected": (not corrected, ("gradient",)),
        "steps": (steps != 0, ("gradient",)),
        "patch": (patch is not None, ("gradient", "exact")),
        "edges": (edges != 0, ("direct", "gradient")),
        "memory": (memory is not None, ("exact",)),
    }
    for name, (there, where) in given.items():
        if there and method not in where:
            raise ValueError(
                f"{name}= is for method={' or '.join(map(repr, where))}, not {method!r}"
            )
    if patch is not None and not corrected:
        raise ValueError("corrected= is about cut edges, and patch= cuts none; leave one out")
    check_steps(steps)
    if edges < 0:
        raise ValueError(f"edges={edges}; how many of the strongest to keep of each image")
