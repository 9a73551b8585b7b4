"""Pixel classes against painting every class and against torch; whole, cut and padded pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from interp.labels import IGNORE
from interp.pixels import paint
from interp.probes import painting
from interp.probes.metrics import ceiling_confusion, confusion, perfect_pixels
from interp.probes.painting import finest, pixel_cells, pixel_classes
from tests.probes.lattices import grid_of, lattice, whole

#: (shape of the grid, picture (width, height), box that the grid covers)
CASES = {
    "whole": ((5, 7), (61, 43), (0, 0, 61, 43)),
    "centre cut out": ((6, 6), (61, 43), (9.3, 0, 52.1, 43)),
    "padded": ((6, 6), (61, 43), (0, -9, 61, 52)),
    "one cell": ((1, 1), (5, 4), (0, 0, 5, 4)),
    "one line": ((1, 6), (30, 8), (-2, 1, 33, 6)),
    "enlarged": ((9, 11), (7, 5), (0, 0, 7, 5)),
}


def plain(logits, grid, image=0):
    """Every class painted on every pixel, the first highest one taken."""
    at = finest(grid, image)
    shape = grid.shapes[grid.view[at[0]]]
    scores = np.asarray(logits).reshape(*shape, -1)
    boxes = grid.box[at].reshape(*shape, 4)
    painted = paint(scores, boxes, grid.sizes[image], bilinear=True, fill=np.nan)
    seen = ~np.isnan(painted[..., 0])
    return np.where(seen, painted.argmax(-1), IGNORE), seen


def kinds(rng, n, k, dtype):
    """Scores that are confident, ones that say nothing, near ties, ties, and classes never seen."""
    clear = rng.normal(size=(n, k)) * 0.1 + 3 * np.eye(k)[rng.integers(k, size=n)]
    noise = rng.normal(size=(n, k))
    near = 1 + 1e-7 * rng.integers(-3, 4, (n, k))
    ties = rng.integers(0, 2, (n, k)).astype(float)
    unseen = noise.copy()
    unseen[:, ::2] = -1e4
    second = -(noise**2)  # a class that wins at no corner, and in the middle of many patches
    second[:, -1] = -0.3
    return [np.asarray(one, dtype) for one in (clear, noise, near, ties, unseen, second)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", CASES)
def test_pixel_classes_are_those_of_painting_every_class(case, dtype):
    shape, size, box = CASES[case]
    grid = grid_of((size, [("base", shape, lattice(shape, box))]))
    rng = np.random.default_rng(3)
    for logits in kinds(rng, len(grid), 12, dtype):
        want, _ = plain(logits, grid)
        got = pixel_classes(torch.tensor(logits), grid)
        assert got.dtype == torch.int64
        np.testing.assert_array_equal(got.numpy(), want)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    k=st.integers(1, 20),
    steps=st.sampled_from([1, 2, 3, 1000]),
)
@example(seed=1, shape=(2, 2), size=(40, 40), k=3, steps=3)
def test_pixel_classes_on_uneven_cells_with_many_ties(seed, shape, size, k, steps):
    rng = np.random.default_rng(seed)
    sides = [
        np.sort(rng.uniform(-0.2 * n, 1.2 * n, cells + 1))
        for n, cells in zip(size[::-1], shape, strict=True)
    ]
    boxes = np.empty((*shape, 4))
    boxes[..., 1], boxes[..., 3] = sides[0][:-1, None], sides[0][1:, None]
    boxes[..., 0], boxes[..., 2] = sides[1][:-1], sides[1][1:]
    grid = grid_of((size, [("base", shape, boxes.reshape(-1, 4))]))
    logits = (np.round(rng.normal(size=(len(grid), k)) * steps) / steps).astype(np.float32)
    want, _ = plain(logits, grid)
    np.testing.assert_array_equal(pixel_classes(torch.tensor(logits), grid).numpy(), want)


def test_equal_to_torchs_upsampling_where_the_grid_covers_the_picture():
    rng = np.random.default_rng(0)
    shape, size, k = (6, 8), (59, 47), 15
    grid = grid_of(whole(shape, size))
    clear, noise, *_ = kinds(rng, len(grid), k, np.float64)
    for logits in (clear, noise):
        maps = torch.tensor(logits).reshape(1, *shape, k).permute(0, 3, 1, 2)
        up = interpolate(maps, size[::-1], mode="bilinear", align_corners=False)[0]
        assert (up.topk(2, 0).values.diff(dim=0).abs() > 1e-12).all()  # no ties to round apart
        got = pixel_classes(torch.tensor(logits), grid)
        torch.testing.assert_close(got, up.argmax(0))


def test_a_class_that_wins_at_no_corner_can_win_between_them():
    grid = grid_of(whole((1, 2), (40, 2)))
    logits = torch.tensor([[4.0, 0.0, 3.0], [0.0, 4.0, 3.0]])
    assert set(pixel_classes(logits, grid).unique().tolist()) == {0, 1, 2}


def test_stages_together_and_in_little_memory_are_stages_one_by_one(monkeypatch):
    rng = np.random.default_rng(5)
    shape, size, box = CASES["centre cut out"]
    grid = grid_of((size, [("base", shape, lattice(shape, box))]))
    logits = torch.tensor(np.stack(kinds(rng, len(grid), 12, np.float32))).unflatten(0, (2, 3))
    each = torch.stack([pixel_classes(one, grid) for one in logits.flatten(0, 1)])
    for work in (1, 1000, 1 << 20):
        monkeypatch.setitem(painting._WORK, "cpu", work)
        assert torch.equal(pixel_classes(logits, grid).flatten(0, 1), each)
    half = logits.bfloat16()
    assert torch.equal(pixel_classes(half, grid), pixel_classes(half.float(), grid))


def test_the_pruning_leaves_out_most_classes_and_never_a_winner():
    rng = np.random.default_rng(6)
    noise = rng.normal(size=(30, 50)).astype(np.float32)
    clear = noise / 10 + 3 * np.eye(50, dtype=np.float32)[np.repeat([4, 9, 9, 30, 4], 6)]
    for logits, most in ((clear, 3), (noise, 30)):
        cells = torch.tensor(logits).reshape(1, 5, 6, 50)
        corners = painting._corners(cells)
        left = painting._candidates(corners, painting._corners(cells.argmax(-1, keepdim=True)))
        assert left.sum(1).double().mean() < most
        share = torch.tensor(rng.dirichlet(np.ones(4), (2000, len(left))))
        mixed = torch.einsum("npc,cpk->npk", share, corners.double())
        assert left[torch.arange(len(left)), mixed.argmax(-1)].all()


def test_unseen_pixels_are_ignored_and_cells_are_where_their_boxes_say():
    shape, size, box = (2, 3), (10, 6), (2, 0, 8, 6)
    grid = grid_of((size, [("base", shape, lattice(shape, box))]))
    cells = pixel_cells(grid)
    want = np.full((6, 10), -1)
    for i, (left, top, right, bottom) in enumerate(grid.box.astype(int)):
        want[top:bottom, left:right] = i
    np.testing.assert_array_equal(cells, want)
    said = pixel_classes(torch.randn(6, 4), grid).numpy()
    np.testing.assert_array_equal(said == IGNORE, cells == -1)


def test_the_finest_view_says_the_pixels():
    size = (24, 12)
    base = ("base", (1, 2), lattice((1, 2), (0, 0, *size)))
    tiles = ("tiles", (3, 6), lattice((3, 6), (0, 0, *size)))
    grid = grid_of((size, [base]), (size, [base, tiles]))
    assert finest(grid, 0).tolist() == [0, 1]
    assert finest(grid, 1).tolist() == list(range(4, 22))
    assert pixel_cells(grid, 1).max() == 17
    logits = torch.randn(18, 5)
    alone = grid_of((size, [tiles]))
    assert torch.equal(pixel_classes(logits, grid, 1), pixel_classes(logits, alone))
    with pytest.raises(ValueError, match="for the 18 tokens of image 1"):
        pixel_classes(torch.randn(20, 5), grid, 1)


def test_scores_that_cannot_be_mixed_are_refused():
    grid = grid_of(whole((1, 2), (4, 2)))
    with pytest.raises(TypeError, match=r"not torch\.int64"):
        pixel_classes(torch.zeros(2, 3, dtype=torch.long), grid)
    for bad in (torch.nan, torch.inf, -torch.inf):
        logits = torch.zeros(2, 3)
        logits[1, 1] = bad
        with pytest.raises(ValueError, match="finite"):
            pixel_classes(logits, grid)


def test_ceiling_of_any_grid_is_the_best_token_map_pixel_by_pixel():
    rng = np.random.default_rng(8)
    shape, size, box = CASES["centre cut out"]
    grid = grid_of((size, [("base", shape, lattice(shape, box))]))
    mask = rng.integers(0, 4, size[::-1])
    mask[rng.random(mask.shape) < 0.1] = IGNORE
    mask[:10, :20] = IGNORE  # some cells have no label at all
    labels = grid.labels(mask, 4)
    assert (labels == IGNORE).any()
    cells = pixel_cells(grid)
    best = perfect_pixels(labels, cells, mask, 4)
    right = 0
    for (y, x), truth in np.ndenumerate(mask):
        inside = [
            i for i, b in enumerate(grid.box) if b[0] <= x + 0.5 < b[2] and b[1] <= y + 0.5 < b[3]
        ]
        assert (best[y, x] == IGNORE) == (not inside)
        if inside and truth != IGNORE:
            assert best[y, x] == labels[inside[0]]
            right += best[y, x] == truth
    counts = confusion(np.where(cells < 0, IGNORE, mask), np.where(cells < 0, 0, best), 4)
    assert right == np.trace(counts) > 0
    # a token kept out of fitting, as it is too mixed, still says its majority here
    strict = np.where(grid.purity(mask, 4) < 0.6, IGNORE, labels)
    assert (strict == IGNORE).sum() > (labels == IGNORE).sum()
    again = perfect_pixels(strict, cells, mask, 4)
    keep = (mask != IGNORE) & (cells >= 0)
    np.testing.assert_array_equal(again[keep], best[keep])


def test_ceiling_of_a_covering_grid_is_the_old_one():
    rng = np.random.default_rng(9)
    grid = grid_of(whole((4, 5), (33, 26)))
    mask = rng.integers(0, 3, (26, 33))
    labels = grid.labels(mask, 3)
    want = ceiling_confusion(labels.reshape(1, 4, 5), mask[None], 3)[0]
    best = perfect_pixels(labels, pixel_cells(grid), mask, 3)
    np.testing.assert_array_equal(confusion(mask, best, 3), want)
