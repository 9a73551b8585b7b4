"""Direct attribution: a target as an exact sum over heads, sources, MLPs and the starting state.

The residual stream is a sum: what a token is at block L is what it was at the start plus what
every attention head and every MLP in between wrote into it (Elhage et al. 2021, "A Mathematical
Framework for Transformer Circuits"). A linear probe's margin, true class minus the class it was
confused with, is linear in that state. So it is a sum too:

1. `margin = x_end . d + b`, with `d = w_true - w_confused` of the frozen probe at the end, its own
   direction for each token;
2. `x_end = x_start + sum_l (attention_l + mlp_l)`, and what deepstack adds between blocks;
3. `attention_l = sum_h z_h W_O^h (+ bias)`, and `z_h = sum_k A[q, k] v_k`: each head's part splits
   further by *source token* k, as `A[q, k] (v_k . W_O^h d)`;
4. the sources are added up by group (same region and right, same region and wrong, ...).

`W_O^h d` has the width of a head, so what every head writes for all tokens (`hook_result`, d_model
wide) is never made. Where a norm stands behind attention (Gemma 2 and 3), its scale is frozen at
what it was and goes into `d`, with its weight; so does that of the final norm where the target is
an answer's logit. The parts are checked against the target itself on every call: a sum that is off
by more than 1e-4 relative (in half precision: by more than its rounding) raises.

What this is not: an effect. A head may write against what a later one then undoes, and what it
writes for other heads to read is theirs. `interp.attribution.exact` cuts and looks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import einsum
from torch import Tensor

from interp.attribution.question import Part, Question
from interp.attribution.reading import Look, read
from interp.attribution.strongest import Strongest
from interp.errors import SumMismatch
from interp.execution import Run
from interp.families.base import module_at, weight_of
from interp.model import MLLM
from interp.projection import output_bias, output_matrix
from interp.shipping import at_model

TOLERANCE = 1e-4


@dataclass(frozen=True)
class DirectAttribution:
    """The parts of every image's target, in its unit; NaN for images about which it says nothing.

    Attributes:
        heads: `[n_images, layer, head, group]` what each head wrote, by source group.
        elsewhere: `[n_images, layer]` what the heads wrote from sources that are in no group.
        mlps: `[n_images, layer]`.
        biases: `[n_images, layer]` of the attention projections (0 where there is none).
        rest: `[n_images, layer]` what deepstack added behind each layer (0 where it does not).
        start: `[n_images]` the starting state, with the constant of the target.
        target: `[n_images]` the target itself.
    """

    heads: Tensor
    elsewhere: Tensor
    mlps: Tensor
    biases: Tensor
    rest: Tensor
    start: Tensor
    target: Tensor

    @property
    def change(self) -> Tensor:
        """How far the target moved from start to end, `[n]`: what heads and MLPs share out."""
        return self.target - self.start

    @property
    def total(self) -> Tensor:
        """All parts added up, `[n]`; equals `target` within rounding."""
        layers = self.elsewhere + self.mlps + self.biases + self.rest
        return self.start + self.heads.sum((1, 2, 3)) + layers.sum(1)


def direct(
    question: Question,
    strongest: Strongest | None = None,
    *,
    on_images: Callable[[int], None] | None = None,
) -> DirectAttribution:
    """Split the target of a question (see the module docstring).

    Args:
        question: whose target is linear in the stream, and whose readers are its queries.
        strongest: told about every edge's part.
        on_images: called with the number of images done.

    Raises:
        ValueError: another target, or other readers.
        SumMismatch: the parts miss the target by more than 1e-4 of its scale.
    """
    if any(part.score.linear is None for part in question.parts):
        raise ValueError(
            'method="direct" splits what is linear in the stream, which '
            f'{question.parts[0].score.name} is not known to be; method="gradient" or "exact" '
            "would do"
        )
    if question.dst != "queries":
        raise ValueError(
            f'method="direct" splits what is written at the target\'s own positions: dst="queries" '
            f"would do, not {question.dst!r}"
        )
    found = []
    n_edges = strongest.n if strongest else 0
    for number, part in enumerate(question.parts):
        made, edges = _part(question.model, question.alone(number), n_edges)
        found.append(made)
        if strongest:
            strongest.kept |= edges
        if on_images:
            on_images(len(part.x))
    joined = {name: torch.cat([one[name] for one in found]) for name in found[0]}
    result = DirectAttribution(**joined)
    _check_sum(result, question.model.dtype)
    return result


@at_model
def _part(
    model: MLLM, question: Question, n_edges: int
) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """The attribution of the one batch of a question, by name, and its strongest edges."""
    (part,) = question.parts
    score, strongest = part.score, Strongest(n_edges) if n_edges else None
    assert score.linear is not None
    assert score.row is not None
    assert score.position is not None
    layers, row, position = question.layers, score.row, score.position
    post = model.family.language.names.post_norms
    added = [layer for layer in layers[:-1] if layer < len(model.path().deepstack)]
    first, last = f"blocks.{layers[0]}.hook_resid_pre", f"blocks.{layers[-1]}.hook_resid_post"
    extra = [first, last, *score.extra, *(f"blocks.{layer}.hook_mlp_out" for layer in layers)]
    extra += [f"blocks.{layer}.ln1_post.hook_scale" for layer in layers if post]
    for layer in added:
        extra += [f"blocks.{layer}.hook_resid_post", f"blocks.{layer + 1}.hook_resid_pre"]
    reading = read(
        model,
        part.x,
        row,
        position,
        layers,
        question.end,
        extra=list(dict.fromkeys(extra)),
        clean=part.clean,
    )
    run = reading.run
    linear = score.linear(run)

    def along(name: str) -> Tensor:
        state = run[name][row, position].cpu().double()
        return _rows((state * linear.direction).sum(-1), row, len(part.x))

    nothing = torch.zeros(len(part.x), dtype=torch.float64)
    heads, elsewhere, biases = [], [], []
    for layer in layers:
        d = _behind_norm(question, layer, linear.direction, run, row, position)
        grouped, other = _heads(question, part, reading.looks[layer], d, strongest)
        heads.append(grouped)
        elsewhere.append(other)
        bias = output_bias(model, layer)
        biases.append(nothing if bias is None else _rows(bias @ d.T, row, len(part.x)))
    rest = [
        along(f"blocks.{layer + 1}.hook_resid_pre") - along(f"blocks.{layer}.hook_resid_post")
        if layer in added
        else nothing
        for layer in layers
    ]
    target = score.of(run).detach()
    made = {
        "heads": torch.stack(heads, 1),
        "elsewhere": torch.stack(elsewhere, 1),
        "mlps": torch.stack([along(f"blocks.{layer}.hook_mlp_out") for layer in layers], 1),
        "biases": torch.stack(biases, 1),
        "rest": torch.stack(rest, 1),
        "start": along(first) + linear.constant,
        "target": target,
    }
    for values in made.values():  # images about which the target says nothing
        values[target.isnan()] = torch.nan
    return made, strongest.kept if strongest else {}


def _behind_norm(
    question: Question, layer: int, direction: Tensor, run: Run, row: Tensor, position: Tensor
) -> Tensor:
    """The direction as it is in front of the norm that attention's output passes, if it does."""
    names = question.model.family.language.names
    if not names.post_norms:
        return direction
    norm = module_at(question.model.module, question.model.family.block_path(layer, "ln1_post"))
    weight = weight_of(norm).detach().cpu().double() + names.norm_offset
    scale = run[f"blocks.{layer}.ln1_post.hook_scale"][row, position].cpu().double()
    return direction * weight / scale


def _heads(
    question: Question, part: Part, look: Look, direction: Tensor, strongest: Strongest | None
) -> tuple[Tensor, Tensor]:
    """A[q, k] (v_k . W_O d) added up over the sources of each group, `[n_rows, head, group]`, and
    over those in none, `[n_rows]`."""
    sources = part.sources
    w_o = output_matrix(question.model, look.layer)
    through = einsum(w_o, direction, "h d m, n m -> n h d")
    inside = sources.is_in.double()
    outside = (sources.group < 0).double()
    out = torch.zeros(len(part.x), w_o.shape[0], len(sources.names), dtype=torch.float64)
    other = torch.zeros(len(part.x), dtype=torch.float64)
    for row, at, pattern in look.patterns():
        value = look.values(row).cpu().double()
        each = pattern.cpu() * einsum(through[at], value, "n h d, h k d -> n h k")
        out[row] = einsum(each, inside[at], "n h k, n k g -> h g")
        other[row] = einsum(each, outside[at], "n h k, n k -> ")
        if strongest is not None:
            strongest.see(part, look.layer, at, each)
    return out, other


def _rows(values: Tensor, row: Tensor, n_rows: int) -> Tensor:
    return values.new_zeros(n_rows).index_add(0, row, values)


def _check_sum(result: DirectAttribution, dtype: torch.dtype = torch.float32) -> None:
    there = ~result.target.isnan()
    if not there.any():
        return
    # a residual stream in half precision is rounded at every addition
    allowed = max(TOLERANCE, 8 * torch.finfo(dtype).eps) if dtype.itemsize < 4 else TOLERANCE
    # relative to the size of the parts: a margin near zero may be a difference of large ones
    scale = result.target.abs() + result.start.abs() + result.heads.abs().sum((1, 2, 3))
    error = ((result.total - result.target).abs() / scale.clamp_min(1e-12))[there].max()
    if not error <= allowed:
        raise SumMismatch(
            f"heads, MLPs and start miss the target by {float(error):.2e} relative (allowed in "
            f"{dtype}: {allowed:.0e}): this family adds something that is not accounted for"
        )
