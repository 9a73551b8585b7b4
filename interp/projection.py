"""Attention's output projection: its matrix, read where that can be, else asked for.

On a server weights may lie elsewhere, quantised ones are codes, and offloaded ones are not there.
The module can always be called: given one unit vector a row, it answers with its matrix, to the
last bit, since each sum has one term. That costs as much as so many tokens, so a weight that is
here and plain is read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interp.hooked import Hooked


def output_matrix(model: Hooked, layer: int) -> Tensor:
    """`W_O` of a language block, `[head, d_head, d_model]` float64."""
    module: Any = model.submodule(model.family.block_path(layer, "o"))
    weight = module.weight
    plain = isinstance(module, nn.Linear) and weight.is_floating_point() and not weight.is_meta
    if plain and not model.stock:
        made = weight.detach().T.cpu().double()
    else:
        n_in = model.cfg.n_heads * model.cfg.d_head
        made = _answers(model, module, torch.eye(n_in))
        if (bias := output_bias(model, layer)) is not None:
            made = made - bias
    return made.unflatten(0, (-1, model.cfg.d_head))


def output_bias(model: Hooked, layer: int) -> Tensor | None:
    """Its bias, `[d_model]` float64; None where it has none."""
    module = model.submodule(model.family.block_path(layer, "o"))
    n_in = model.cfg.n_heads * model.cfg.d_head
    (answer,) = _answers(model, module, torch.zeros(1, n_in))
    return answer if answer.any() else None


def _answers(model: Hooked, module: Any, rows: Tensor) -> Tensor:
    """What the projection makes of rows, `[n, d_model]` float64."""
    with torch.no_grad():
        made: Tensor = module(rows[None].to(model.device, model.dtype))
    return made[0].cpu().double()
