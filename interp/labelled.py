"""Labels of pixels and image tokens, down and up.

Down: `fractions`, `labels` and `purity` look at the pixels whose centres fall into a token's box;
`of_class` and `regions` select tokens by them. `warp` is the mask as the model sees the picture,
model pixel by model pixel. Up: `to_pixels` brings scores of tokens back to the
picture. Masks are given one a picture, in the size of the *original* picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from interp.cells import CellGrid
from interp.labels import IGNORE
from interp.pixels import class_counts, nearest, paint, spans


@dataclass(frozen=True, eq=False, repr=False)
class LabelGrid(CellGrid):
    """Image tokens that lie over pictures (`TokenGrid` is what one meets)."""

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

    def of_class(
        self, masks: np.ndarray | Sequence[np.ndarray], label: int, *, pure: float = 0.0
    ) -> np.ndarray:
        """`[n_tokens]` bool: tokens of one class, or of one segment of a mask of segments.

        Args:
            masks: as in `fractions`.
            label: the class, or the segment's number.
            pure: least share of the label in a token; by default the majority decides.

        Raises:
            ValueError: a label that is in none of the masks.

        Usage: `x.grid.edges(src=x.grid.of_class(mask, 3), dst=x.grid.of_class(mask, 2))`
        """
        several = self._masks(masks)
        found = np.setdiff1d(np.concatenate([np.unique(mask) for mask in several]), [IGNORE])
        if label not in found:
            raise ValueError(
                f"label {label} is in no mask; they hold {', '.join(map(str, found[:20]))}"
            )
        # numbered anew, as segments may have large numbers; IGNORE is none of them
        names = np.arange(len(found))
        names[names >= IGNORE] += 1
        again = [
            np.where(
                mask == IGNORE, IGNORE, names[np.searchsorted(found, mask).clip(0, len(found) - 1)]
            )
            for mask in several
        ]
        majority = self.labels(again, len(found) + 1, pure=pure)
        return np.asarray(majority == names[np.searchsorted(found, label)])

    def regions(self, labels: np.ndarray) -> np.ndarray:
        """The connected region of each token, `[n_tokens]` int, counted over the batch; -1 for
        tokens without a label.

        Two tokens are connected if they share a side and a label (and a view).

        Args:
            labels: `[n_tokens]`, as `labels` gives them.

        Usage: `region = x.grid.regions(labels)`, and `region == region[12]` are the tokens of
        the region that token 12 is in.
        """
        labels = np.asarray(labels)
        if labels.shape != (len(self),):
            raise ValueError(f"{list(labels.shape)} labels for {len(self)} tokens")
        out, n = np.full(len(self), -1), 0
        for view, shape in enumerate(self.shapes):
            at = self.of_view(view)
            here = labels[at].reshape(shape)
            for label in np.setdiff1d(here, [IGNORE]):
                found, k = ndimage.label(here == label)
                out[at] = np.where(found.ravel() > 0, found.ravel() + n - 1, out[at])
                n += k
        return out

    def pixels(self, token: int, mask: np.ndarray) -> np.ndarray:
        """The mask's values under one token: pixels whose centre lies in its box.

        A box smaller than a pixel (an enlarged picture) gives the pixel that holds its middle.
        """
        height, width = mask.shape
        x0, y0, x1, y1 = spans(self.box[[token]], (width, height))[0]
        return np.asarray(mask[y0:y1, x0:x1], dtype=np.int64).ravel()

    def warp(self, masks: np.ndarray | Sequence[np.ndarray], px: int) -> np.ndarray:
        """The masks as the model sees the pictures: through the processor's resize, crop, padding
        and tiles, by nearest neighbour; `[n_tokens, px, px]` int64.

        Entry `[token, row, column]` is the class at the centre of one of the px x px parts of the
        token's cell. With as many parts as the cell has model pixels (14 for LLaVA's patches of 14;
        28 for Qwen2-VL's tokens of 2 x 2 such patches, 14 for `x.patches`) each is a model pixel.
        What the processor added as padding is `IGNORE`; what it cropped away is in no token.

        Args:
            masks: as in `fractions`.
            px: parts along each side of a cell; 1 looks at its centre alone.

        Raises:
            ValueError: no parts, or masks that do not fit.

        Usage: `x.patches.warp(mask, 14)`
        """
        if px < 1:
            raise ValueError(f"px={px} parts of a cell; its model pixels, or 1 for its centre")
        out = np.empty((len(self), px, px), dtype=np.int64)
        for image, mask in enumerate(self._masks(masks)):
            at = self.of_image(image)
            out[at] = nearest(self.box[at], mask, px)
        return out

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
