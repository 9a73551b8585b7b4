"""Models and features that a finding must beat: shuffled weights, a random projection."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from interp.families.base import module_at
from interp.model import MLLM


def shuffled_llm(model: MLLM, seed: int = 0) -> MLLM:
    """A copy whose language model's weight matrices have their entries in random places.

    Scale and distribution of every matrix stay as trained; what they compute does not. Norms (and
    the vision tower, the adapter and the embeddings) stay as they are.
    """
    fresh = type(model.module)(copy.deepcopy(model.config))
    wanted = fresh.state_dict().keys()
    fresh.load_state_dict({k: v for k, v in model.module.state_dict().items() if k in wanted})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in module_at(fresh, model.family.language.blocks):  # type: ignore[attr-defined]
            for parameter in block.parameters():
                if parameter.ndim > 1:
                    flat = parameter.flatten()
                    order = torch.randperm(len(flat), generator=generator)
                    parameter.copy_(flat[order.to(flat.device)].view_as(parameter))
    return MLLM(
        fresh.to(model.device, next(model.module.parameters()).dtype).eval(), model.processor
    )


def random_projection(d_vision: int, d_model: int, seed: int) -> Tensor | None:
    """A random orthonormal projection to the adapter's output width, if that is narrower.

    A narrower stage gives its probe less to read. What this projection loses is the share of the
    drop that the adapter's width alone would cost.
    """
    if d_model >= d_vision:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d_vision, d_model, generator=generator))[0]
