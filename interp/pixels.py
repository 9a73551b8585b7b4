"""Between boxes and pixels: what lies under a cell, and a cell's score back on the picture.

A box is (left, top, right, bottom) in pixels of a picture, with fractions; pixel (x, y) covers
[x, x + 1) by [y, y + 1). A pixel belongs to a box if its *centre* lies inside, so boxes that tile a
picture share its pixels out without rest and without overlap. A box smaller than a pixel (an
enlarged picture) takes the pixel that holds its middle.

`class_counts` counts labels under many boxes at once, without a loop over boxes. `nearest` looks at
a regular raster of points in each box instead, as a mask is resized together with its picture: no
two classes are ever mixed to a third. `paint` goes the other way: every pixel takes its cell's
score ("nearest"), or a mixture of the four cells around it ("bilinear", which is what upsampling a
map of logits means).
"""

from __future__ import annotations

import numpy as np

from interp.labels import IGNORE


def spans(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels of each box: first column, first row, one past the last column, and row; `[n, 4]` int.

    Args:
        boxes: `[n, 4]`.
        size: (width, height) of the picture. A box outside it gives an empty span.
    """
    first, last = (np.ceil(side - 0.5).astype(np.int64) for side in (boxes[:, :2], boxes[:, 2:]))
    middle = np.floor((boxes[:, :2] + boxes[:, 2:]) / 2).astype(np.int64)
    tiny = last <= first
    first, last = np.where(tiny, middle, first), np.where(tiny, middle + 1, last)
    first, last = np.maximum(first, 0), np.minimum(last, np.array(size))
    return np.concatenate([np.minimum(first, last.clip(0)), last.clip(0)], axis=1)


def class_counts(boxes: np.ndarray, mask: np.ndarray, n_classes: int) -> np.ndarray:
    """Pixels of each class under each box, `[n, n_classes]` int; `IGNORE` is not counted.

    Args:
        boxes: `[n, 4]`.
        mask: `[height, width]` int, class numbers.
        n_classes: how many classes there are.

    Raises:
        ValueError: a class number that is none.
    """
    height, width = mask.shape
    mask = np.asarray(mask).astype(np.int64)
    ignored = mask == IGNORE
    low, high = mask.min(), np.where(ignored, 0, mask).max()
    if low < 0 or high >= n_classes:
        raise ValueError(
            f"a mask holds class {low if low < 0 else high}, but there are only {n_classes} classes"
        )
    # what is not counted becomes a class of its own, dropped at the end
    labels = np.where(ignored, n_classes, mask).ravel()
    x0, y0, x1, y1 = spans(boxes, (width, height)).T
    # the boxes as one long list of row segments, and those as one long list of pixels
    box, row = _ranges(y0, np.where(x1 > x0, y1, y0))
    length = (x1 - x0)[box]
    first = row * width + x0[box] - (np.cumsum(length) - length)
    pixel = np.repeat(first, length)
    pixel += np.arange(len(pixel))
    count = np.repeat(box * (n_classes + 1), length)
    count += labels[pixel]
    counts = np.bincount(count, minlength=len(boxes) * (n_classes + 1))
    return counts.reshape(len(boxes), n_classes + 1)[:, :n_classes]


def nearest(boxes: np.ndarray, mask: np.ndarray, n: int) -> np.ndarray:
    """A mask at the centres of the n x n equal parts of each box, `[n_boxes, n, n]` int64.

    A point takes the pixel that holds it, on the border of two the one on the right or below,
    whatever the last digit of the box's edge; outside the mask it is `IGNORE`.

    Args:
        boxes: `[n_boxes, 4]`, in pixels of the mask.
        mask: `[height, width]` int.
        n: parts along each side.

    >>> nearest(np.array([[-1, 0, 1, 2]]), np.array([[7, 8], [9, 8]]), 2).tolist()
    [[[255, 7], [255, 9]]]
    """
    height, width = mask.shape
    share = (np.arange(n) + 0.5) / n
    low, high = boxes[:, :2, None], boxes[:, 2:, None]
    at = np.floor(low + (high - low) * share + 1e-6).astype(np.int64)  # [n_boxes, (x, y), n]
    x, y = at[:, 0, None, :], at[:, 1, :, None]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    found = np.asarray(mask, dtype=np.int64)[y.clip(0, height - 1), x.clip(0, width - 1)]
    return np.where(inside, found, IGNORE)


def paint(
    scores: np.ndarray,
    boxes: np.ndarray,
    size: tuple[int, int],
    *,
    bilinear: bool,
    fill: float,
) -> np.ndarray:
    """Scores of a grid's cells on the pixels of its picture, `[height, width, ...]`.

    Args:
        scores: `[rows, columns, ...]`.
        boxes: `[rows, columns, 4]` of a rectangular grid.
        size: (width, height) of the picture.
        bilinear: mix neighbouring cells by the distance of their centres; pixels outside the
            outermost centres take the nearest cells.
        fill: for pixels in no cell.
    """
    x, y = boxes[0, :, [0, 2]], boxes[:, 0, [1, 3]].T  # [2, cells] start and end along each axis
    out = scores
    for axis, edges, n in ((0, y, size[1]), (1, x, size[0])):
        centres = np.arange(n) + 0.5
        middle = edges.mean(0)
        if bilinear:
            at = np.interp(centres, middle, np.arange(len(middle)))
            low = np.floor(at).astype(int)
            high = np.minimum(low + 1, len(middle) - 1)
            weight = (at - low).reshape([-1 if a == axis else 1 for a in range(out.ndim)])
            # low + (high - low) * weight, in place: a map of logits is large
            step = out.take(high, axis)
            out = out.take(low, axis)
            step -= out
            step *= weight.astype(out.dtype)
            out += step
        else:
            inside = (edges[0][:, None] <= centres) & (centres < edges[1][:, None])
            # where cells leave a gap, it goes to the one with the nearer centre
            nearest = np.searchsorted((middle[:-1] + middle[1:]) / 2, centres, side="right")
            out = out.take(np.where(inside.any(0), inside.argmax(0), nearest), axis)
    for axis, edges, n in ((0, y, size[1]), (1, x, size[0])):
        centres = np.arange(n) + 0.5
        outside = (centres < edges[0, 0]) | (centres >= edges[1, -1])
        out[(slice(None),) * axis + (outside,)] = fill
    return out


def _ranges(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All ranges one after the other: whose number it is, and the number.

    >>> [a.tolist() for a in _ranges(np.array([5, 0, 2]), np.array([7, 0, 3]))]
    [[0, 0, 2], [5, 6, 2]]
    """
    length = stop - start
    owner = np.repeat(np.arange(len(start)), length)
    first = np.cumsum(length) - length
    return owner, np.arange(len(owner)) - np.repeat(first - start, length)
