"""Scores of a segmentation: confusion matrices first, everything else from them.

A confusion matrix counts, for each true class (row), what was said instead (column). It is
*additive*: the matrix of a set is the sum of its images' matrices. So the functions here keep
one matrix an image ([n_images, C, C]), and accuracy and mIoU are functions of a sum, which is
what `interp.stats.bootstrap` resamples.

The convention is that of mmsegmentation and DINOv3. Pixels labelled `IGNORE` are dropped. All
matrices are added up. A class's IoU is its intersection (said and true) over its union (said or
true). mIoU is the mean over the classes that occur, as truth or as prediction. It is never the
mean of per-image mIoUs, which would weigh a class by the number of images that hold it. A class
that is said but never true counts with IoU 0, and one that is neither is left out; torchmetrics and
scikit-learn (`average="macro"`, `labels` not given) do the same. Mean accuracy is the mean over the
classes that are true somewhere, as scikit-learn's balanced accuracy; torchmetrics lets a class that
is said but never true count with 0 here.

None of these needs the whole matrix. `margins` are what they do need of it, three numbers a class:
how often it was rightly said, how often it was true, how often it was said. Margins add up, too.

Token and pixel scores differ. A probe speaks once a token, and a token covers many pixels:

- *token-mIoU* compares token predictions with token labels;
- *pixel-mIoU* upsamples the logits to the mask's size (bilinear, as segmentation heads do) and
  compares pixels;
- the *ceiling* is the pixel score that perfect token labels would reach: what is lost to the
  grid alone, so no probe is blamed for it;
- the *floor* is the accuracy of always saying the most frequent training class. With sky and
  wall everywhere it is high, and an accuracy without it says little.

Labels and predictions come as numpy arrays or torch tensors of integers; numpy comes out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from interp.labels import IGNORE

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def confusion(labels: ArrayLike | Tensor, predictions: ArrayLike | Tensor, n_classes: int) -> Ints:
    """Counts [C, C] of true class (row) against predicted class (column), any equal shapes.

    Where the label is `IGNORE` the prediction is not looked at. Anything else outside
    0..C-1 raises a `ValueError`.

    >>> confusion([0, 0, 1, 255], [0, 1, 1, 0], 2).tolist()
    [[1, 1], [0, 1]]
    """
    truth, said = integers(labels, "labels"), integers(predictions, "predictions")
    _same_shape(truth, said)
    one: Ints = confusion_per_image(truth[None], said[None], n_classes)[0]
    return one


def confusion_per_image(
    labels: ArrayLike | Tensor, predictions: ArrayLike | Tensor, n_classes: int
) -> Ints:
    """Like `confusion`, one matrix for each entry of the first axis: [n_images, C, C].

    >>> confusion_per_image([[0, 1], [1, 1]], [[0, 1], [0, 1]], 2).tolist()
    [[[1, 0], [0, 1]], [[0, 0], [1, 1]]]
    """
    truth, said = integers(labels, "labels"), integers(predictions, "predictions")
    _same_shape(truth, said)
    if truth.ndim == 0:
        raise ValueError("labels must be [n_images, ...], got one number")
    n = len(truth)
    image = np.broadcast_to(np.arange(n).reshape(n, *[1] * (truth.ndim - 1)), truth.shape)
    keep = truth != IGNORE
    truth, said, image = truth[keep], said[keep], image[keep]
    check_classes(truth, n_classes, "labels")
    check_classes(said, n_classes, "predictions")
    flat = (image * n_classes + truth) * n_classes + said
    counts = np.bincount(flat, minlength=n * n_classes**2)
    return counts.reshape(n, n_classes, n_classes).astype(np.int64)


def margins(conf: ArrayLike) -> Ints:
    """What scores need of matrices [..., C, C]: right, true and said of each class, [..., 3, C].

    >>> margins([[3, 1], [0, 4]]).tolist()
    [[3, 4], [4, 4], [3, 5]]
    """
    matrix = np.asarray(conf)
    right = np.diagonal(matrix, axis1=-2, axis2=-1)
    return np.stack([right, matrix.sum(-1), matrix.sum(-2)], -2)


def accuracy(conf: ArrayLike) -> Floats:
    """Share of right answers [...] of matrices [..., C, C]; nan where nothing was counted.

    >>> float(accuracy([[3, 1], [0, 4]]))
    0.875
    """
    return accuracy_of(margins(conf))


def mean_accuracy(conf: ArrayLike) -> Floats:
    """Mean [...] of the share of right answers of each class that is true somewhere.

    >>> float(mean_accuracy([[3, 1, 0], [0, 1, 0], [0, 0, 0]]))
    0.875
    """
    return mean_accuracy_of(margins(conf))


def iou_per_class(conf: ArrayLike) -> Floats:
    """Intersection over union [..., C] of matrices [..., C, C]; nan for classes not occurring.

    >>> iou_per_class([[3, 1, 0], [0, 4, 0], [0, 0, 0]]).tolist()
    [0.75, 0.8, nan]
    """
    return iou_of(margins(conf))


def mean_iou(conf: ArrayLike) -> Floats:
    """Mean IoU [...] over the classes that occur (union > 0) in matrices [..., C, C].

    >>> round(float(mean_iou([[3, 1, 0], [0, 4, 0], [0, 0, 0]])), 3)
    0.775
    """
    return mean_iou_of(margins(conf))


def accuracy_of(counts: ArrayLike) -> Floats:
    """`accuracy` of margins [..., 3, C]."""
    right, true, _ = _three(counts)
    return _divide(right.sum(-1), true.sum(-1))


def mean_accuracy_of(counts: ArrayLike) -> Floats:
    """`mean_accuracy` of margins [..., 3, C]."""
    right, true, _ = _three(counts)
    return _mean_known(_divide(right, true))


def iou_of(counts: ArrayLike) -> Floats:
    """`iou_per_class` of margins [..., 3, C]."""
    right, true, said = _three(counts)
    return _divide(right, true + said - right)


def mean_iou_of(counts: ArrayLike) -> Floats:
    """`mean_iou` of margins [..., 3, C]."""
    return _mean_known(iou_of(counts))


def ceiling_confusion(
    token_labels: ArrayLike | Tensor, masks: ArrayLike | Tensor, n_classes: int
) -> Ints:
    """Matrices [n, C, C] that perfect token labels would reach on masks [n, H, W].

    Every pixel takes the label of the token [n, rows, cols] that its centre lies in. A token
    that is itself labelled `IGNORE` takes the most frequent class of its labelled pixels:
    a probe says something there as well, and this is the best that it could say.

    >>> ceiling_confusion([[[0, 1]]], [[[0, 0, 0, 1]]], 2).tolist()
    [[[2, 1], [0, 1]]]
    """
    tokens, truth = integers(token_labels, "token_labels"), integers(masks, "masks")
    if tokens.ndim != 3 or truth.ndim != 3 or len(tokens) != len(truth):
        raise ValueError(
            "need token labels [n, rows, cols] and masks [n, H, W], got "
            f"{list(tokens.shape)} and {list(truth.shape)}"
        )
    check_classes(tokens[tokens != IGNORE], n_classes, "token_labels")
    check_classes(truth[truth != IGNORE], n_classes, "masks")
    (n, rows, cols), (_, height, width) = tokens.shape, truth.shape
    row = (2 * np.arange(height) + 1) * rows // (2 * height)
    col = (2 * np.arange(width) + 1) * cols // (2 * width)
    cell = row[:, None] * cols + col
    out = np.zeros((n, n_classes, n_classes), np.int64)
    for i, mask in enumerate(truth):
        out[i] = confusion(
            mask, perfect_pixels(tokens[i].ravel(), cell, mask, n_classes), n_classes
        )
    return out


def perfect_pixels(token_labels: Ints, cells: Ints, mask: Ints, n_classes: int) -> Ints:
    """What perfect tokens would say of each pixel, [H, W]; `IGNORE` of pixels in no cell.

    Args:
        token_labels: [n_tokens], classes or `IGNORE`. A token without a label says the most
            frequent class of its labelled pixels, the best that it could.
        cells: [H, W], the token that each pixel lies in, or -1.
        mask: [H, W], classes or `IGNORE`.
        n_classes: how many classes there are.
    """
    keep = (mask != IGNORE) & (cells >= 0)
    flat = cells[keep] * n_classes + mask[keep]
    counts = np.bincount(flat, minlength=len(token_labels) * n_classes).reshape(-1, n_classes)
    label = np.where(token_labels == IGNORE, counts.argmax(1), token_labels)
    return np.where(cells >= 0, label[cells], IGNORE)


def integers(values: ArrayLike | Tensor, name: str) -> Ints:
    """Values as int64; anything but whole numbers is a `TypeError`."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    return array.astype(np.int64)


def check_classes(values: Ints, n_classes: int, name: str) -> None:
    """See that all values are classes; anything else is a `ValueError` that counts them."""
    wrong = values[(values < 0) | (values >= n_classes)]
    if len(wrong):
        raise ValueError(
            f"{name} must be 0..{n_classes - 1} (labels also {IGNORE}), "
            f"got {np.unique(wrong)[:10].tolist()} in {len(wrong)} places"
        )


def _same_shape(truth: Ints, said: Ints) -> None:
    if truth.shape != said.shape:
        raise ValueError(
            f"labels and predictions must have one shape, got {truth.shape} and {said.shape}"
        )


def _three(counts: ArrayLike) -> tuple[Floats, Floats, Floats]:
    array = np.asarray(counts, np.float64)
    return array[..., 0, :], array[..., 1, :], array[..., 2, :]


def _mean_known(values: Floats) -> Floats:
    return _divide(np.nansum(values, -1), (~np.isnan(values)).sum(-1))


def _divide(top: NDArray[Any], bottom: NDArray[Any]) -> Floats:
    out = np.full(np.shape(top), np.nan)
    np.divide(top, bottom, out=out, where=np.asarray(bottom) != 0)
    return out
