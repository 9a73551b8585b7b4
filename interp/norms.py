"""What a norm does, written out: `centred / scale * weight (+ bias)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def norm_scale(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(x centred if the norm centres, its scale): the norm is `centred / scale * weight (+ bias)`.

    Scale is TransformerLens's `hook_scale`: the root mean square with epsilon, `[..., 1]`, float32
    for half-precision inputs.
    """
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    return x, (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
