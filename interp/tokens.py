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
the majority, `fractions` all shares, `purity` tells how mixed a cell is. `to_pixels` brings scores
of tokens back up to the picture.

The same class serves the stages before the language model, where a token is a patch in a vision
state or a vector that leaves the adapter (`interp.grids`). Nothing here assumes a size, a square
grid, or a start position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from interp.edges import EdgeSet
from interp.errors import EdgeError
from interp.labels import IGNORE
from interp.pixels import class_counts, paint, spans

Tokens = int | Sequence[int] | np.ndarray | None


@dataclass(frozen=True, eq=False, repr=False)
class TokenGrid:
    """Image tokens of a batch and where they lie (see the module docstring).

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

    def select(self, view: str) -> TokenGrid:
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

    # -- labels -----------------------------------------------------------------------------------

    def fractions(self, masks: np.ndarray | Sequence[np.ndarray], n_classes: int) -> np.ndarray:
        """Share of each class among the labelled pixels of each token, `[n_tokens, n_classes]`.

        Pixels labelled `IGNORE` count for nothing; a token with no labelled pixel is all zero.

        Args:
            masks: one `[height, width]` array of class numbers an image (or one array, if there is
                one image), of the size of the original picture.
            n_classes: how many classes there are.
        """
        out = np.zeros((len(self), n_classes))
        for image, mask in enumerate(self._masks(masks)):
            at = self.of_image(image)
            counts = class_counts(self.box[at], mask, n_classes)
            out[at] = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        return out

    def labels(
        self, masks: np.ndarray | Sequence[np.ndarray], n_classes: int, *, pure: float = 0.0
    ) -> np.ndarray:
        """Majority class of each token, `[n_tokens]` int64; `IGNORE` where no pixel is labelled.

        Args:
            masks: as in `fractions`.
            n_classes: how many classes there are.
            pure: tokens whose majority class has a smaller share than this get `IGNORE` too.
        """
        fractions = self.fractions(masks, n_classes)
        share = fractions.max(1)
        sure = (share > 0) & (share >= pure)
        return np.where(sure, fractions.argmax(1), IGNORE).astype(np.int64)

    def purity(self, masks: np.ndarray | Sequence[np.ndarray], n_classes: int) -> np.ndarray:
        """Share of the majority class in each token, `[n_tokens]`; 1 where the cell is pure."""
        return np.asarray(self.fractions(masks, n_classes).max(1))

    def pixels(self, token: int, mask: np.ndarray) -> np.ndarray:
        """The mask's values under one token: pixels whose centre lies in its box.

        A box smaller than a pixel (an enlarged picture) gives the pixel that holds its middle.
        """
        height, width = mask.shape
        x0, y0, x1, y1 = spans(self.box[[token]], (width, height))[0]
        return np.asarray(mask[y0:y1, x0:x1], dtype=np.int64).ravel()

    def to_pixels(
        self,
        scores: np.ndarray | Tensor,
        image: int = 0,
        *,
        how: str = "nearest",
        fill: float | None = None,
    ) -> np.ndarray:
        """Scores of an image's tokens on the pixels of its picture, `[height, width, ...]`.

        Args:
            scores: `[n_tokens, ...]` of the image, in grid order: labels, or scores by class.
            image: which image.
            how: "nearest", or "bilinear" between the cells' centres (for floating-point scores).
            fill: for pixels that no token sees (cropped away); by default NaN, `IGNORE` for whole
                numbers, False for bools.

        Raises:
            ValueError: several views (`select` one), or scores that do not fit.
        """
        at = self.of_image(image)
        views = np.unique(self.view[at])
        if len(views) > 1:
            names = " and ".join(self.view_names[v] for v in views)
            raise ValueError(
                f"image {image} has the views {names}; choose one first: "
                'grid.select("finest").to_pixels(...)'
            )
        array = scores.detach().cpu() if isinstance(scores, Tensor) else scores
        if isinstance(array, Tensor) and array.dtype == torch.bfloat16:
            array = array.float()  # numpy has no bfloat16
        array = np.asarray(array)
        if len(array) != len(at):
            raise ValueError(f"{len(array)} scores for the {len(at)} tokens of image {image}")
        floating = np.issubdtype(array.dtype, np.floating)
        if how not in ("nearest", "bilinear") or (how == "bilinear" and not floating):
            raise ValueError(
                f"how={how!r} for {array.dtype}: 'nearest', or 'bilinear' for floating-point scores"
            )
        if fill is None:
            fill = np.nan if floating else False if array.dtype == np.bool_ else IGNORE
        if not floating and not np.can_cast(np.min_scalar_type(fill), array.dtype):
            raise ValueError(f"fill={fill} is no {array.dtype}, as the scores are; give another")
        shape = self.shapes[int(views[0])]
        return paint(
            array.reshape(*shape, *array.shape[1:]),
            self.box[at].reshape(*shape, 4),
            self.sizes[image],
            bilinear=how == "bilinear",
            fill=fill,
        )

    def _masks(self, masks: np.ndarray | Sequence[np.ndarray]) -> list[np.ndarray]:
        several = [masks] if isinstance(masks, np.ndarray) and masks.ndim == 2 else list(masks)
        if len(several) != self.n_images:
            raise ValueError(f"{len(several)} masks for {self.n_images} images")
        for mask, (width, height) in zip(several, self.sizes, strict=True):
            if mask.shape != (height, width):
                raise ValueError(
                    f"a mask of {mask.shape[1]} x {mask.shape[0]} pixels for a picture of "
                    f"{width} x {height}: masks are given in the original picture's size"
                )
        return several

    # -- edges ------------------------------------------------------------------------------------

    def edges(self, src: Tokens, dst: Tokens, image: int | None = None) -> EdgeSet:
        """All edges from the tokens `src` (keys) to the tokens `dst` (queries).

        Args:
            src: token numbers in grid order, counted inside one image; None for all of them.
            dst: likewise.
            image: in which image; None means in every image of the batch.

        Raises:
            EdgeError: a token number that the image does not have.
        """
        images = range(self.n_images) if image is None else [image]
        tables = []
        for one in images:
            at = self.of_image(one)
            keys, queries = (at[self._numbers(t, len(at), one)] for t in (src, dst))
            d, s = np.meshgrid(self.position[queries], self.position[keys], indexing="ij")
            row = np.full(d.size, self.row[at[0]])
            tables.append(np.stack([row, d.ravel(), s.ravel()], axis=1))
        return EdgeSet(np.concatenate(tables), self.n_batch, self.n_pos)

    def image_block(self, image: int | None = None) -> EdgeSet:
        """Every token of an image to every token of the same image, both ways and itself."""
        return self.edges(None, None, image)

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
        n = array.shape[1]
        row, position = (a.reshape(self.n_images, n) for a in (self.row, self.position))
        table = np.stack([row[image, 0], position[image, dst], position[image, src]], axis=1)
        return EdgeSet(table, self.n_batch, self.n_pos)

    @staticmethod
    def _numbers(tokens: Tokens, n: int, image: int) -> np.ndarray:
        if tokens is None:
            return np.arange(n)
        numbers = np.atleast_1d(np.asarray(tokens))
        if numbers.dtype == np.bool_ and numbers.shape == (n,):
            numbers = np.flatnonzero(numbers)
        if numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in "iu"):
            raise EdgeError(
                f"tokens are whole numbers 0..{n - 1}, or {n} bools, not {numbers.dtype} "
                f"{list(numbers.shape)}"
            )
        bad = [int(t) for t in numbers if not 0 <= t < n]
        if bad:
            raise EdgeError(
                f"image {image} has no token {bad[0]}: its {n} tokens are numbered 0..{n - 1}"
            )
        return numbers.astype(np.int64)
