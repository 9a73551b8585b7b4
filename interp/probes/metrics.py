"""Scores of a segmentation: confusion matrices first, everything else from them.

A confusion matrix counts, for each true class (row), what was said instead (column). It is
*additive*: the matrix of a set is the sum of its images' matrices. So the functions here keep
one matrix an image ([n_images, C, C]), and accuracy and mIoU are functions of a sum, which is
what `interp.stats.bootstrap` resamples.

The convention is that of mmsegmentation and DINOv3. Pixels labelled `IGNORE` are dropped. All
matrices are added up. A class's IoU is its intersection (said and true) over its union (said or
true). mIoU is the mean over the classes that occur, as truth or as prediction. It is never the
mean of per-image mIoUs, which would weigh a class by the number of images that hold it.

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
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import interpolate

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
    truth, said = _ints(labels, "labels"), _ints(predictions, "predictions")
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
    truth, said = _ints(labels, "labels"), _ints(predictions, "predictions")
    _same_shape(truth, said)
    if truth.ndim == 0:
        raise ValueError("labels must be [n_images, ...], got one number")
    n = len(truth)
    image = np.broadcast_to(np.arange(n).reshape(n, *[1] * (truth.ndim - 1)), truth.shape)
    keep = truth != IGNORE
    truth, said, image = truth[keep], said[keep], image[keep]
    _inside(truth, n_classes, "labels")
    _inside(said, n_classes, "predictions")
    flat = (image * n_classes + truth) * n_classes + said
    counts = np.bincount(flat, minlength=n * n_classes**2)
    return counts.reshape(n, n_classes, n_classes).astype(np.int64)


def accuracy(conf: ArrayLike) -> Floats:
    """Share of right answers [...] of matrices [..., C, C]; nan where nothing was counted.

    >>> float(accuracy([[3, 1], [0, 4]]))
    0.875
    """
    matrix = np.asarray(conf, np.float64)
    return _divide(np.trace(matrix, axis1=-2, axis2=-1), matrix.sum((-2, -1)))


def iou_per_class(conf: ArrayLike) -> Floats:
    """Intersection over union [..., C] of matrices [..., C, C]; nan for classes not occurring.

    >>> iou_per_class([[3, 1, 0], [0, 4, 0], [0, 0, 0]]).tolist()
    [0.75, 0.8, nan]
    """
    matrix = np.asarray(conf, np.float64)
    both = np.diagonal(matrix, axis1=-2, axis2=-1)
    return _divide(both, matrix.sum(-1) + matrix.sum(-2) - both)


def mean_iou(conf: ArrayLike) -> Floats:
    """Mean IoU [...] over the classes that occur (union > 0) in matrices [..., C, C].

    >>> round(float(mean_iou([[3, 1, 0], [0, 4, 0], [0, 0, 0]])), 3)
    0.775
    """
    iou = iou_per_class(conf)
    return _divide(np.nansum(iou, -1), (~np.isnan(iou)).sum(-1))


def majority_floor(train_labels: ArrayLike | Tensor, test_labels: ArrayLike | Tensor) -> float:
    """Accuracy on the test labels of always saying the most frequent training label.

    Ignored labels count in neither; a tie goes to the lower class. `ValueError` when one side
    has no label left.

    >>> majority_floor([0, 1, 1, 255], [1, 0, 1, 1])
    0.75
    """
    train, test = _ints(train_labels, "train_labels"), _ints(test_labels, "test_labels")
    train, test = train[train != IGNORE], test[test != IGNORE]
    if not len(train) or not len(test):
        raise ValueError(f"{len(train)} training and {len(test)} test labels are not ignored")
    return float((test == np.bincount(train).argmax()).mean())


def pixel_logits(
    token_logits: NDArray[Any] | Tensor, size: tuple[int, int]
) -> NDArray[np.floating]:
    """Upsample logits [(n,) rows, cols, C] to `size` = (H, W): [(n,) H, W, C], bilinear.

    A token is the square of pixels that it covers, its logits sit at the centre of it
    (`align_corners=False`).

    >>> pixel_logits(np.array([[[0.0], [1.0]]]), (1, 4))[0, :, 0].tolist()
    [0.0, 0.25, 0.75, 1.0]
    """
    logits = _upsample(_logits(token_logits), size).movedim(-3, -1).numpy()
    out: NDArray[np.floating] = logits
    return out


def pixel_confusion(token_logits: NDArray[Any] | Tensor, masks: ArrayLike | Tensor) -> Ints:
    """Matrices [n, C, C] of upsampled logits [n, rows, cols, C] against masks [n, H, W].

    >>> pixel_confusion(np.array([[[[1.0, 0.0], [0.0, 1.0]]]]), [[[0, 0, 1, 255]]]).tolist()
    [[[2, 0], [0, 1]]]
    """
    logits, truth = _logits(token_logits), _ints(masks, "masks")
    if logits.ndim != 4 or truth.ndim != 3 or len(logits) != len(truth):
        raise ValueError(
            "need logits [n, rows, cols, C] and masks [n, H, W], got "
            f"{list(logits.shape)} and {list(truth.shape)}"
        )
    n_classes = logits.shape[-1]
    out = np.zeros((len(truth), n_classes, n_classes), np.int64)
    for i, mask in enumerate(truth):  # one at a time: pixels times classes is large
        said = _upsample(logits[i], mask.shape).argmax(-3).numpy()
        out[i] = confusion(mask, said, n_classes)
    return out


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
    tokens, truth = _ints(token_labels, "token_labels"), _ints(masks, "masks")
    if tokens.ndim != 3 or truth.ndim != 3 or len(tokens) != len(truth):
        raise ValueError(
            "need token labels [n, rows, cols] and masks [n, H, W], got "
            f"{list(tokens.shape)} and {list(truth.shape)}"
        )
    _inside(tokens[tokens != IGNORE], n_classes, "token_labels")
    _inside(truth[truth != IGNORE], n_classes, "masks")
    (n, rows, cols), (_, height, width) = tokens.shape, truth.shape
    row = (2 * np.arange(height) + 1) * rows // (2 * height)
    col = (2 * np.arange(width) + 1) * cols // (2 * width)
    cell = row[:, None] * cols + col
    out = np.zeros((n, n_classes, n_classes), np.int64)
    for i, mask in enumerate(truth):
        keep = mask != IGNORE
        flat = cell[keep] * n_classes + mask[keep]
        counts = np.bincount(flat, minlength=rows * cols * n_classes).reshape(-1, n_classes)
        label = tokens[i].reshape(-1)
        label = np.where(label == IGNORE, counts.argmax(1), label)
        np.add.at(out[i].T, label, counts)
    return out


def _ints(values: ArrayLike | Tensor, name: str) -> Ints:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    return array.astype(np.int64)


def _same_shape(truth: Ints, said: Ints) -> None:
    if truth.shape != said.shape:
        raise ValueError(
            f"labels and predictions must have one shape, got {truth.shape} and {said.shape}"
        )


def _inside(values: Ints, n_classes: int, name: str) -> None:
    wrong = values[(values < 0) | (values >= n_classes)]
    if len(wrong):
        raise ValueError(
            f"{name} must be 0..{n_classes - 1} (labels also {IGNORE}), "
            f"got {np.unique(wrong)[:10].tolist()} in {len(wrong)} places"
        )


def _divide(top: NDArray[Any], bottom: NDArray[Any]) -> Floats:
    out = np.full(np.shape(top), np.nan)
    np.divide(top, bottom, out=out, where=np.asarray(bottom) != 0)
    return out


def _logits(values: NDArray[Any] | Tensor) -> Tensor:
    tensor = torch.as_tensor(values).detach().cpu()
    if tensor.ndim not in (3, 4) or not tensor.is_floating_point():
        raise ValueError(
            "token logits must be floats [rows, cols, C] or [n, rows, cols, C], "
            f"got {list(tensor.shape)} {tensor.dtype}"
        )
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _upsample(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """[(n,) rows, cols, C] to [(n,) C, H, W]."""
    batch = logits.movedim(-1, -3)
    single = batch.ndim == 3
    out = interpolate(batch[None] if single else batch, size, mode="bilinear", align_corners=False)
    return out[0] if single else out
