"""Groups of image tokens that a score is told apart by: where they lie, and what lies beside them.

- *boundary* and *interior*: a token is on a boundary if one of the four tokens beside it (in its
  view) has another label, or if it is itself mixed, where shares of labels are known. Neighbours
  without a label say nothing. Segmentation is mostly right in the interior of things; what a layer
  adds is often at their edges.
- *early*, *middle*, *late*: thirds of the view in raster order, the order in which a language model
  reads it. Under causal attention the first third sees hardly anything of the picture. It is also
  the top of the picture, where the sky is: compare with the same thirds at the encoder.
- *position*: the cell of the grid. Pictures with another grid than the one the map is drawn in are
  put where their cells' centres lie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from interp.cells import CellGrid
from interp.labels import IGNORE

GROUPS = ("boundary", "interior", "early", "middle", "late")


def token_groups(
    grid: CellGrid, labels: ArrayLike, purity: ArrayLike | None = None
) -> dict[str, NDArray[np.bool_]]:
    """Which tokens are in which group: {name of `GROUPS`: `[n_tokens]` bool}.

    Args:
        grid: of the tokens.
        labels: `[n_tokens]` int, classes or `IGNORE`.
        purity: `[n_tokens]` share of the majority class in each token; below 1 is a boundary.

    Raises:
        ValueError: labels or purities of another number of tokens.
    """
    label = _one_each(grid, labels, "labels")
    boundary = np.zeros(len(grid), bool)
    third = np.zeros(len(grid), np.int64)
    for view, shape in enumerate(grid.shapes):
        at = grid.of_view(view)
        third[at] = 3 * np.arange(len(at)) // len(at)
        here = label[at].reshape(shape)
        edge = np.zeros(shape, bool)
        for one, other in (
            (np.s_[1:], np.s_[:-1]),
            (np.s_[:, 1:], np.s_[:, :-1]),
        ):
            labelled = (here[one] != IGNORE) & (here[other] != IGNORE)
            differ = labelled & (here[one] != here[other])
            edge[one] |= differ
            edge[other] |= differ
        boundary[at] = edge.ravel()
    if purity is not None:
        boundary |= _one_each(grid, purity, "purities") < 1
    parts = (boundary, ~boundary, third == 0, third == 1, third == 2)
    return dict(zip(GROUPS, parts, strict=True))


def position_bins(grid: CellGrid, shape: tuple[int, int]) -> NDArray[np.int64]:
    """The bin that each token's centre lies in, `[n_tokens]` int, counted in raster order.

    Args:
        grid: of the tokens.
        shape: (rows, columns) that each view is cut into.
    """
    of = np.array(grid.shapes)[grid.view]
    row, column = ((2 * grid.cell + 1) * shape // (2 * of)).T
    return np.asarray(row * shape[1] + column, np.int64)


def _one_each(grid: CellGrid, values: ArrayLike, what: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.shape != (len(grid),):
        raise ValueError(f"{what} of shape {list(array.shape)} for {len(grid)} tokens")
    return array
