"""Direct attribution of a probe's margin to heads, sources, MLPs and the starting state.

The residual stream is a sum: what a token is at block L is what it was at the start plus what
every attention head and every MLP in between wrote into it (Elhage et al. 2021, "A Mathematical
Framework for Transformer Circuits"). A linear probe's margin, true class minus the class it was
confused with, is linear in that state. So it is a sum too:

1. `margin = x_end . d + b`, with `d = w_true - w_confused` of the frozen probe at the end, its own
   direction for each token;
2. `x_end = x_start + sum_l (attention_l + mlp_l)`;
3. `attention_l = sum_h z_h W_O^h (+ bias)`, and `z_h = sum_k A[q, k] v_k`: each head's part splits
   further by *source token* k, as `A[q, k] (v_k . W_O^h d)`;
4. the sources are added up by group (same region and right, same region and wrong, ...).

`W_O^h d` has the width of a head, so what every head writes for all tokens (`hook_result`, d_model
wide) is never made. The parts are checked against the margin itself on every call: a sum that is
off by more than 1e-4 relative (in half precision: by more than its rounding) raises.

What this is not: an effect. A head may write against what a later one then undoes. The study
checks the top heads by knocking them out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum
from torch import Tensor

from interp.attention import repeat_heads
from interp.errors import SumMismatch
from interp.families.base import module_at
from interp.inputs import Inputs
from interp.model import MLLM
from interp.probes import ProbeBank

TOLERANCE = 1e-4


@dataclass(frozen=True)
class DirectAttribution:
    """The parts of every chosen token's margin. All in units of the margin (logits).

    Attributes:
        image, token: `[n]` which token of which image.
        heads: `[n, layer, head, group]` what each head wrote, by source group.
        mlps: `[n, layer]`.
        biases: `[n, layer]` of the attention projections (0 where there is none).
        start: `[n]` the margin of the starting state under the probe at the end.
        margin: `[n]` the margin at the end.
        groups: names of the source groups.
    """

    image: Tensor
    token: Tensor
    heads: Tensor
    mlps: Tensor
    biases: Tensor
    start: Tensor
    margin: Tensor
    groups: tuple[str, ...]

    @property
    def change(self) -> Tensor:
        """How far the margin moved from start to end, `[n]`: what heads and MLPs share out."""
        return self.margin - self.start

    @property
    def total(self) -> Tensor:
        """Start, heads, biases and MLPs added up, `[n]`; equals `margin` within rounding."""
        return self.start + self.heads.sum((1, 2, 3)) + self.mlps.sum(1) + self.biases.sum(1)


def direct_attribution(
    model: MLLM,
    x: Inputs,
    bank: ProbeBank,
    *,
    queries: Tensor,
    true: Tensor,
    confused: Tensor,
    sources: Tensor,
    groups: tuple[str, ...],
    end: str,
) -> DirectAttribution:
    """Split the margin of chosen image tokens at `end` (see the module docstring).

    Args:
        model: the model.
        x: a prepared batch whose images share one grid.
        bank: frozen probes; the one at `end` is used.
        queries: `[n_images, n_tokens]` bool, the tokens to explain.
        true: `[n_images, n_tokens]` class that the margin counts for.
        confused: `[n_images, n_tokens]` class that it counts against.
        sources: `[n_images, n_tokens, pos]` int, the group of each source *position* for each
            query token; numbers index `groups`.
        groups: names of the source groups.
        end: "blocks.{l}.hook_resid_post", the stage whose margin is explained.

    Raises:
        SumMismatch: the parts miss the margin by more than 1e-4 of its scale.
    """
    last = _block_number(end)
    layers = range(last + 1)
    read = ["blocks.0.hook_resid_pre", end]
    for layer in layers:
        prefix = f"blocks.{layer}"
        read += [f"{prefix}.attn.hook_pattern", f"{prefix}.attn.hook_v", f"{prefix}.hook_mlp_out"]
    run = model.run(x, read=read, logits=False)

    image, token = queries.nonzero(as_tuple=True)
    row = torch.as_tensor(x.grid.row).unflatten(0, queries.shape)[image, token]
    position = torch.as_tensor(x.grid.position).unflatten(0, queries.shape)[image, token]
    classes = (true[image, token], confused[image, token])
    direction = bank.direction(end, *classes).double()  # [n, d_model]
    bias = bank.bias(end, *classes).double()
    one_hot = torch.nn.functional.one_hot(sources[image, token], len(groups)).double()

    heads, mlps, biases = [], [], []
    for layer in layers:
        projection = module_at(model.module, model.family.block_path(layer, "o"))
        along = einsum(
            model.blocks[layer].attn.W_O.cpu().double(), direction, "h d m, n m -> n h d"
        )
        pattern = run[f"blocks.{layer}.attn.hook_pattern"].cpu()[row, :, position].double()
        value = run[f"blocks.{layer}.attn.hook_v"].cpu().transpose(1, 2)  # [batch, kv_head, key, :]
        value = repeat_heads(value, model.cfg.n_heads).double()
        heads.append(_by_group(pattern, value, row, along, one_hot))
        mlps.append(_dot(run[f"blocks.{layer}.hook_mlp_out"].cpu()[row, position], direction))
        weight = getattr(projection, "bias", None)
        biases.append(
            torch.zeros_like(bias) if weight is None else _dot(weight.detach().cpu(), direction)
        )
    result = DirectAttribution(
        image=image,
        token=token,
        heads=torch.stack(heads, 1),
        mlps=torch.stack(mlps, 1),
        biases=torch.stack(biases, 1),
        start=_dot(run["blocks.0.hook_resid_pre"].cpu()[row, position], direction) + bias,
        margin=_dot(run[end].cpu()[row, position], direction) + bias,
        groups=groups,
    )
    _check_sum(result, next(model.module.parameters()).dtype)
    return result


def _by_group(
    pattern: Tensor, value: Tensor, row: Tensor, along: Tensor, one_hot: Tensor
) -> Tensor:
    """`[n, head, group]`: A[q, k] (v_k . W_O d) added up over the sources of each group."""
    out = torch.zeros(len(row), pattern.shape[1], one_hot.shape[-1], dtype=torch.float64)
    for b in row.unique().tolist():  # one row at a time: its keys are shared by its queries
        at = row == b
        through = einsum(along[at], value[b], "n h d, h k d -> n h k")
        out[at] = einsum(pattern[at] * through, one_hot[at], "n h k, n k g -> n h g")
    return out


def _dot(state: Tensor, direction: Tensor) -> Tensor:
    return (state.double() * direction).sum(-1)


def _check_sum(result: DirectAttribution, dtype: torch.dtype = torch.float32) -> None:
    if not len(result.margin):
        return
    # a residual stream in half precision is rounded at every addition
    allowed = max(TOLERANCE, 8 * torch.finfo(dtype).eps) if dtype.itemsize < 4 else TOLERANCE
    # relative to the size of the parts: a margin near zero may be a difference of large ones
    scale = result.margin.abs() + result.start.abs() + result.heads.abs().sum((1, 2, 3))
    error = ((result.total - result.margin).abs() / scale.clamp_min(1e-12)).max()
    if error > allowed:
        raise SumMismatch(
            f"heads, MLPs and start miss the margin by {float(error):.2e} relative (allowed in "
            f"{dtype}: {allowed:.0e}); does this family rescale attention's output after o_proj?"
        )


def _block_number(end: str) -> int:
    parts = end.split(".")
    if len(parts) != 3 or parts[0] != "blocks" or parts[2] != "hook_resid_post":
        raise ValueError(f"end={end!r}: attribution ends at 'blocks.<layer>.hook_resid_post'")
    return int(parts[1])
