"""One vector an image token at every stage, also where the adapter merges patches.

Many families merge two by two patches (Gemma3: four by four) into one image token. To compare
stages token by token, a study wants as many vectors before the adapter as behind it: the mean of
the patches that a token is made of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from interp.tokens import TokenGrid


def pool(states: Tensor, fine: TokenGrid, coarse: TokenGrid) -> Tensor:
    """Means of `fine`'s vectors under each of `coarse`'s tokens, by the area they share.

    Args:
        states: `[n_images, n_fine, ...]`, as `fine.gather` gives them.
        fine: the grid they lie in, for instance `x.patches`.
        coarse: the grid wanted, over the same views of the same pictures, for instance `x.grid`.

    Returns:
        `[n_images, n_coarse, ...]`, float32 where anything was averaged.

    Raises:
        ValueError: the grids are not of the same views.
    """
    if fine.shapes == coarse.shapes:
        return states
    if fine.view_image != coarse.view_image or not (fine.uniform and coarse.uniform):
        raise ValueError("grids of different views, or pictures with different grids, do not pool")
    parts, start = [], 0
    for view in (v for v, image in enumerate(coarse.view_image) if image == 0):
        rows, cols = fine.shapes[view]
        part = states[:, start : start + rows * cols].float().unflatten(1, (rows, cols))
        start += rows * cols
        by_row = _shares(coarse.shapes[view][0], rows).to(states.device)
        by_col = _shares(coarse.shapes[view][1], cols).to(states.device)
        parts.append(torch.einsum("rR,cC,iRC...->irc...", by_row, by_col, part).flatten(1, 2))
    return torch.cat(parts, dim=1)


def _shares(n: int, n_fine: int) -> Tensor:
    """`[n, n_fine]`: how much of each of n equal intervals each of n_fine equal ones covers."""
    edges, fine = torch.linspace(0, 1, n + 1), torch.linspace(0, 1, n_fine + 1)
    low = torch.maximum(edges[:-1, None], fine[None, :-1])
    high = torch.minimum(edges[1:, None], fine[None, 1:])
    return (high - low).clamp(min=0) * n
