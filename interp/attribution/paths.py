"""`path_attribution`: how much of one head's effect runs through another (path patching).

    paths = path_attribution(model, x, bank, labels=labels)     # the strongest heads by gradient
    paths = path_attribution(model, x, bank, labels=labels, pairs=[((0, 1), (2, 3))])

A head may carry much and write nothing along the target: it works for another head, which reads at
its source tokens what the first one left there. So the question is put for a pair, a *sender* B and
a *receiver* A of a later layer (path patching: Wang et al. 2022, 2211.00593; Goldowsky-Dill et al.
2023, 2304.05969):

    effect(B -> A) = m(clean) - m(A's output at its reading positions as if B were edited, all else
                              clean)

m is the target; the reading positions are the question's (`dst`), where the target looks. B works
elsewhere, at the tokens that A reads from, so **its edit is another one**: its z is set to zero, to
its mean, or to what it is on another batch (`patch`), at all positions, or at those named by `at`.

1. One clean run keeps what the steps below begin with.
2. Of every sender comes what each receiver's block is given once the sender is edited. `direct`:
   the clean stream, moved by what the edit changes in the sender's `hook_attn_out`, so that
   everything in between (other heads, MLPs) is frozen at clean. Not `direct`: the stream of a run
   with the edit, in which everything in between follows.
3. From that stream the receiver's queries, keys and values are made by its block's own norm and
   projections: those that `through` names. The others stay clean, so `("k", "v")` asks what B
   wrote at A's sources, and `("q",)` what it wrote where A reads.
4. One variant a path, all of them together (`interp.many`): these go in at A's hooks, attention is
   the model's own, other heads that share A's keys and values and A's other positions get their
   clean z again, and the target is read.

So the cost is a clean run and, for each path, the blocks from A's on; without `direct` also those
from B's on for each sender.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.attribution.asking import ask, check_words
from interp.attribution.cost import (
    GB,
    Cost,
    Pace,
    batch_size_within,
    cost_of,
    default_batch_size,
    pace,
)
from interp.attribution.gradient import gradients_at_z
from interp.attribution.path_steps import Head, Path, Sender, losses
from interp.attribution.path_table import ROWS, PathTable
from interp.attribution.question import Question
from interp.attribution.reading import read
from interp.attribution.text import head_name
from interp.errors import HeadError, Untestable
from interp.inputs import Inputs
from interp.model import MLLM
from interp.probes import ProbeBank
from interp.shipping import at_model

PARTS = ("q", "k", "v")


@overload
def path_attribution(
    model: MLLM, batch: Any, probes: Any = None, *, dry_run: Literal[True], **options: Any
) -> Cost: ...
@overload
def path_attribution(
    model: MLLM, batch: Any, probes: Any = None, *, dry_run: Literal[False] = False, **options: Any
) -> PathTable: ...
def path_attribution(
    model: MLLM,
    batch: Inputs | Sequence[Inputs],
    probes: ProbeBank | None = None,
    *,
    pairs: Iterable[Path] | None = None,
    top: int = 8,
    through: Sequence[str] = ("k", "v"),
    direct: bool = True,
    ablate: str | None = None,
    patch: Inputs | Sequence[Inputs] | None = None,
    at: Any = "all",
    memory: float | None = None,
    dry_run: bool = False,
    **question: Any,
) -> PathTable | Cost:
    """Effects of senders through receivers (see the module docstring).

    Args:
        model: of whose heads.
        batch: prepared pictures, one batch or several; one picture a row.
        probes: frozen probes at the question's `start` and `end`.
        pairs: which ((layer, head) of the sender, (layer, head) of the receiver). By default the
            `top` senders and the `top` receivers of one backward pass, by size of their effect to
            first order, as far as the sender lies in an earlier layer.
        top: how many of each.
        through: the receiver's inputs that see what the sender's edit changes, of "q", "k", "v".
        direct: freeze all that lies between sender and receiver.
        ablate: what the sender's z becomes: "zero" (the default) or "mean".
        patch: another batch of the same shape (or one a batch) that it is taken from, instead.
        at: positions at which the sender is edited, as edits take them: "all", "image", "text", ...
        memory: GB beyond the weights that may be in use.
        dry_run: say what it costs at most, and do nothing else than time one clean pass.
        question: what is asked: `labels`, `start`, `end`, `target`, `dst`, see
            `interp.attribution.asking.ask`.

    Returns:
        A `PathTable`, or with `dry_run` a `Cost`.

    Raises:
        ValueError: options that do not fit together.
        HeadError: a pair of heads that cannot be, or that the question is not about.
        Untestable: there is nothing to attribute, or no pair among the `top` heads.
    """
    check_words("path_attribution", question)
    if "sources" in question:
        raise ValueError(
            "a path counts whatever its receiver reads, so there are no sources= here; at= says "
            "where the sender is edited"
        )
    asked = ask(model, batch, probes, sources="whole", **question)
    if len(asked.layers) < 2:
        raise Untestable(
            f"a path needs two layers, and between {asked.start} and {asked.end} lies layer "
            f"{asked.layers[0]} alone"
        )
    sender = Sender.given(asked, ablate, patch, at)
    through = _through(through)
    wanted = None if pairs is None else _checked(asked, pairs)
    if top < 1:
        raise ValueError(f"top={top}; at least one head")
    size = None if memory is None else batch_size_within(asked, memory)

    def cost(paths: list[Path] | None, measured: Pace | None = None) -> Cost:
        return _cost(asked, paths, pairs is None, top, through, direct, sender, size, measured)

    if dry_run:
        return cost(wanted, pace(asked))
    if wanted is None:
        wanted = _strongest(asked, sender, top, through)
    found = [
        losses(model, asked.alone(number), wanted, through, direct, sender.alone(number), size)
        for number in range(len(asked.parts))
    ]
    between = "all between frozen" if direct else "all between follows"
    about = {
        "method": "path patching",
        **{k: v for k, v in asked.about().items() if k != "groups"},
        "how": f"{sender}; through {', '.join(through)}; {between}",
        "cost": cost(wanted).as_dict(),
    }
    return PathTable(_rows(wanted, torch.cat(found, 1).numpy()), about)


def _through(through: Sequence[str]) -> tuple[str, ...]:
    given = tuple(through)
    if not given or set(given) - set(PARTS):
        raise ValueError(f"through={through!r}: some of {', '.join(map(repr, PARTS))}")
    return tuple(part for part in PARTS if part in given)


def _checked(question: Question, pairs: Iterable[Path]) -> list[Path]:
    wanted = [((int(a), int(b)), (int(c), int(d))) for (a, b), (c, d) in pairs]
    _, n_heads, _ = question.shape
    layers = question.layers
    for sender, receiver in wanted:
        for layer, head in (sender, receiver):
            if layer not in layers or not 0 <= head < n_heads:
                raise HeadError(
                    f"no head {head_name(layer, head)} here: the question is about layers "
                    f"{layers[0]} to {layers[-1]}, with heads 0 to {n_heads - 1}"
                )
        if sender[0] >= receiver[0]:
            raise HeadError(
                f"{head_name(*sender)} cannot send to {head_name(*receiver)}: a receiver lies in "
                "a later layer"
            )
    if not wanted:
        raise ValueError("pairs is empty; leave it out for those of the strongest heads")
    return list(dict.fromkeys(wanted))


def _strongest(question: Question, sender: Sender, top: int, through: Sequence[str]) -> list[Path]:
    """All pairs of the `top` senders and receivers to first order, from one backward pass a batch.

    A receiver is worth gradient times z at the reading positions, a sender gradient times what its
    edit takes away. Where the target looks, most of that is no other head's doing; elsewhere all of
    it is, since only keys and values carry it on. So unless queries count, only that is taken.
    """
    model, layers = question.model, question.layers
    receives = torch.zeros(len(layers), model.cfg.n_heads, dtype=torch.float64)
    sends = receives.clone()
    for number in range(len(question.parts)):
        one, other = _worth(model, question.alone(number), sender.alone(number), "q" in through)
        receives += one
        sends += other
    receivers = _largest(receives, layers, top, layers[1:])
    senders = _largest(sends, layers, top, layers[:-1])
    paths = [(b, a) for b in senders for a in receivers if b[0] < a[0]]
    if not paths:
        raise Untestable(
            f"none of the {top} strongest senders lies before one of the {top} strongest "
            "receivers; take a larger top=, or give pairs="
        )
    return paths


@at_model
def _worth(model: MLLM, question: Question, sender: Sender, queries: bool) -> tuple[Tensor, Tensor]:
    """What each head is worth as a receiver and as a sender on the one batch of a question,
    `[layer, head]` each."""
    (part,), layers = question.parts, question.layers
    row, position = part.sources.row, part.sources.position
    reading = read(model, part.x, row, position, layers, question.end, grad=True, clean=part.clean)
    edit = sender.on(question, layers)
    receives, sends = [], []
    for layer, g in gradients_at_z(reading, part).items():
        look = reading.looks[layer]
        z = look.z.detach()
        receives.append((g * z)[row, position].double().sum((0, -1)).cpu())
        taken = z - edit(look.layer, None).change(z, f"{look.prefix}.hook_z", model, part.x)
        if not queries and part.score.row is not None:
            taken[part.score.row, part.score.position] = 0
        sends.append((g * taken).double().sum((0, 1, -1)).cpu())
    return torch.stack(receives), torch.stack(sends)


def _largest(values: Tensor, layers: range, top: int, among: range) -> list[Head]:
    """The heads of some layers with the largest values of either sign that are not 0."""
    found = [
        (layers[0] + i, head)
        for i, head in np.argwhere(values.numpy() != 0).tolist()
        if layers[0] + i in among
    ]
    found.sort(key=lambda at: -abs(float(values[at[0] - layers[0], at[1]])))
    return sorted(found[:top])


def _rows(paths: Sequence[Path], lost: np.ndarray) -> pd.DataFrame:
    """What was lost, `[n_paths, n_images]` as rows; nan has none."""
    path, image = np.nonzero(~np.isnan(lost))
    ends = np.array([(*b, *a) for b, a in paths])[path]
    columns = [*ends.T, image, lost[path, image]]
    return pd.DataFrame(dict(zip(ROWS, columns, strict=True)))


def _cost(
    question: Question,
    paths: Sequence[Path] | None,
    screened: bool,
    top: int,
    through: Sequence[str],
    direct: bool,
    sender: Sender,
    size: int | None,
    measured: Pace | None,
) -> Cost:
    """Of all batches; while the paths are not known, at most: all receivers in the second layer."""
    layers, cfg = question.layers, question.model.cfg
    if paths is None:
        n = min(top, (len(layers) - 1) * cfg.n_heads)
        senders, receivers = [n], [0, n * n]
    else:
        senders = np.bincount([layer - layers[0] for layer, _ in {b for b, _ in paths}]).tolist()
        receivers = np.bincount([a[0] - layers[0] for _, a in paths]).tolist()
    nothing = [0] * len(layers)
    patched, n_parts = bool(sender.others), len(question.parts)
    cost = cost_of(question, "exact", n_units=nothing, patch=patched, measured=measured)
    if screened:
        cost += cost_of(question, "gradient", patch=patched, measured=measured)
    together = size or default_batch_size(question, question.parts[0])
    for counts in [receivers] if direct else [senders, receivers]:
        forwards = n_parts * sum(math.ceil(n / together) for n in counts)
        blocks = n_parts * sum(n * (len(layers) - i) for i, n in enumerate(counts))
        seconds = None if measured is None else blocks * measured.block
        cost += Cost(forwards, 0, float(blocks), 0.0, seconds, together)
    widths = {"q": cfg.n_heads, "k": cfg.n_key_value_heads, "v": cfg.n_key_value_heads}
    held = sum(widths[part] * cfg.d_head for part in through) + cfg.d_model
    each = sum(receivers) if paths is None else len({(b, a[0]) for b, a in paths})
    n_pos = max(part.x.shape.numel() for part in question.parts)
    bytes_ = each * held * n_pos * question.model.dtype.itemsize
    return replace(cost, gigabytes=cost.gigabytes + bytes_ / GB)
