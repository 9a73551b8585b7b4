"""Which image token is which piece of the picture.

An MLLM turns a picture into a sequence of *image tokens* somewhere in the prompt. Everything one
wants to say about segmentation ("this token is sky", "these two are neighbours", "cut what the sea
tokens read from the beach tokens") needs the way back from a position in the sequence to a
rectangle of the picture. A `TokenGrid` is that way back, for every image of a batch:

* `row`, `position`: where the token stands in the batch (an index into `[batch, pos, ...]`);
* `image`, `cell`: which image it belongs to, and its (row, column) there;
* `box`: its rectangle in the *original* picture, in pixels, after undoing resize and crop.

Tokens are numbered in grid order (raster, image by image), and every method that takes token
numbers counts them inside one image, from 0. Labels go down onto tokens by looking at the pixels
whose centres fall into the box: `labels` takes the majority, `purity` tells how mixed a cell is.

The grid is made by the family table (`interp.families`), which knows how a family lays its tokens
out; nothing here assumes a size, a square grid, or a start position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from interp.edges import EdgeSet
from interp.errors import EdgeError
from interp.labels import IGNORE

Tokens = int | Sequence[int] | np.ndarray | None


@dataclass(frozen=True, eq=False, repr=False)
class TokenGrid:
    """Image tokens of a batch and where they lie (see the module docstring).

    Attributes:
        row: `[n_tokens]` int, row of the batch.
        position: `[n_tokens]` int, position in the sequence.
        image: `[n_tokens]` int, number of the image in the batch.
        cell: `[n_tokens, 2]` int, (row, column) in the image's grid.
        box: `[n_tokens, 4]` float, left, top, right, bottom in pixels of the original picture.
        shapes: (rows, columns) of each image's grid.
        sizes: (width, height) in pixels of each original picture.
        n_batch: rows of the batch.
        n_pos: length of the sequence, padding included.
    """

    row: np.ndarray
    position: np.ndarray
    image: np.ndarray
    cell: np.ndarray
    box: np.ndarray
    shapes: tuple[tuple[int, int], ...]
    sizes: tuple[tuple[int, int], ...]
    n_batch: int
    n_pos: int

    @property
    def n_images(self) -> int:
        """Images in the batch."""
        return len(self.shapes)

    def __len__(self) -> int:
        return len(self.position)

    def __repr__(self) -> str:
        lines = []
        for image in range(self.n_images):
            at = self.of_image(image)
            rows, cols = self.shapes[image]
            left, top, right, bottom = self.box[at[0]]
            first, last = self.position[at].min(), self.position[at].max()
            name = f"image {image}: " if self.n_images > 1 else ""
            lines.append(
                f"{name}{rows} x {cols} image tokens, positions {first}..{last}, "
                f"{right - left:.4g} x {bottom - top:.4g} px each"
            )
        if len(lines) > 4:
            lines = [*lines[:3], f"... and {len(lines) - 3} more images"]
        return "\n".join(lines)

    # -- tokens -----------------------------------------------------------------------------------

    def of_image(self, image: int) -> np.ndarray:
        """Indices (into this grid's arrays) of one image's tokens, in grid order."""
        if not -self.n_images <= image < self.n_images:
            raise IndexError(
                f"image {image} of a batch of {self.n_images}; count from 0 to {self.n_images - 1}"
            )
        return np.flatnonzero(self.image == image % self.n_images)

    @cached_property
    def is_image(self) -> np.ndarray:
        """`[n_batch, n_pos]` bool: True on image tokens, False on text and padding."""
        mask = np.zeros((self.n_batch, self.n_pos), dtype=bool)
        mask[self.row, self.position] = True
        return mask

    @cached_property
    def uniform(self) -> bool:
        """Whether all images have the same grid, so their tokens stack into one array."""
        return len(set(self.shapes)) == 1

    def gather(self, states: Tensor) -> Tensor:
        """Image tokens of `[batch, pos, ...]`, as `[n_images, n_tokens, ...]` in grid order.

        Raises:
            ValueError: the images have grids of different sizes, so they do not stack.
        """
        if not self.uniform:
            raise ValueError(
                f"images with different grids {sorted(set(self.shapes))} do not stack; "
                "gather them one by one with grid.of_image(i)"
            )
        row = torch.as_tensor(self.row, device=states.device)
        position = torch.as_tensor(self.position, device=states.device)
        rows, cols = self.shapes[0]
        return states[row, position].unflatten(0, (self.n_images, rows * cols))

    # -- labels -----------------------------------------------------------------------------------

    def fractions(self, masks: np.ndarray | Sequence[np.ndarray], n_classes: int) -> np.ndarray:
        """Share of each class among the labelled pixels of each token, `[n_tokens, n_classes]`.

        Pixels labelled `IGNORE` count for nothing; a token with no labelled pixel is all zero.

        Args:
            masks: one `[height, width]` array of class numbers an image (or one array, if there is
                one image), of the size of the original picture.
            n_classes: how many classes there are.
        """
        masks = self._masks(masks)
        out = np.zeros((len(self), n_classes))
        for token in range(len(self)):
            pixels = self.pixels(token, masks[self.image[token]])
            counts = np.bincount(pixels[pixels != IGNORE], minlength=n_classes)
            if len(counts) > n_classes:
                raise ValueError(
                    f"a mask holds class {len(counts) - 1}, but there are only {n_classes} classes"
                )
            out[token] = counts / max(counts.sum(), 1)
        return out

    def labels(self, masks: np.ndarray | Sequence[np.ndarray], n_classes: int) -> np.ndarray:
        """Majority class of each token, `[n_tokens]` int64; `IGNORE` where no pixel is labelled."""
        fractions = self.fractions(masks, n_classes)
        return np.where(fractions.any(1), fractions.argmax(1), IGNORE).astype(np.int64)

    def purity(self, masks: np.ndarray | Sequence[np.ndarray], n_classes: int) -> np.ndarray:
        """Share of the majority class in each token, `[n_tokens]`; 1 where the cell is pure."""
        return np.asarray(self.fractions(masks, n_classes).max(1))

    def pixels(self, token: int, mask: np.ndarray) -> np.ndarray:
        """The mask's values under one token: pixels whose centre lies in its box.

        A box smaller than a pixel (an enlarged picture) gives the pixel that holds its middle.
        """
        left, top, right, bottom = self.box[token]
        height, width = mask.shape
        x0, x1 = _centres(left, right, width)
        y0, y1 = _centres(top, bottom, height)
        return np.asarray(mask[y0:y1, x0:x1], dtype=np.int64).ravel()

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
        if not self.uniform or array.shape != (self.n_images, *(2 * [len(self.of_image(0))])):
            raise EdgeError(
                f"a mask of shape {list(array.shape)} for {self.n_images} images of "
                f"{[r * c for r, c in self.shapes]} tokens; [n_images, dst, src] would do"
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


def _centres(low: float, high: float, size: int) -> tuple[int, int]:
    """First and one-past-last pixel whose centre lies in [low, high), clipped to the picture."""
    first, last = int(np.ceil(low - 0.5)), int(np.ceil(high - 0.5))
    if last <= first:
        first = int(np.floor((low + high) / 2))
        last = first + 1
    first, last = max(first, 0), min(last, size)
    return (first, last) if first < last else (0, 0)


def raster(
    input_ids: np.ndarray,
    image_token: int,
    *,
    shapes: Sequence[tuple[int, int]],
    boxes: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, int]],
) -> TokenGrid:
    """The grid of families that lay each image out row by row in one run of placeholders.

    Args:
        input_ids: `[batch, pos]`, in which `image_token` stands once for each image token.
        image_token: its id.
        shapes: (rows, columns) of each image, in the order in which the images appear.
        boxes: `[rows * columns, 4]` of each image.
        sizes: (width, height) of each original picture.

    Raises:
        ValueError: the number of placeholders is not the number of image tokens.
    """
    row, position = np.nonzero(input_ids == image_token)
    counts = [r * c for r, c in shapes]
    if sum(counts) != len(position):
        raise ValueError(
            f"the prompts hold {len(position)} image placeholders, but {len(shapes)} image(s) "
            f"give {sum(counts)} image tokens; use one placeholder an image and let the processor "
            "expand it"
        )
    image = np.repeat(np.arange(len(shapes)), counts)
    cells = [np.indices(shape).reshape(2, -1).T for shape in shapes]
    return TokenGrid(
        row=row,
        position=position,
        image=image,
        cell=np.concatenate(cells),
        box=np.concatenate(list(boxes)),
        shapes=tuple(shapes),
        sizes=tuple(sizes),
        n_batch=input_ids.shape[0],
        n_pos=input_ids.shape[1],
    )
