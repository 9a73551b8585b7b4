"""The steps of path patching on one batch: see `interp.attribution.paths`.

`Sender` says what is done to a sender's z, and `losses` what the target loses by each path. Nothing
of attention is written again here. What a receiver's block is given goes through the block's own
norm and projections, called as modules; the outcome is patched in at the receiver's hooks, in front
of rotation and whatever else a family does there, and the model itself attends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from interp.attribution.exact import effects
from interp.attribution.question import Part, Question
from interp.clean import Clean, clean_run
from interp.edits import Ablate, Patch, ValueEdit
from interp.edits.tensors import Source
from interp.errors import SumMismatch
from interp.execution import execute
from interp.families.base import module_at
from interp.inputs import Inputs
from interp.many import each_run
from interp.model import MLLM
from interp.shipping import at_model

Head = tuple[int, int]  # layer, head
Path = tuple[Head, Head]  # sender, receiver
#: by sender and receiver's layer, what enters that block
Given = dict[tuple[Head, int], Tensor]
#: the edit of a layer's head, or of all its heads
EditOf = Callable[[int, int | None], ValueEdit]


@dataclass(frozen=True, eq=False)
class Sender:
    """What is done to a sender's z; make one with `given`.

    Attributes:
        with_: "zero", "mean", or "patch".
        others: for "patch", one batch a batch.
        at: positions.
    """

    with_: str
    others: tuple[Inputs, ...]
    at: Any

    @classmethod
    def given(
        cls,
        question: Question,
        ablate: str | None,
        patch: Inputs | Sequence[Inputs] | None,
        at: Any,
    ) -> Sender:
        """From the arguments of `path_attribution`, checked."""
        if patch is None:
            if ablate not in (None, "zero", "mean"):
                raise ValueError(f'ablate={ablate!r}: "zero" or "mean", or patch= another batch')
            return cls(ablate or "zero", (), at)
        if ablate is not None:
            raise ValueError(f"ablate={ablate!r} and patch= both say what the sender becomes")
        others = (patch,) if isinstance(patch, Inputs) else tuple(patch)
        return cls("patch", tuple(question.patched_by(others)), at)

    def __str__(self) -> str:
        what = "patched from another batch" if self.others else f"set to {self.with_}"
        where = f"{self.at} positions" if isinstance(self.at, str) else "chosen positions"
        return f"sender {what} at {where}"

    def alone(self, number: int) -> Sender:
        """On one of the question's batches."""
        return replace(self, others=self.others[number : number + 1])

    def on(self, question: Question, layers: Iterable[int]) -> EditOf:
        """Its edits in some layers, on the one batch of a question."""
        names = {layer: f"blocks.{layer}.attn.hook_z" for layer in layers}
        if not self.others:
            return lambda layer, head: Ablate(
                names[layer], with_=self.with_, heads=head, positions=self.at
            )
        (other,) = self.others
        run = execute(question.model, other, read=list(names.values()), logits=False)
        sources = {layer: Source(run.states, name) for layer, name in names.items()}
        return lambda layer, head: Patch(
            names[layer], from_=sources[layer], heads=head, positions=self.at
        )


@at_model
def losses(
    model: MLLM,
    question: Question,
    paths: Sequence[Path],
    through: Sequence[str],
    direct: bool,
    sender: Sender,
    batch_size: int | None,
) -> Tensor:
    """What the target loses by each path on the one batch of a question, `[n_paths, n_rows]`; nan
    for a row without a target."""
    (part,) = question.parts
    edit = sender.on(question, {b[0] for b, _ in paths})
    names = [
        f"blocks.{a[0]}.{hook}" for _, a in paths for hook in ("hook_resid_pre", "attn.hook_z")
    ]
    if direct:
        names += [
            f"blocks.{b[0]}.{hook}" for b, _ in paths for hook in ("attn.hook_z", "hook_attn_out")
        ]
    logits = question.end == "logits"
    starts = {layer for b, a in paths for layer in (a[0], *(() if direct else (b[0],)))}
    ends = [] if logits else [question.end]
    clean = clean_run(
        model, part.x, [*names, *ends], logits=logits, starts=starts, given=part.clean
    )
    given = (_moved if direct else _followed)(model, part.x, paths, edit, clean, batch_size)
    variants = _variants(model, part, paths, through, clean.states, given)
    return effects(
        question,
        part,
        variants,
        strict=False,  # a receiver that does not see its sender is a finding
        batch_size=batch_size,
        clean=clean,
    )


def _moved(
    model: MLLM,
    x: Inputs,
    paths: Sequence[Path],
    edit: EditOf,
    clean: Clean,
    batch_size: int | None,
) -> Given:
    """Step 2, direct: the clean stream plus what the edit changes in the sender's output."""
    given: Given = {}
    for sender in dict.fromkeys(b for b, _ in paths):
        layer, head = sender
        name = f"blocks.{layer}.attn.hook_z"
        z = clean.states[name]
        edited = edit(layer, head).change(z, name, model, x)
        out, before = _written(model, layer, edited), _written(model, layer, z)
        _check_written(clean.states[f"blocks.{layer}.hook_attn_out"], before, layer)
        touched = (edited != z).flatten(2).any(-1, keepdim=True)
        change = torch.where(touched, out - before, 0.0)
        for at in {a[0] for b, a in paths if b == sender}:
            given[sender, at] = clean.states[f"blocks.{at}.hook_resid_pre"] + change
    return given


def _followed(
    model: MLLM,
    x: Inputs,
    paths: Sequence[Path],
    edit: EditOf,
    clean: Clean,
    batch_size: int | None,
) -> Given:
    """Step 2, not direct: the stream of a run with the edit."""
    senders = list(dict.fromkeys(b for b, _ in paths))
    at = {sender: {a[0] for b, a in paths if b == sender} for sender in senders}
    read_at = [f"blocks.{layer}.hook_resid_pre" for layer in sorted(set().union(*at.values()))]
    made = each_run(
        model,
        x,
        [[edit(*sender)] for sender in senders],
        read=read_at,
        logits=False,
        strict=False,
        batch_size=batch_size,
        clean=clean,
    )
    return {
        (senders[number], layer): run[f"blocks.{layer}.hook_resid_pre"]
        for number, run in made
        for layer in at[senders[number]]
    }


def _written(model: MLLM, layer: int, z: Tensor) -> Tensor:
    """What attention adds to the stream, given its z: by the block's own modules."""
    with torch.no_grad():
        out: Tensor = _module(model, layer, "o")(z.flatten(-2))
        if model.family.language.names.post_norms:
            out = _module(model, layer, "ln1_post")(out)
    return out


def _check_written(there: Tensor, made: Tensor, layer: int) -> None:
    allowed = max(1e-4, 8 * torch.finfo(there.dtype).eps)
    error = float((there - made).float().norm() / there.float().norm().clamp_min(1e-30))
    if error > allowed:
        raise SumMismatch(
            f"block {layer}'s output projection gives something else than hook_attn_out (off by "
            f"{error:.1e}): this family adds what is not accounted for; direct=False would do"
        )


def _module(model: MLLM, layer: int, part: str) -> Any:
    return module_at(model.module, model.family.block_path(layer, part))


def _variants(
    model: MLLM,
    part: Part,
    paths: Sequence[Path],
    through: Sequence[str],
    clean: dict[str, Tensor],
    given: Given,
) -> list[list[ValueEdit]]:
    """Step 3: each path's edits; none where nothing that the receiver sees has changed."""
    group = model.cfg.n_heads // model.cfg.n_key_value_heads
    attended = torch.as_tensor(part.x.is_attended)
    reading = torch.zeros_like(attended)
    reading[part.sources.row, part.sources.position] = True
    restored: dict[int, Source] = {}
    made: dict[tuple[Head, int], tuple[Tensor, dict[str, Source]]] = {}
    variants = []
    for sender, (layer, head) in paths:
        hook = f"blocks.{layer}.attn.hook_"
        if (sender, layer) not in made:
            stream = given.pop((sender, layer))
            before = clean[f"blocks.{layer}.hook_resid_pre"]
            sources = {}
            with torch.no_grad():
                normed = _module(model, layer, "ln1")(stream)
                projected = {which: _module(model, layer, which)(normed) for which in through}
            for which, flat in projected.items():
                value = flat.unflatten(-1, (-1, model.cfg.d_head))
                sources[which] = Source({hook + which: value}, hook + which)
            made[sender, layer] = (stream != before).any(-1).cpu() & attended, sources
        changed, sources = made[sender, layer]
        edits: list[ValueEdit] = []
        for which, source in sources.items():
            where = changed & reading if which == "q" else changed
            own = head if which == "q" else head // group
            if where.any():
                edits.append(Patch(hook + which, from_=source, heads=own, positions=where))
        if any(not edit.hook.endswith("q") for edit in edits):
            z = restored.setdefault(layer, Source(clean, hook + "z"))
            siblings = [h for h in range(model.cfg.n_heads) if h // group == head // group]
            if others := [h for h in siblings if h != head]:
                edits.append(Patch(hook + "z", from_=z, heads=others))
            if (elsewhere := attended & ~reading).any():
                edits.append(Patch(hook + "z", from_=z, heads=head, positions=elsewhere))
        variants.append(edits)
    return variants
