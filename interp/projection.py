"""Attention's output projection, asked what it does rather than read.

On a server weights may lie elsewhere, quantised ones are codes, and offloaded ones are not there.
The module can always be called: given one unit vector a row, it answers with its matrix, to the
last bit, since each sum has one term.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.hooked import Hooked


def output_matrix(model: Hooked, layer: int) -> Tensor:
    """`W_O` of a language block, `[head, d_head, d_model]` float64."""
    n_in = model.cfg.n_heads * model.cfg.d_head
    unit = torch.eye(n_in, dtype=model.dtype, device=model.device)
    answer = _project(model, layer, unit).cpu().double()
    bias = output_bias(model, layer)
    return (answer if bias is None else answer - bias).unflatten(0, (-1, model.cfg.d_head))


def output_bias(model: Hooked, layer: int) -> Tensor | None:
    """Its bias, `[d_model]` float64; None where it has none."""
    n_in = model.cfg.n_heads * model.cfg.d_head
    answer = _project(model, layer, torch.zeros(1, n_in, dtype=model.dtype, device=model.device))
    return answer[0].cpu().double() if answer.any() else None


def _project(model: Hooked, layer: int, rows: Tensor) -> Tensor:
    module: Any = model.submodule(model.family.block_path(layer, "o"))
    with torch.no_grad():
        made: Tensor = module(rows[None])  # with the batch axis that it is used to
    return made[0]
