"""Which image token is which piece of the picture.

An MLLM turns a picture into a sequence of *image tokens* somewhere in the prompt. Everything one
wants to say about segmentation ("this token is sky", "these two are neighbours", "cut what the sea
tokens read from the beach tokens") needs the way back from a position in the sequence to a
rectangle of the picture. A `TokenGrid` is that way back, for every image of a batch:

* `row`, `position`: where the token stands in the batch (an index into `[batch, pos, ...]`);
* `image`, `view`, `cell`: which image it belongs to, which look at it, and its (row, column) there;
* `box`: its rectangle in the *original* picture, in pixels, after undoing resize, crop and padding.

Some families look at a picture more than once, whole and in tiles: each look is a *view*, one
rectangular grid over the picture, and `grid.select("finest")` is the grid of one view an image.
Tokens are numbered view by view, in each of them in raster order, whatever their order in the
prompt; every method that takes token numbers counts them inside one image, from 0.

Labels go down onto tokens by looking at the pixels whose centres fall into the box: `labels` takes
the majority, `fractions` all shares, `purity` tells how mixed a cell is, `warp` is the mask as the
model sees it. `to_pixels` brings scores of tokens back up to the picture.

Tokens are selected by number, or by a bool array over all of the batch's tokens: `at` (cells),
`inside` (a box of pixels), `of_class`, `grid.image == 1`, and whatever `&`, `|` and `~` make of
those. `edges(src=, dst=)` takes either; `neighbours` and `look_ahead` are edges by where tokens
lie. Edges run within an image; from one image to another, or to words, are `Inputs.edges`.

The same class serves the stages before the language model, where a token is a patch in a vision
state or a vector that leaves the adapter (`interp.grids`). Nothing here assumes a size, a square
grid, or a start position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from interp.edges import EdgeSet
from interp.errors import EdgeError
from interp.labelled import LabelGrid
from interp.pairs import pairs

Tokens = int | Sequence[int] | np.ndarray | Tensor | None


@dataclass(frozen=True, eq=False, repr=False)
class TokenGrid(LabelGrid):
    """Image tokens of a batch and where they lie: see the module docstring, and `CellGrid` for the
    arrays."""

    # -- edges ------------------------------------------------------------------------------------

    def edges(self, src: Tokens, dst: Tokens, image: int | None = None) -> EdgeSet:
        """All edges from the tokens `src` (keys) to the tokens `dst` (queries) of the same image.

        Args:
            src: token numbers in grid order, or as many bools, counted inside one image; or bools
                over all tokens of the batch, `[n_tokens]`; None for all of them.
            dst: likewise.
            image: in which image; None means in every image of the batch.

        Raises:
            EdgeError: a token number that the image does not have.

        Usage: `x.grid.edges(src=x.grid.inside((0, 0, 40, 40)), dst=[22, 23])`
        """
        tables = []
        for one in self.images(image):
            keys, queries = (self._chosen(tokens, one) for tokens in (src, dst))
            row = self.row[self.of_image(one)[0]]
            tables.append(pairs(row, self.position[keys], self.position[queries]))
        return EdgeSet(np.concatenate(tables), self.n_batch, self.n_pos)

    def image_block(self, image: int | None = None) -> EdgeSet:
        """Every token of an image to every token of the same image, both ways and itself."""
        return self.edges(None, None, image)

    def neighbours(
        self, radius: float, *, metric: str = "chebyshev", image: int | None = None
    ) -> EdgeSet:
        """Every token to all others at most `radius` cells away in the same view, both ways.

        A ring is a difference: `neighbours(2) - neighbours(1)`.

        Args:
            radius: in cells.
            metric: "chebyshev", the larger of rows and columns apart (1 gives 8 neighbours), or
                "euclid", from centre to centre in cells (1 gives 4 neighbours).
            image: in which image; None means in every image of the batch.

        Usage: `Knockout(x.grid.neighbours(1).causal())`
        """
        if not radius >= 1:
            raise EdgeError(f"radius={radius} reaches no neighbour; it is in cells, from 1")
        reach = int(min(radius, max(max(shape) for shape in self.shapes)))
        dy, dx = np.indices((2 * reach + 1, 2 * reach + 1)).reshape(2, -1) - reach
        away = _length(dy, dx, metric)
        near = (away > 0) & (away <= radius)
        tables = [np.zeros((0, 3), dtype=np.int32)]
        for view in self.views(image):
            at = self.of_view(view).reshape(self.shapes[view])
            for y, x in zip(dy[near], dx[near]):
                src = at[max(y, 0) : max(len(at) + min(y, 0), 0)]
                src = src[:, max(x, 0) : max(at.shape[1] + min(x, 0), 0)]
                dst = at[max(-y, 0) : max(len(at) + min(-y, 0), 0)]
                dst = dst[:, max(-x, 0) : max(at.shape[1] + min(-x, 0), 0)]
                tables.append(self._table(src.ravel(), dst.ravel()))
        return EdgeSet(np.concatenate(tables), self.n_batch, self.n_pos)

    def look_ahead(self, rows: int, *, image: int | None = None) -> EdgeSet:
        """What a causal mask closes, of that what lies at most `rows` rows below the query.

        `Unmask(x.grid.look_ahead(0))` lets a token see the rest of its own row, 1 the next row too,
        and the number of rows less one the whole view: between causal and bidirectional attention.

        Args:
            rows: from 0.
            image: in which image; None means in every image of the batch.

        Where tiles stand one after the other in the prompt, a token beside or above the query may
        come later too; it is among the edges. Edges between two views are not.
        """
        if rows < 0:
            raise EdgeError(f"rows={rows}; 0 is the rest of a token's own row")
        tables = [np.zeros((0, 3), dtype=np.int32)]
        for view in self.views(image):
            at = self.of_view(view)
            position, line = self.position[at], self.cell[at, 0]
            later = position[None] > position[:, None]
            later &= line[None] - line[:, None] <= rows
            dst, src = np.nonzero(later)
            tables.append(self._table(at[src], at[dst]))
        return EdgeSet(np.concatenate(tables), self.n_batch, self.n_pos)

    def edges_where(self, mask: np.ndarray | Tensor) -> EdgeSet:
        """Edges from a boolean `[n_images, dst token, src token]` over tokens in grid order."""
        array = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
        if array.dtype != np.bool_:
            raise EdgeError(f"edges come from a bool mask, not from {array.dtype}; compare first")
        if not self.uniform or array.shape != (self.n_images, *(2 * [self.counts[0]])):
            raise EdgeError(
                f"a mask of shape {list(array.shape)} for {self.n_images} images of "
                f"{list(self.counts)} tokens; [n_images, dst, src] would do"
            )
        image, dst, src = np.nonzero(array)
        first = np.cumsum([0, *self.counts[:-1]])[image]
        order = np.argsort(self.image, kind="stable")
        table = self._table(order[first + src], order[first + dst])
        return EdgeSet(table, self.n_batch, self.n_pos)

    def distance(self, edges: EdgeSet, *, metric: str = "euclid") -> np.ndarray:
        """How many cells each edge spans, `[n_edges]`; NaN unless both ends are tokens of a view.

        Args:
            edges: of this batch.
            metric: "euclid" or "chebyshev", as in `neighbours`.

        Usage: `edges.random_like(match="distance", distance=x.grid.distance)`
        """
        if (edges.n_batch, edges.n_pos) != (self.n_batch, self.n_pos):
            raise EdgeError(f"{edges!r} for a grid in {self.n_batch} x {self.n_pos} positions")
        src, dst = (self.token_at[edges.row, position] for position in (edges.src, edges.dst))
        dy, dx = (self.cell[src] - self.cell[dst]).T
        apart = (src < 0) | (dst < 0) | (self.view[src] != self.view[dst])
        return np.where(apart, np.nan, _length(dy, dx, metric))

    def _table(self, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
        """Edges between tokens, by their indices into this grid's arrays."""
        table = np.empty((len(src), 3), dtype=np.int32)
        table[:, 0] = self.row[dst]
        table[:, 1], table[:, 2] = self.position[dst], self.position[src]
        return table

    def _chosen(self, tokens: Tokens, image: int) -> np.ndarray:
        """Indices into this grid's arrays of an image's tokens that are asked for."""
        at = self.of_image(image)
        n = len(at)
        if tokens is None:
            return at
        tokens = tokens.cpu().numpy() if isinstance(tokens, Tensor) else tokens
        numbers = np.atleast_1d(np.asarray(tokens))
        if numbers.dtype == np.bool_ and numbers.shape == (len(self),):
            return at[numbers[at]]
        if numbers.dtype == np.bool_ and numbers.shape == (n,):
            return at[numbers]
        if numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in "iu"):
            raise EdgeError(
                f"tokens are whole numbers 0..{n - 1}, or {n} bools, not {numbers.dtype} "
                f"{list(numbers.shape)}"
            )
        bad = numbers[(numbers < 0) | (numbers >= n)]
        if len(bad):
            raise EdgeError(
                f"image {image} has no token {bad[0]}: its {n} tokens are numbered 0..{n - 1}"
            )
        return at[numbers.astype(np.int64)]


def _length(dy: np.ndarray, dx: np.ndarray, metric: str) -> np.ndarray:
    """Cells apart."""
    if metric == "euclid":
        return np.hypot(dy, dx)
    if metric == "chebyshev":
        return np.maximum(np.abs(dy), np.abs(dx)).astype(np.float64)
    raise EdgeError(f"metric={metric!r}; there are 'chebyshev' and 'euclid'")
