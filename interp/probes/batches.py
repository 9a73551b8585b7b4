"""What one batch adds to the scores: counts of tokens and of pixels, all stages together.

A *row* is a stage, or a reference beside the stages. Two kinds of counts come out. Sums over the
batch (confusion matrices, right answers by position) are added to those of the set as they are.
*Margins* stay apart by picture, because each picture will be weighted by its own draws: of the
rows first how often each class was rightly said, then how often it was said, and last, once, how
often it was true, `[n_images, 2 rows + 1, K]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from interp.cells import CellGrid
from interp.labels import IGNORE
from interp.probes.groups import position_bins, token_groups
from interp.probes.metrics import check_classes, confusion, integers, perfect_pixels
from interp.probes.painting import finest, finite, pixel_cells, pixel_classes

Ints = NDArray[np.int64]

_PAINTED = 1 << 24  # pixels, over stages, that are painted at once on a GPU


def answers_of(
    said: Sequence[ArrayLike | Tensor],
    stages: Sequence[str],
    n_tokens: int,
    n_classes: int,
    majority: int | None,
) -> Ints:
    """The classes that each row said, `[rows, n_tokens]`; the floor's last, if there is a majority.

    Args:
        said: of each stage, classes `[n_tokens]` or logits `[n_tokens, K]`.
        stages: their names.
        n_tokens: in the batch.
        n_classes: how many classes there are.
        majority: the class that the floor says.

    Raises:
        ValueError: another shape, or logits that are not finite.
    """
    rows = []
    for stage, one in zip(stages, said, strict=True):
        shape = np.shape(one)
        if shape not in ((n_tokens,), (n_tokens, n_classes)):
            raise ValueError(
                f"{stage} says {list(shape)}: classes [{n_tokens}] or logits "
                f"[{n_tokens}, {n_classes}] are due"
            )
        if len(shape) == 2:
            logits = torch.as_tensor(one)
            if not finite(logits):
                raise ValueError(f"logits of {stage} are not all finite")
            one = logits.argmax(-1)
        rows.append(integers(one, stage))
    if majority is not None:
        rows.append(np.full(n_tokens, majority))
    return np.stack(rows)


def token_counts(
    grid: CellGrid,
    truth: Ints,
    answers: Ints,
    n_classes: int,
    shape: tuple[int, int],
    purity: ArrayLike | None = None,
) -> tuple[dict[str, Ints], dict[str, Ints]]:
    """Counts of a batch's labelled tokens.

    Args:
        grid: of the tokens.
        truth: `[n_tokens]`, classes or `IGNORE`.
        answers: `[rows, n_tokens]`, classes.
        n_classes: how many classes there are.
        shape: (rows, columns) of the map by position.
        purity: `[n_tokens]`, see `token_groups`.

    Returns:
        What adds up over the batch, by key; the margins of each picture, by key.
    """
    k, n_rows, counted = n_classes, len(answers), truth != IGNORE
    check_classes(truth[counted], k, "labels")
    check_classes(answers[:, counted], k, "predictions")
    groups = {"all": counted, **token_groups(grid, truth, purity)}
    truth, answers, image = truth[counted], answers[:, counted], grid.image[counted]
    row = np.arange(n_rows)[:, None]
    width = 2 * n_rows + 1
    place = image * width * k
    margins = {}
    for group, member in groups.items():
        at = member[counted]
        one, true, start = answers[:, at], truth[at], place[at]
        where = (start + row * k + true)[one == true], start + (row + n_rows) * k + one
        flat = np.concatenate([*map(np.ravel, where), start + (width - 1) * k + true])
        counts = _count(flat, grid.n_images * width * k)
        margins[f"token/{group}"] = counts.reshape(grid.n_images, width, k)
    bins, n_bins = position_bins(grid, shape)[counted], shape[0] * shape[1]
    right = _count((row * n_bins + bins)[answers == truth], n_rows * n_bins)
    sums = {
        "token/confusion": _count((row * k + truth) * k + answers, n_rows * k * k),
        "token/positions": np.concatenate([right, _count(bins, n_bins)]),
    }
    return sums, margins


def pixel_counts(
    grid: CellGrid,
    image: int,
    truth: Ints,
    logits: Sequence[ArrayLike | Tensor],
    mask: np.ndarray,
    n_classes: int,
    majority: int | None = None,
) -> tuple[Ints, Ints]:
    """Confusion matrices of a picture's labelled pixels, as far as tokens see them.

    Args:
        grid: of the batch's tokens.
        image: the picture's number in it.
        truth: `[n_tokens]` labels of the batch's tokens, classes or `IGNORE`.
        logits: of each stage `[n_tokens, K]`.
        mask: `[height, width]`, classes or `IGNORE`.
        n_classes: how many classes there are.
        majority: the class that the floor says.

    Returns:
        `[rows, K, K]`, the floor's (if there is a majority) and the ceiling's last; and two
        numbers, labelled pixels that no token sees, and labelled pixels.
    """
    k, mask = n_classes, integers(mask, "masks")
    labelled = mask != IGNORE
    check_classes(mask[labelled], k, "masks")
    at, cells = finest(grid, image), pixel_cells(grid, image)
    keep = labelled & (cells >= 0)
    matrices = []
    tensors = [torch.as_tensor(one) for one in logits]
    for (device, _), same in groupby(tensors, lambda one: (one.device, one.dtype)):
        tokens = torch.as_tensor(at, device=device)
        pixels = torch.as_tensor(np.flatnonzero(keep), device=device)
        true = torch.as_tensor(mask[keep], device=device) * k
        rest = [one[tokens] for one in same]
        at_once = 1 if device.type == "cpu" else max(1, _PAINTED // mask.size)
        for start in range(0, len(rest), at_once):
            classes = pixel_classes(torch.stack(rest[start : start + at_once]), grid, image)
            for one in classes.flatten(1):
                counts = torch.bincount(true + one[pixels], minlength=k * k)
                matrices.append(counts.view(k, k).cpu().numpy())
    if majority is not None:
        floor = np.zeros((k, k), np.int64)
        floor[:, majority] = np.bincount(mask[keep], minlength=k)
        matrices.append(floor)
    best = perfect_pixels(truth[at], cells, mask, k)
    matrices.append(confusion(mask[keep], best[keep], k))
    return np.stack(matrices), np.array([labelled.sum() - keep.sum(), labelled.sum()])


def margins_of(matrices: Ints) -> Ints:
    """Margins `[n_images, 2 rows + 1, K]` of matrices `[n_images, rows, K, K]` with one truth."""
    right = np.diagonal(matrices, axis1=-2, axis2=-1)
    return np.concatenate([right, matrices.sum(-2), matrices[:, 0].sum(-1)[:, None]], 1)


def _count(places: Ints, n: int) -> Ints:
    return np.bincount(places.ravel(), minlength=n).astype(np.int64, copy=False)
