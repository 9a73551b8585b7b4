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
    return _pool(states, *_views(fine, coarse, 0))


def pool_flat(state: Tensor, fine: TokenGrid, coarse: TokenGrid) -> Tensor:
    """The same from a whole state, picture after picture; their grids may differ.

    Args:
        state: `[batch, pos, ...]` of `fine`.
        fine: the grid of the state.
        coarse: the grid wanted.

    Returns:
        `[n_coarse of all pictures, ...]`, in the order of `coarse`'s tokens.
    """
    if fine.uniform and coarse.uniform:
        return pool(fine.gather(state), fine, coarse).flatten(0, 1)
    pieces = fine.split(state)
    if fine.shapes != coarse.shapes:
        pieces = [
            _pool(piece[None], *_views(fine, coarse, image))[0]
            for image, piece in enumerate(pieces)
        ]
    return torch.cat(pieces)


Shapes = list[tuple[int, int]]


def _views(fine: TokenGrid, coarse: TokenGrid, image: int) -> tuple[Shapes, Shapes]:
    """Shapes of one picture's views in both grids."""
    if fine.view_image != coarse.view_image:
        raise ValueError("grids of different views do not pool")
    own = [view for view, of in enumerate(coarse.view_image) if of == image]
    return [fine.shapes[view] for view in own], [coarse.shapes[view] for view in own]


def _pool(states: Tensor, fine: Shapes, coarse: Shapes) -> Tensor:
    """`[n_images, n_fine, ...]` to `[n_images, n_coarse, ...]`, view by view."""
    parts, start = [], 0
    for (rows, cols), to in zip(fine, coarse, strict=True):
        part = states[:, start : start + rows * cols].float().unflatten(1, (rows, cols))
        start += rows * cols
        by_row = _shares(to[0], rows).to(states.device)
        by_col = _shares(to[1], cols).to(states.device)
        parts.append(torch.einsum("rR,cC,iRC...->irc...", by_row, by_col, part).flatten(1, 2))
    return torch.cat(parts, dim=1)


def _shares(n: int, n_fine: int) -> Tensor:
    """`[n, n_fine]`: how much of each of n equal intervals each of n_fine equal ones covers."""
    edges, fine = torch.linspace(0, 1, n + 1), torch.linspace(0, 1, n_fine + 1)
    low = torch.maximum(edges[:-1, None], fine[None, :-1])
    high = torch.minimum(edges[1:, None], fine[None, 1:])
    return (high - low).clamp(min=0) * n
