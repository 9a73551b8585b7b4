"""Attribution patching: all heads and all edges from one backward pass.

The effect of an edit on a target is, to first order, the edit's change of a head's output z times
the gradient of the target there (Nanda 2023, "Attribution patching"; Kramar et al. 2024, AtP*,
2403.00745). One forward and one backward pass give that gradient for every head at once, so that a
study of all heads costs what three runs cost.

**The edit.** Cutting the sources G out of a row of attention with pattern A, values v and output
`z = A v` leaves, once the softmax has renormalised,

    z' = (z - sum_G A_k v_k) / (1 - A_G),      A_G = sum_G A_k

which is exact: only what happens *behind* z is linearised. AtP* calls this the QK correction, since
a softmax is the very thing that a gradient gets wrong: linearised as well (`corrected=False`) the
estimate lacks the factor `1 / (1 - A_G)` and misses heads that look at little else than G. A row
from which everything is cut writes nothing, as it does in an exact run. With `patch` the edit is
another one: a head's output becomes what it is on another batch.

**Integrated gradients** (`steps`) do not trust the gradient of the clean run alone, where a later
nonlinearity may be saturated. They take its mean along a straight way, at the middle of `steps`
equal pieces (Sundararajan et al. 2017, 1703.01365): every head's z moves by a share of `z' - z`,
the change that all of the question's cuts make to it in the clean run. With one source group the
estimates of all heads add up to the target's change over that way; with several the groups'
changes are not additive, since each renormalises what is left.

Signs are those of all methods: what the target *loses* by the edit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from interp.attribution.question import Part, Question
from interp.attribution.reading import Look, Reading, read
from interp.attribution.strongest import Strongest
from interp.errors import EditHadNoEffect
from interp.inputs import Inputs
from interp.model import MLLM
from interp.shipping import at_model


def gradient(
    question: Question,
    *,
    corrected: bool = True,
    steps: int = 0,
    patch: Sequence[Inputs] | None = None,
    strongest: Strongest | None = None,
    on_images: Callable[[int], None] | None = None,
    keep: bool = False,
) -> Tensor:
    """First-order estimates, `[n_images, layer, head, group]`; NaN for images without a target.

    Args:
        question: what is asked.
        corrected: do the softmax exactly.
        steps: of integrated gradients; 0 for the gradient of the clean run.
        patch: one other batch a batch, of the same shape, whose heads' outputs are put in.
        strongest: told about every edge's estimate.
        on_images: called with the number of images done.
        keep: keep the clean runs' states with the question, for exact effects afterwards.

    Raises:
        ValueError: a patch with source groups, or of another shape; a target without a gradient.
    """
    check_steps(steps)
    if patch is not None:
        patch = question.patched_by(patch)
        if strongest is not None:
            raise ValueError("patch= puts in whole heads: there are no edges to keep")
    found = []
    n_edges = strongest.n if strongest else 0
    for number, part in enumerate(question.parts):
        values, edges = _part(
            question.model,
            question.alone(number),
            None if patch is None else patch[number],
            corrected,
            steps,
            n_edges,
            keep,
        )
        found.append(values)
        if strongest:
            strongest.kept |= edges
        if on_images:
            on_images(len(part.x))
    return torch.cat(found)


@at_model
def _part(
    model: MLLM,
    question: Question,
    patch: Inputs | None,
    corrected: bool,
    steps: int,
    n_edges: int,
    keep: bool,
) -> tuple[Tensor, dict[int, Tensor]]:
    """The estimates of the one batch of a question, and its strongest edges."""
    (part,), layers = question.parts, question.layers
    strongest = Strongest(n_edges) if n_edges else None
    other = None
    if patch is not None:
        row, position = part.sources.row, part.sources.position
        there = read(model, patch, row, position, layers, _last(question))
        other = {layer: _at(there.looks[layer]) for layer in layers}
    clean = _pass(question, part, keep=keep)
    part.masks.update(clean.masks)
    gradients = _gradients(clean, part)
    if steps:
        toward = {
            layer: _toward(clean.looks[layer], part, None if other is None else other[layer])
            for layer in layers
        }
        gradients = {layer: torch.zeros_like(one) for layer, one in gradients.items()}
        for step in range(steps):
            share = (step + 0.5) / steps
            offsets = {layer: share * change for layer, change in toward.items()}
            between = _pass(question, part, offsets)
            for layer, one in _gradients(between, part).items():
                gradients[layer] += one / steps
    parts = []
    for layer in layers:
        look, g = clean.looks[layer], gradients[layer]
        if other is not None:
            lost = (g * (_at(look) - other[layer])).sum(-1)[..., None]  # [n, head, 1]
            parts.append(
                lost.new_zeros(len(part.x), *lost.shape[1:]).index_add(0, part.sources.row, lost)
            )
        else:
            parts.append(_cuts(look, part, g, corrected, strongest))
    values = torch.stack(parts, 1)
    values[part.score.of(clean.run).detach().isnan()] = torch.nan
    return values, strongest.kept if strongest else {}


def check_steps(steps: int) -> None:
    """Raise for a number of steps that cannot be."""
    if steps < 0:
        raise ValueError(f"steps={steps}; 0 is the plain gradient, 5 or more a fair integral")


def _last(question: Question) -> str:
    return f"blocks.{question.layers[-1]}.attn.hook_z"


def _pass(
    question: Question,
    part: Part,
    offsets: dict[int, Tensor] | None = None,
    *,
    keep: bool = False,
) -> Reading:
    """One forward pass with its graph."""
    sources = part.sources
    return read(
        question.model,
        part.x,
        sources.row,
        sources.position,
        question.layers,
        question.end,
        grad=True,
        offsets=offsets,
        clean=part.clean,
        keep=keep,
        only=part.read_at,
    )


def gradients_at_z(reading: Reading, part: Part) -> dict[int, Tensor]:
    """By layer, the target's gradient at all of z, `[batch, pos, head, d_head]`; 0 where there is
    no way from z to the target.

    Args:
        reading: a pass with its graph.
        part: of the question.

    Raises:
        ValueError: the target has no gradient.
        EditHadNoEffect: it depends on none of the heads.
    """
    with torch.enable_grad():
        target = part.score.of(reading.run)
        if not target.requires_grad:
            raise ValueError(
                f"target {part.score.name} has no gradient: make it of torch operations on what it "
                "reads at the end, without detach or numpy; or take what needs none, "
                'method="exact", for paths give pairs='
            )
        total = target[~target.isnan()].sum()
        states = [look.z for look in reading.looks.values()]
        made = torch.autograd.grad(total, states, allow_unused=True)
    if all(one is None for one in made):
        raise EditHadNoEffect(f"target {part.score.name} does not depend on any of these heads")
    return {
        layer: torch.zeros_like(state) if one is None else one
        for layer, state, one in zip(reading.looks, states, made, strict=True)
    }


def _gradients(reading: Reading, part: Part) -> dict[int, Tensor]:
    """The same at the reading positions only, `[n, head, d_head]` float64."""
    row, position = part.sources.row, part.sources.position
    found = gradients_at_z(reading, part)
    return {layer: one[row, position].cpu().double() for layer, one in found.items()}


def _at(look: Look) -> Tensor:
    """z at the reading positions, `[n, head, d_head]`."""
    return look.z.detach()[look.row, look.position].cpu().double()


def _toward(look: Look, part: Part, other: Tensor | None) -> Tensor:
    """How z changes if all of the question's cuts are made, `[n, head, d_head]`."""
    here = _at(look)
    if other is not None:
        return other - here
    out = torch.zeros_like(here)
    cut = (part.sources.group >= 0).double()
    for row, at, pattern in look.patterns():
        kept = pattern.cpu() * (1 - cut[at])[:, None]
        new = torch.einsum("nhk,hkd->nhd", kept, look.values(row).cpu().double())
        out[at] = _divided(new, kept.sum(-1, keepdim=True)) - here[at]
    return out


def _cuts(
    look: Look, part: Part, g: Tensor, corrected: bool, strongest: Strongest | None
) -> Tensor:
    """`[n_rows, head, group]`: what the target loses when a head's edges from a group are cut."""
    sources = part.sources
    inside = sources.is_in.double()
    out = torch.zeros(len(part.x), g.shape[1], len(sources.names), dtype=torch.float64)
    for row, at, pattern in look.patterns():
        pattern = pattern.cpu()
        value = look.values(row).cpu().double()
        along = torch.einsum("nhd,hkd->nhk", g[at], value)  # g . v_k
        each = pattern * along
        whole = each.sum(-1, keepdim=True)  # g . z
        part_of, weight = each @ inside[at], pattern @ inside[at]
        if corrected:
            # what stays is summed by itself: 1 - A_G would have no digits left
            rest = _divided(each @ (1 - inside[at]), pattern @ (1 - inside[at]))
            lost = whole - rest
        else:
            lost = part_of - weight * whole
        out[row] = lost.masked_fill(weight == 0, 0.0).sum(0)
        if strongest is not None:
            one = (each - pattern * whole) / ((1 - pattern) if corrected else 1.0)
            one = torch.where(pattern == 1.0, each, one)  # a row with nothing else to look at
            strongest.see(part, look.layer, at, one)
    return out


def _divided(sums: Tensor, weights: Tensor) -> Tensor:
    """A mean over what stays; 0 where nothing stays, as an empty row writes nothing."""
    return torch.where(weights > 0, sums / weights.clamp_min(1e-300), 0.0)
