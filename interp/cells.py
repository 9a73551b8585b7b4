"""Where image tokens stand: the arrays that `interp.tokens.TokenGrid` is.

Each image token has a place in the sequence (`row`, `position`) and a cell in a picture (`image`,
`view`, `cell`, `box`). Here is what needs no more than that: which tokens are one image's or one
view's, which lie in a cell (`at`) or in a box (`inside`), and the states of image tokens out of a
tensor `[batch, pos, ...]`. Labels are `interp.labelled`'s, edges `interp.tokens`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor

from interp.errors import EdgeError


@dataclass(frozen=True, eq=False, repr=False)
class CellGrid:
    """Image tokens of a batch and where they lie.

    Attributes:
        row: `[n_tokens]` int, row of the batch.
        position: `[n_tokens]` int, position in the sequence.
        image: `[n_tokens]` int, number of the image in the batch.
        view: `[n_tokens]` int, number of the view, counted over the batch.
        cell: `[n_tokens, 2]` int, (row, column) in the view.
        box: `[n_tokens, 4]` float, left, top, right, bottom in pixels of the original picture;
            what reaches beyond the picture is padding.
        fillers: `[n, 2]` int, (row, position) of placeholders that stand for no piece of a picture:
            newline tokens, CLS.
        shapes: (rows, columns) of each view; a batch with one view an image has one an image.
        view_image: the image of each view.
        view_names: "base" (the whole picture at once) or "tiles" (the finer look).
        sizes: (width, height) in pixels of each original picture.
        n_batch: rows of the batch.
        n_pos: length of the sequence, padding included.
    """

    row: np.ndarray
    position: np.ndarray
    image: np.ndarray
    view: np.ndarray
    cell: np.ndarray
    box: np.ndarray
    fillers: np.ndarray
    shapes: tuple[tuple[int, int], ...]
    view_image: tuple[int, ...]
    view_names: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    n_batch: int
    n_pos: int

    @property
    def n_images(self) -> int:
        """Images in the batch."""
        return len(self.sizes)

    def __len__(self) -> int:
        return len(self.position)

    def __repr__(self) -> str:
        lines = []
        several = len(self.shapes) > self.n_images
        for view, (rows, cols) in enumerate(self.shapes):
            at = self.of_view(view)
            left, top, right, bottom = self.box[at[0]]
            first, last = self.position[at].min(), self.position[at].max()
            image = f"image {self.view_image[view]}" if self.n_images > 1 else ""
            name = f"{image} {self.view_names[view] if several else ''}".strip()
            lines.append(
                f"{name}{': ' if name else ''}{rows} x {cols} image tokens, positions "
                f"{first}..{last}, {right - left:.4g} x {bottom - top:.4g} px each"
            )
        if len(lines) > 4:
            what = "views" if several else "images"
            lines = [*lines[:3], f"... and {len(lines) - 3} more {what}"]
        return "\n".join(lines)

    # -- tokens -----------------------------------------------------------------------------------

    def of_image(self, image: int) -> np.ndarray:
        """Indices (into this grid's arrays) of one image's tokens, in grid order."""
        if not -self.n_images <= image < self.n_images:
            raise IndexError(
                f"image {image} of a batch of {self.n_images}; count from 0 to {self.n_images - 1}"
            )
        return np.flatnonzero(self.image == image % self.n_images)

    def of_view(self, view: int) -> np.ndarray:
        """Indices (into this grid's arrays) of one view's tokens, in raster order.

        Args:
            view: its number over the batch; `view_image` and `view_names` tell which that is.
        """
        if not 0 <= view < len(self.shapes):
            raise IndexError(f"view {view} of {len(self.shapes)}; the first is 0")
        return np.flatnonzero(self.view == view)

    def select(self, view: str) -> Self:
        """The grid of one view an image; what is left out is still there for `is_placeholder`.

        Args:
            view: its name, or "finest": "tiles" of the images that are cut, "base" of the others.

        Raises:
            ValueError: an image has no such view.
        """
        chosen = []
        for image in range(self.n_images):
            own = [v for v, of in enumerate(self.view_image) if of == image]
            names = [self.view_names[v] for v in own]
            name = view if view != "finest" else ("tiles" if "tiles" in names else names[0])
            if name not in names:
                raise ValueError(
                    f"image {image} has no view {view!r}, it has {' and '.join(names)}; "
                    'select("finest") takes the finest one of each image'
                )
            chosen.append(own[names.index(name)])
        kept = np.isin(self.view, chosen)
        rest = np.stack([self.row[~kept], self.position[~kept]], axis=1)
        return replace(
            self,
            **{name: getattr(self, name)[kept] for name in ("row", "position", "image", "box")},
            cell=self.cell[kept],
            view=np.searchsorted(chosen, self.view[kept]),
            fillers=np.concatenate([self.fillers, rest]),
            shapes=tuple(self.shapes[v] for v in chosen),
            view_image=tuple(range(self.n_images)),
            view_names=tuple(self.view_names[v] for v in chosen),
        )

    @cached_property
    def is_image(self) -> np.ndarray:
        """`[n_batch, n_pos]` bool: True on this grid's tokens, False on fillers, text, padding."""
        mask = np.zeros((self.n_batch, self.n_pos), dtype=bool)
        mask[self.row, self.position] = True
        return mask

    @cached_property
    def is_placeholder(self) -> np.ndarray:
        """`[n_batch, n_pos]` bool: True on all that the picture fills, fillers included."""
        mask = self.is_image.copy()
        mask[self.fillers[:, 0], self.fillers[:, 1]] = True
        return mask

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each image."""
        return tuple(np.bincount(self.image, minlength=self.n_images).tolist())

    @cached_property
    def uniform(self) -> bool:
        """Whether all images have the same views, so their tokens stack into one array."""
        views = [
            [s for s, of in zip(self.shapes, self.view_image, strict=True) if of == image]
            for image in range(self.n_images)
        ]
        return all(v == views[0] for v in views)

    def gather(self, states: Tensor) -> Tensor:
        """Image tokens of `[batch, pos, ...]`, as `[n_images, n_tokens, ...]` in grid order.

        Raises:
            ValueError: the images have grids of different sizes, so they do not stack.
        """
        if not self.uniform:
            raise ValueError(
                f"images with different grids {sorted(set(self.shapes))} do not stack; "
                "grid.split(states) gives a list, one tensor an image"
            )
        return self._take(states).unflatten(0, (self.n_images, self.counts[0]))

    def split(self, states: Tensor) -> list[Tensor]:
        """Image tokens of `[batch, pos, ...]`: one `[n_tokens, ...]` an image, in grid order."""
        return list(self._take(states).split(self.counts))

    def _take(self, states: Tensor) -> Tensor:
        if tuple(states.shape[:2]) != (self.n_batch, self.n_pos):
            raise ValueError(
                f"a state of shape {list(states.shape)}; this grid is of states "
                f"[{self.n_batch}, {self.n_pos}, ...]"
            )
        row = torch.as_tensor(self.row, device=states.device)
        return states[row, torch.as_tensor(self.position, device=states.device)]

    # -- which tokens -----------------------------------------------------------------------------

    def at(
        self,
        cells: tuple[int, int] | Sequence[tuple[int, int]] | np.ndarray,
        *,
        view: str | None = None,
        image: int | None = None,
    ) -> np.ndarray:
        """`[n_tokens]` bool: the tokens in some cells.

        Args:
            cells: a (row, column), or several, counted from the top left.
            view: in which view of an image that has several: "base" or "tiles".
            image: in which image; None means in every image of the batch.

        Raises:
            EdgeError: a cell or view that an image does not have, or a view that is not told.

        Usage: `x.grid.edges(src=x.grid.at((0, 0)), dst=x.grid.at([(4, 4), (4, 5)]))`
        """
        wanted = np.asarray(cells)
        wanted = wanted[None] if wanted.ndim == 1 else wanted
        if wanted.ndim != 2 or wanted.shape[1] != 2 or wanted.dtype.kind not in "iu":
            raise EdgeError(
                f"cells are whole numbers (row, column), one or several, not {wanted.dtype} "
                f"{list(np.shape(cells))}"
            )
        out = np.zeros(len(self), dtype=bool)
        for one in self.images(image):
            own = [v for v, of in enumerate(self.view_image) if of == one]
            if view is not None:
                own = [v for v in own if self.view_names[v] == view]
            if len(own) != 1:
                names = [self.view_names[v] for v, of in enumerate(self.view_image) if of == one]
                raise EdgeError(
                    f"image {one} has {' and '.join(names)}, and cells are of one view; "
                    f"view={names[-1]!r} would do, not {view!r}"
                )
            shape = self.shapes[own[0]]
            outside = (wanted < 0).any(1) | (wanted >= shape).any(1)
            if outside.any():
                raise EdgeError(
                    f"no cell {tuple(wanted[outside][0].tolist())} in image {one}, which has "
                    f"{shape[0]} x {shape[1]}; (row, column) from (0, 0)"
                )
            out[self.of_view(own[0])[wanted[:, 0] * shape[1] + wanted[:, 1]]] = True
        return out

    def inside(
        self,
        box: tuple[float, float, float, float] | Sequence[float] | np.ndarray,
        *,
        how: str = "centre",
        image: int | None = None,
    ) -> np.ndarray:
        """`[n_tokens]` bool: the tokens that lie in a box of the picture, in all its views.

        Args:
            box: left, top, right, bottom in pixels of the original picture.
            how: "centre", the token's centre is inside; "whole", all of it is; "any", some of it.
            image: in which image; None means in every image of the batch.

        Raises:
            EdgeError: no box, or one in which some image has no token.
        """
        edges = np.asarray(box, dtype=np.float64)
        if edges.shape != (4,) or not (edges[2:] > edges[:2]).all():
            raise EdgeError(f"a box is (left, top, right, bottom) in pixels, not {box!r}")
        low, high = self.box[:, :2], self.box[:, 2:]
        if how == "centre":
            middle = (low + high) / 2
            found = (middle >= edges[:2]).all(1) & (middle < edges[2:]).all(1)
        elif how == "whole":
            found = (low >= edges[:2]).all(1) & (high <= edges[2:]).all(1)
        elif how == "any":
            found = (low < edges[2:]).all(1) & (high > edges[:2]).all(1)
        else:
            raise EdgeError(f"how={how!r}; there are 'centre', 'whole' and 'any'")
        wanted = np.isin(self.image, self.images(image))
        for one in self.images(image):
            if not found[self.of_image(one)].any():
                width, height = self.sizes[one]
                raise EdgeError(
                    f"box {tuple(edges.tolist())} holds no token of image {one} (how={how!r}), a "
                    f"picture of {width} x {height} pixels; boxes are in its pixels, not in shares"
                )
        return np.asarray(found & wanted)

    def mark(self, tokens: np.ndarray | Tensor) -> np.ndarray:
        """`[n_batch, n_pos]` bool: the positions of some tokens.

        Args:
            tokens: `[n_tokens]` bool, as `at` and `inside` give it.
        """
        array = tokens.cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
        if array.dtype != np.bool_ or array.shape != (len(self),):
            raise EdgeError(
                f"tokens of the batch are {len(self)} bools, not {array.dtype} {list(array.shape)}"
            )
        marked = np.zeros((self.n_batch, self.n_pos), dtype=bool)
        marked[self.row[array], self.position[array]] = True
        return marked

    @cached_property
    def token_at(self) -> np.ndarray:
        """`[n_batch, n_pos]`: the number of the token that stands there, -1 for none."""
        out = np.full((self.n_batch, self.n_pos), -1)
        out[self.row, self.position] = np.arange(len(self))
        return out

    def images(self, image: int | None) -> list[int]:
        """The number of one image, or of all."""
        if image is None:
            return list(range(self.n_images))
        return [int(self.image[self.of_image(image)[0]])]

    def views(self, image: int | None) -> list[int]:
        """The numbers of one image's views, or of all."""
        images = self.images(image)
        return [view for view, of in enumerate(self.view_image) if of in images]
