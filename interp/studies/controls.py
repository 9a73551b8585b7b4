"""Models and features that a finding must beat: shuffled weights, a random projection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from interp.errors import Untestable
from interp.families.base import module_at
from interp.model import MLLM


@contextmanager
def shuffled_llm(model: MLLM, seed: int = 0) -> Iterator[MLLM]:
    """The model, while its language model's weight matrices have their entries in random places.

    Scale and distribution of every matrix stay as trained; what they compute does not. Norms (and
    the vision tower, the adapter and the embeddings) stay as they are. The entries are moved where
    they are, since a second copy of a large model would not fit, and moved back in the end.

    Raises:
        Untestable: weights that cannot be moved about: quantised ones, or ones on disk.
    """
    blocks = list(module_at(model.module, model.family.language.blocks))  # type: ignore[call-overload]
    matrices = [matrix for block in blocks for matrix in block.parameters() if matrix.ndim > 1]
    # quantised layers keep their weights in whole numbers, or as buffers
    hidden = any(buffer.ndim > 1 for block in blocks for buffer in block.buffers())
    odd = any(matrix.is_meta or not matrix.is_floating_point() for matrix in matrices)
    if hidden or odd or not matrices:
        raise Untestable("weights that are quantised, or not in memory, cannot be shuffled")
    moved: list[nn.Parameter] = []
    try:
        _move(matrices, seed, moved)
        yield model
    finally:
        _move(list(moved), seed, None)


@torch.no_grad()
def _move(matrices: list[nn.Parameter], seed: int, moved: list[nn.Parameter] | None) -> None:
    """Shuffle the matrices and note those that are done; without `moved`, put them back."""
    generator = torch.Generator().manual_seed(seed)
    back = moved is None
    for matrix in matrices:
        order = torch.randperm(matrix.numel(), generator=generator).to(matrix.device)
        flat = matrix.flatten()
        other = torch.empty_like(flat).index_copy_(0, order, flat) if back else flat[order]
        matrix.copy_(other.view_as(matrix))
        if moved is not None:
            moved.append(matrix)


def random_projection(d_vision: int, d_model: int, seed: int) -> Tensor | None:
    """A random orthonormal projection to the adapter's output width, if that is narrower.

    A narrower stage gives its probe less to read. What this projection loses is the share of the
    drop that the adapter's width alone would cost.
    """
    if d_model >= d_vision:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d_vision, d_model, generator=generator))[0]
