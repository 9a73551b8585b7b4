"""From token scores to pixel classes: what a probe says of each pixel of a picture.

Segmentation is judged on pixels, and a probe speaks once a token. The field's way from one to the
other is bilinear: a token's scores stand at the centre of its cell, a pixel takes the mixture of
the four centres around it, and the class with the highest mixed score is what was said. Done
plainly that is `interp.pixels.paint` and an argmax, for ADE20K's 150 classes on 512 x 683 pixels
52 million mixtures a picture and stage. `pixel_classes` gives the same classes, to the last pixel,
and makes few of the mixtures.

**What need not be mixed.** Centres cut the picture into patches with a token at each corner. Inside
a patch a class's score is a weighted mean of its scores at the four corners, with weights that all
classes share, none below zero. So if class j beats class k at *all four* corners, it beats k at
every pixel of the patch, and k is out. (That k wins at no corner is not enough: a class that is
second everywhere can win in the middle, where the corners' winners cancel each other.) The rival
need not be a class: if the *mean of several classes' scores* beats k at all four corners, it does
so at every pixel, and there the best of these classes is no lower than their mean. That is what
clears an edge, with one class on this side and another on that. Tried are each corner's winner, the
class that is highest on the whole, and the mean of the corners' winners. What is left, two classes
a patch for a probe that has learned something, is mixed as `paint` would. With scores that say
little, as of a control with random features, more is left and it takes longer; never is anything
left out that could win.

**Rounding.** With u half the distance from 1 to the next number, a mixture of mixtures of scores up
to A is off by less than 10 u A, and the mean of four by less than 4 u A. A class with scores up to
B is dropped only if it loses by more than 16 u (A + B): then it loses in the *rounded* computation
as well, and the result is the same to the last pixel. Ties go to the lower class, as in argmax.

Pixels outside the grid (cut off by the image processor) are `IGNORE`: nothing was said of them.

Working memory, beyond what comes in and goes out: some `_WORK` numbers of the scores' type.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from interp.cells import CellGrid
from interp.labels import IGNORE
from interp.pixels import paint

#: numbers held at once by one step: what fits a CPU's cache, what keeps a GPU busy (128 MB)
_WORK = {"cpu": 1 << 17, "other": 1 << 25}


def finest(grid: CellGrid, image: int) -> np.ndarray:
    """Tokens (indices into the grid's arrays) of the view that shows an image finest, raster order.

    That is "tiles" where the image is cut, the only view otherwise: `grid.select("finest")`.
    """
    views = [v for v, of in enumerate(grid.view_image) if of == image % grid.n_images]
    tiles = [v for v in views if grid.view_names[v] == "tiles"]
    return grid.of_view((tiles or views)[0])


def finite(values: Tensor) -> bool:
    """Whether all are finite numbers, without a mask as large as they are."""
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())


def pixel_cells(grid: CellGrid, image: int = 0) -> np.ndarray:
    """The cell that each pixel lies in, `[height, width]` int: its number in raster order of the
    finest view, -1 for pixels that no token sees."""
    shape, boxes = _lattice(grid, image)
    cells = np.arange(len(boxes)).reshape(shape)
    size = grid.sizes[image]
    return paint(cells, boxes.reshape(*shape, 4), size, bilinear=False, fill=-1)


def pixel_classes(logits: Tensor, grid: CellGrid, image: int = 0) -> Tensor:
    """The class with the highest score at each pixel, `[..., height, width]` int64.

    Args:
        logits: `[..., n_tokens, K]` floating-point scores of the tokens of `finest(grid, image)`,
            in that order; leading axes (stages, say) share the work that depends on the grid only.
            Half precision is mixed in float32.
        grid: where the tokens lie, in pixels of the original pictures.
        image: which of its pictures.

    Returns:
        Class numbers on the logits' device, `IGNORE` where no token sees the pixel.

    Raises:
        ValueError: scores of another number of tokens, or that are not finite.
        TypeError: scores that are not floating-point.

    Usage: `pixel_classes(bank.logits(stage, state), x.grid)`
    """
    shape, boxes = _lattice(grid, image)
    if not logits.is_floating_point():
        raise TypeError(f"scores to be mixed are floating-point numbers, not {logits.dtype}")
    if logits.ndim < 2 or logits.shape[-2] != len(boxes):
        raise ValueError(
            f"scores of shape {list(logits.shape)} for the {len(boxes)} tokens of image {image}: "
            "[..., n_tokens, K]; of several views only the finest one's, see finest(grid, image)"
        )
    if not finite(logits):
        raise ValueError("scores must be finite: give a class that cannot win a low number")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    mesh = _Mesh.of(boxes.reshape(*shape, 4), grid.sizes[image], logits)
    flat = logits.detach().reshape(-1, *shape, logits.shape[-1])
    work = _WORK["cpu" if logits.device.type == "cpu" else "other"]
    at_once = max(1, work // (4 * flat[0].numel()))
    done = [mesh.said(part, work) for part in flat.split(at_once)]
    return torch.cat(done).reshape(*logits.shape[:-2], *mesh.seen.shape)


@dataclass(frozen=True, eq=False)
class _Mesh:
    """The patches between the centres of a grid's cells, and where each pixel lies in them.

    There are as many patches as cells: patch (r, c) lies between the centres of cells (r, c) and
    (r + 1, c + 1). The last ones, beyond the last centres, and half of the first ones repeat cells.

    Attributes:
        down: `[rows, h]` share of the lower cells at each line of a patch, h the most that one has.
        across: `[cols, w]` share of the right cells at each column of a patch.
        pixel: `[height, width]` where a pixel lies in the row of all patches' pixels.
        seen: `[height, width]` bool, whether some cell holds the pixel.
    """

    down: Tensor
    across: Tensor
    pixel: Tensor
    seen: Tensor

    @classmethod
    def of(cls, boxes: np.ndarray, size: tuple[int, int], like: Tensor) -> _Mesh:
        """The mesh of boxes [rows, cols, 4] on a picture of (width, height)."""
        low, offset, share, seen = zip(
            _axis(boxes[:, 0, 1], boxes[:, 0, 3], size[1]),
            _axis(boxes[0, :, 0], boxes[0, :, 2], size[0]),
            strict=True,
        )
        n_cols, h, w = boxes.shape[1], share[0].shape[1], share[1].shape[1]
        row = (low[0] * n_cols * h + offset[0]) * w
        pixel = row[:, None] + (low[1] * h * w + offset[1])
        return cls(
            torch.as_tensor(share[0]).to(like),
            torch.as_tensor(share[1]).to(like),
            torch.as_tensor(pixel, device=like.device),
            torch.as_tensor(seen[0][:, None] & seen[1], device=like.device),
        )

    def said(self, scores: Tensor, work: int) -> Tensor:
        """Classes [s, height, width] of scores [s, rows, cols, K]."""
        n, n_rows, n_cols, _ = scores.shape
        corners = _corners(scores)  # [4, patches, K]
        left = _candidates(corners, _corners(scores.argmax(-1, keepdim=True)))
        count, order = left.sum(1).sort()
        # the numbers of the classes left, in rising order, then those of the others
        ranked = torch.argsort(left, dim=1, descending=True, stable=True)
        h, w = self.down.shape[1], self.across.shape[1]
        out = ranked[:, :1, None].to(torch.int32).expand(-1, h, w).contiguous()
        several = int(torch.searchsorted(count, 1, right=True))
        at_once = max(1, work // (h * w))
        for start in range(several, len(order), at_once):
            patches, counts = order[start : start + at_once], count[start : start + at_once]
            among = ranked[patches, : int(counts[-1])]
            place = patches % (n_rows * n_cols)
            down, across = self.down[place // n_cols], self.across[place % n_cols]
            best = _best(corners, patches, among, counts, down, across)
            which = among.gather(1, best.flatten(1)).view_as(best)
            out[patches] = which.to(out.dtype)
        pixels = out.reshape(n, -1).index_select(1, self.pixel.flatten())
        said = pixels.reshape(n, *self.pixel.shape).long()
        return said.masked_fill_(~self.seen, IGNORE)


def _lattice(grid: CellGrid, image: int) -> tuple[tuple[int, int], np.ndarray]:
    """Shape of an image's finest view, and its boxes [n_tokens, 4]."""
    at = finest(grid, image)
    return grid.shapes[int(grid.view[at[0]])], grid.box[at]


def _axis(
    first: np.ndarray, last: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One axis of a mesh: of each pixel its patch, its place in that, and whether it is seen; of
    each patch [patches, longest] the share of the second cell at each place."""
    centres = np.arange(n) + 0.5
    middle = (first + last) / 2
    at = np.interp(centres, middle, np.arange(len(middle)))
    low = np.floor(at).astype(np.int64)
    offset = np.arange(n) - np.searchsorted(low, low)
    share = np.zeros((len(middle), offset.max() + 1))
    share[low, offset] = at - low
    return low, offset, share, (centres >= first[0]) & (centres < last[-1])


def _corners(cells: Tensor) -> Tensor:
    """[s, rows, cols, K] to [4, s * rows * cols, K]: top left, top right, bottom left and right."""
    right = torch.cat([cells[:, :, 1:], cells[:, :, -1:]], 2)
    top = torch.stack([cells, right])
    both = torch.cat([top, torch.cat([top[:, :, 1:], top[:, :, -1:]], 2)])
    return both.flatten(1, 3)


def _candidates(corners: Tensor, winners: Tensor) -> Tensor:
    """[patches, K] bool: classes that no rival beats at all four corners by more than rounding.

    Rivals are the winners of the corners, the class with the highest sum, and the winners' mean.

    Args:
        corners: [4, patches, K] scores.
        winners: [4, patches, 1] the class that wins each corner.
    """
    eps = torch.finfo(corners.dtype).eps  # u of the text is eps / 2
    bound = corners.abs().amax(0).mul_(8 * eps)
    left = torch.ones_like(bound, dtype=torch.bool)
    highest = corners.sum(0).argmax(-1, keepdim=True)
    rivals = torch.cat([*winners, highest], 1)  # [patches, 5]
    score = corners.gather(2, rivals.expand(4, -1, -1))  # [4, patches, 5]
    slack = bound.gather(1, rivals)
    score = torch.cat([score, score[..., :4].mean(-1, keepdim=True)], -1)
    slack = torch.cat([slack, slack[:, :4].amax(1, keepdim=True)], -1)
    for i in range(score.shape[-1]):
        ahead = score[..., i, None] - corners
        left &= ahead.amin(0).sub_(bound) <= slack[:, i, None]
    return left


def _best(
    corners: Tensor, patches: Tensor, among: Tensor, counts: Tensor, down: Tensor, across: Tensor
) -> Tensor:
    """Which of some classes is highest at each pixel of some patches, the first if several are.

    The order of rounding is `paint`'s: down the picture first, low + (high - low) * share.

    Args:
        corners: [4, all patches, K] scores.
        patches: [n] which patches.
        among: [n, m] classes, of which a patch has the first `counts`.
        counts: [n] in rising order, so that the patches with many classes are the last ones.
        down: [n, h] shares of the lower corners.
        across: [n, w] shares of the right corners.

    Returns:
        [n, h, w], the class's place in `among`.
    """
    top = corners[:2, patches[:, None], among]  # [2, n, m]
    side = corners[2:, patches[:, None], among].sub_(top)[..., None] * down[:, None]
    left, right = side.add_(top[..., None])  # [n, m, h]
    right.sub_(left)
    high = right[:, 0, :, None] * across[:, None]
    high += left[:, 0, :, None]
    best = torch.zeros_like(high)
    first = torch.searchsorted(counts, torch.arange(among.shape[1]).to(counts), right=True)
    for m, n in enumerate(first.tolist()[1:], 1):
        here = right[n:, m, :, None] * across[n:, None]
        here += left[n:, m, :, None]
        # no masks: filling where one is True takes ten times as long as arithmetic
        higher = torch.gt(here, high[n:], out=torch.empty_like(here)).mul_(m)
        torch.maximum(best[n:], higher, out=best[n:])
        torch.maximum(high[n:], here, out=high[n:])
    return best.long()
