"""A clean run, and what it leaves for runs that depart from it.

Edits of the language model leave everything before them as it was: the vision tower, the adapter,
the blocks before the first edited one. A clean run keeps what is needed to start behind all that:

* what the language model was given (its embeddings with the picture in them, masks, positions);
* by block, what the block before it put out, so that a run may begin there (`skip_to`);
* by block, all that went on in it, so that a run may leave the clean one in it (`Onset`).

Many edits of one input share one clean run (`interp.many`); and a clean run that was made for
another purpose can be used again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp.execution import forward, value_steps
from interp.hooked import Hooked
from interp.inputs import Inputs
from interp.onset import Onset
from interp.steps import BEFORE, Step

Given = tuple[tuple[Any, ...], dict[str, Any]]


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
    inputs: Given | None = None
    before: dict[int, Tensor] = field(default_factory=dict)
    onsets: dict[int, Onset] = field(default_factory=dict)

    def block_before(self, start: int) -> Tensor | None:
        """What the block before `start` put out, if that is known."""
        if start in self.before:
            return self.before[start]
        return self.onsets[start - 1].leaving if start - 1 in self.onsets else None

    def forget(self) -> None:
        """Let go of everything but what the language model was given."""
        self.logits = None
        for kept in (self.states, self.before, self.onsets):
            kept.clear()

    def has(
        self, names: Iterable[str], logits: bool, onsets: Iterable[int], starts: Iterable[int]
    ) -> bool:
        """Whether it holds all of this."""
        return (
            self.inputs is not None
            and all(name in self.states for name in names)
            and (self.logits is not None or not logits)
            and all(start in self.onsets for start in onsets)
            and all(not start or self.block_before(start) is not None for start in starts)
        )


def clean_run(
    model: Hooked,
    x: Inputs,
    names: Sequence[str],
    *,
    logits: bool = False,
    onsets: Iterable[int] = (),
    starts: Iterable[int] = (),
    given: Clean | None = None,
) -> Clean:
    """Run `x` without edits, no deeper than is asked for.

    Args:
        model: a loaded model.
        x: a batch.
        names: hooks to read.
        logits: compute them.
        onsets: blocks in which runs will leave it.
        starts: blocks at which runs will begin.
        given: an earlier clean run of `x`: all of this that it holds is taken from it, and what
            precedes the language model is not run again.
    """
    onsets, starts = sorted(onsets), sorted(start for start in starts if start)
    if given is not None and given.has(names, logits, onsets, starts):
        return given
    clean, rank = Clean(), model.hooks.rank
    first = rank("blocks.0.hook_resid_pre")
    steps = value_steps(model, x, names, [], clean.states)
    for start in onsets:
        clean.onsets[start] = Onset(model, start)
        steps += clean.onsets[start].steps()
    for start in starts:

        def keep(start: int = start) -> None:
            clean.before[start] = model.hook(f"blocks.{start - 1}.hook_resid_post").output

        steps.append(Step(rank(f"blocks.{start - 1}.hook_resid_post"), keep))
    if not steps and not logits:
        steps.append(Step(first, lambda: None))
    tensors = model.to_device(x)
    if given is not None and given.inputs is not None and not _before_language(model, names):
        clean.inputs = given.inputs
        steps.append(handing_over(model, given.inputs))
        tensors = {name: tensors[name] for name in ("input_ids", "attention_mask")}
    else:
        steps.append(keeping_inputs(model, clean))
    clean.logits = forward(model, tensors, steps, logits)
    return clean


def keeping_inputs(model: Hooked, clean: Clean) -> Step:
    """Keep what the language model is given."""

    def act() -> None:
        clean.inputs = language(model).inputs

    return Step(model.hooks.rank("blocks.0.hook_resid_pre") + BEFORE, act)


def handing_over(model: Hooked, inputs: Given, n_rows: int = 1, n: int = 1) -> Step:
    """Give the language model its clean inputs, `n` copies of its batch of `n_rows`."""

    def act() -> None:
        language(model).inputs = inputs if n == 1 else _repeated(inputs, n_rows, n)

    return Step(model.hooks.rank("blocks.0.hook_resid_pre") + BEFORE, act)


def _before_language(model: Hooked, names: Iterable[str]) -> bool:
    """Whether one of these hooks lies before the language model's blocks."""
    first = model.hooks.rank("blocks.0.hook_resid_pre")
    return any(model.hooks.rank(name) < first for name in names)


def skip_to(
    model: Hooked, start: int, state: Tensor, inputs: Given, n_rows: int, n: int
) -> list[Step]:
    """Steps that hand the language model its clean inputs and skip its first `start` blocks.

    `state` is what a block put out, not what the next one takes: Qwen3-VL adds to it in between.
    """
    rank = model.hooks.rank
    steps = [handing_over(model, inputs, n_rows, n)]
    if start:
        state = torch.cat([state] * n)
    for layer in range(start):

        def skip(layer: int = layer) -> None:
            model.envoy(model.family.block_path(layer)).skip(state)

        steps.append(Step(rank(f"blocks.{layer}.hook_resid_pre") + BEFORE / 2, skip))
    return steps


def language(model: Hooked) -> Any:
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
