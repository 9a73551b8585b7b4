"""How the tokens of one picture lie: what a family's layout function says, without a batch.

A picture becomes image tokens in one of a few ways. LLaVA makes one square grid of it. LLaVA-NeXT,
Gemma3 with pan and scan, InternVL and Idefics3 look at it twice: once as a whole ("base") and once
in tiles at a finer resolution ("tiles"). Each look is a `View`: one rectangular grid of cells over
the picture, whatever order the tokens come in. A `Layout` is all the views of one picture, and how
many placeholders it takes in the prompt; placeholders that no view owns (the newline token at the
end of a row of LLaVA-NeXT, a CLS token) stand for no piece of the picture.

The same view exists at three stages, on grids that may differ: as patches in the vision tower
(finer, where 2x2 patches are merged into a token), as vectors that leave the adapter, and as tokens
in the language model. The first two are a `Lattice`: where each cell lies in the picture, and where
its vector stands in the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Lattice:
    """A rectangular grid over a picture at one stage, cells in raster order.

    Attributes:
        shape: (rows, columns).
        boxes: `[rows * columns, 4]` left, top, right, bottom in pixels of the original picture.
            What reaches beyond the picture is padding.
        at: `[rows * columns, 2]` int, (row, position) of each cell in the state
            `[row, position, d]`; a state that packs all pictures into one row has row 0 only.
        extent: (rows, positions) of that state.
    """

    shape: tuple[int, int]
    boxes: np.ndarray
    at: np.ndarray
    extent: tuple[int, int]


@dataclass(frozen=True, eq=False)
class View:
    """One look at a picture: a rectangular grid of image tokens, cells in raster order.

    Attributes:
        name: "base" for the whole picture at once, "tiles" for the finer look.
        shape: (rows, columns).
        boxes: `[rows * columns, 4]` in pixels of the original picture, as in `Lattice`.
        slots: `[rows * columns]` int, which of the picture's placeholders each cell is, counted
            from 0 in the order of the prompt.
        adapter: the vectors that leave the adapter. The same cells as the view's, except where
            they are resampled behind the adapter (LLaVA-OneVision's large pictures).
        patches: the vision tower's patches.
    """

    name: str
    shape: tuple[int, int]
    boxes: np.ndarray
    slots: np.ndarray
    adapter: Lattice
    patches: Lattice


@dataclass(frozen=True, eq=False)
class Layout:
    """One picture's image tokens.

    Attributes:
        size: (width, height) of the original picture; where nobody told it, of what the model is
            given.
        n_slots: placeholders that it takes in the prompt, with those that are no cell of a view.
        views: in the order of their placeholders.
    """

    size: tuple[int, int]
    n_slots: int
    views: tuple[View, ...]

    @property
    def fillers(self) -> np.ndarray:
        """Slots of the placeholders that stand for no piece of the picture."""
        owned = np.concatenate([view.slots for view in self.views])
        return np.setdiff1d(np.arange(self.n_slots), owned)


def raster_boxes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Boxes of a grid from the (start, end) of its columns and rows.

    Args:
        x: `[columns, 2]`.
        y: `[rows, 2]`.

    Returns:
        `[rows * columns, 4]` left, top, right, bottom, in raster order.

    >>> raster_boxes(np.array([[0, 2], [2, 4]]), np.array([[0, 3]])).tolist()
    [[0, 0, 2, 3], [2, 0, 4, 3]]
    """
    left, top = np.meshgrid(x[:, 0], y[:, 0])
    right, bottom = np.meshgrid(x[:, 1], y[:, 1])
    return np.stack([left, top, right, bottom], axis=-1).reshape(-1, 4)


def numbers(shape: Sequence[int]) -> np.ndarray:
    """`[rows, columns]` int: the raster number of each cell.

    >>> numbers((2, 3)).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    return np.arange(int(np.prod(shape))).reshape(shape)
