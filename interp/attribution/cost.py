"""What a study of heads will cost, said before it runs.

Counted, not guessed: how often the model is run, through how many blocks, and what is held in
memory. Only the time is measured, on one clean pass over the first batch, and scaled by the counts.

* a pass of `direct` or `gradient` goes through the towers and the blocks up to `end`; a backward
  pass costs about two such blocks for each block behind the first head;
* an exact unit goes through the blocks behind its own. In its own block only the reading positions
  are computed again, which is counted as a part of a block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from interp.attribution.question import Part, Question
from interp.many import POSITIONS, POSITIONS_ELSEWHERE

GB = 1e9
#: a block's backward pass in forward passes: gradients of states only, weights are frozen
BACKWARD = 2.0


@dataclass(frozen=True)
class Cost:
    """A study's cost.

    Attributes:
        forwards, backwards: passes of the model, whole or in part.
        blocks: block passes of the language model in all, each over one batch.
        gigabytes: held at the same time, beyond the weights.
        seconds: estimated from one measured pass; None if nothing was measured.
        batch_size: exact edits that go through the model together.
    """

    forwards: int
    backwards: int
    blocks: float
    gigabytes: float
    seconds: float | None
    batch_size: int

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)

    def __add__(self, other: Cost) -> Cost:
        """One after the other."""
        both = (self.seconds, other.seconds)
        return Cost(
            self.forwards + other.forwards,
            self.backwards + other.backwards,
            self.blocks + other.blocks,
            max(self.gigabytes, other.gigabytes),
            None if None in both else sum(both),  # type: ignore[arg-type]
            max(self.batch_size, other.batch_size),
        )

    def __str__(self) -> str:
        time_ = "not timed" if self.seconds is None else f"about {_spoken(self.seconds)}"
        back = f" and {self.backwards} backwards" if self.backwards else ""
        return (
            f"{self.forwards} forwards{back}, {self.blocks:,.0f} block passes, "
            f"{self.gigabytes:.2g} GB beyond the weights, {time_}"
        )


@dataclass(frozen=True)
class Pace:
    """Seconds of one batch: the towers, and one block of the language model."""

    before: float
    block: float


def pace(question: Question) -> Pace:
    """Measured on a clean pass over the first batch, the second of two."""
    model, x = question.model, question.parts[0].x
    last = f"blocks.{question.layers[-1]}.hook_resid_post"

    def seconds(call: Callable[[], Any]) -> float:
        call()
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    before = seconds(lambda: model.run(x, read="blocks.0.hook_resid_pre", logits=False))
    whole = seconds(lambda: model.run(x, read=last, logits=False))
    return Pace(before, max(whole - before, 1e-6) / (question.layers[-1] + 1))


def cost_of(
    question: Question,
    method: str,
    *,
    n_units: Sequence[int] | None = None,
    steps: int = 0,
    patch: bool = False,
    batch_size: int | None = None,
    measured: Pace | None = None,
) -> Cost:
    """The cost of one method.

    Args:
        question: what is asked.
        method: "direct", "gradient" or "exact".
        n_units: for "exact", by layer how many units are cut; by default all.
        steps: of integrated gradients.
        patch: whether another batch is run too.
        batch_size: for "exact", edits that go together; by default what `interp.many` takes.
        measured: for the time.
    """
    n_parts, last = len(question.parts), question.layers[-1]
    depth, behind = last + 1, len(question.layers)
    part = max(question.parts, key=lambda one: one.x.shape.numel())
    if method == "exact":
        size = batch_size or default_batch_size(question, part)
        _, n_heads, n_groups = question.shape
        counts = n_units or [n_heads * n_groups] * behind
        forwards = 1 + patch + sum(math.ceil(n / size) for n in counts)
        later = sum(
            n * (last - layer + onset_share(question))
            for n, layer in zip(counts, question.layers, strict=True)
        )
        blocks = (1 + patch) * depth + later
        gigabytes = _clean(question, part) + size * _variant(question, part)
        backwards = 0
    else:
        size = 1
        passes = 1 + patch + steps
        backwards = 0 if method == "direct" else 1 + steps
        forwards = passes
        blocks = passes * depth + backwards * BACKWARD * behind
        gigabytes = _graph(question, part) if backwards else _clean(question, part)
    seconds = None
    if measured is not None:  # the towers run once a batch, if they have not run by now
        towers = sum(one.clean.inputs is None for one in question.parts) + patch * n_parts
        seconds = towers * measured.before + n_parts * blocks * measured.block
    return Cost(
        forwards * n_parts, backwards * n_parts, blocks * n_parts, gigabytes / GB, seconds, size
    )


def onset_share(question: Question) -> float:
    """What of its own block a cut head makes anew: the positions that read, of all."""
    reading = sum(len(part.sources.position.unique()) for part in question.parts)
    return reading / sum(part.x.n_pos for part in question.parts)


def default_batch_size(question: Question, part: Part) -> int:
    """How many edits `interp.many` takes together if it is not told."""
    limit = POSITIONS.get(question.model.device.type, POSITIONS_ELSEWHERE)
    return max(1, limit // part.x.shape.numel())


def batch_size_within(question: Question, memory: float) -> int:
    """How many edits may go together so that the study stays within a budget.

    Args:
        question: what is asked.
        memory: GB beyond the weights.

    Raises:
        ValueError: not even one edit of the largest batch fits.
    """
    part = max(question.parts, key=lambda one: one.x.shape.numel())
    base, each = _clean(question, part), _variant(question, part)
    fits = int((memory * GB - base) // each)
    if fits < 1:
        raise ValueError(
            f"memory={memory} GB: one edit of a batch of {len(part.x)} pictures takes "
            f"{(base + each) / GB:.2g} GB beyond the weights; give more, or fewer pictures a batch"
        )
    return min(fits, default_batch_size(question, part))


def _sizes(question: Question, part: Part) -> tuple[int, int, int, int, int]:
    """(bytes a number, rows * positions, width, heads * d_head, width of the MLP)."""
    cfg = question.model.cfg
    config: Any = question.model.config
    text = config.get_text_config()
    n = part.x.shape.numel()
    mlp = int(getattr(text, "intermediate_size", 4 * cfg.d_model))
    return question.model.dtype.itemsize, n, cfg.d_model, cfg.n_heads * cfg.d_head, mlp


def _variant(question: Question, part: Part) -> float:
    """Bytes that one edited copy of a batch needs on its way through a block."""
    size, n, d_model, d_heads, d_mlp = _sizes(question, part)
    masks = n * part.x.n_pos * question.model.cfg.n_heads * (1 + size)  # bool, and as scores
    return n * size * (6 * d_model + 5 * d_heads + 3 * d_mlp) + 2 * masks


def _clean(question: Question, part: Part) -> float:
    """Bytes that the clean pass keeps: what each block was given and put out, and its heads."""
    size, n, d_model, d_heads, _ = _sizes(question, part)
    kept = len(question.layers) * n * size * (2 * d_model + 4 * d_heads)
    edges = 13 * sum(int((p.sources.group >= 0).sum()) for p in question.parts)
    return kept + edges + _variant(question, part)


def _graph(question: Question, part: Part) -> float:
    """Bytes of the graph behind the target, and of the lines of patterns made from it."""
    size, n, d_model, d_heads, d_mlp = _sizes(question, part)
    graph = len(question.layers) * n * size * (8 * d_model + 6 * d_heads + 4 * d_mlp)
    lines = 4 * 8 * len(part.sources) * question.model.cfg.n_heads * part.x.n_pos
    return graph + lines / max(1, len(part.x)) + _clean(question, part)


def _spoken(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
