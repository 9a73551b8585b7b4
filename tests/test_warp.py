"""`grid.warp`: masks at points of each cell, against loops, Pillow and cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from interp.labels import IGNORE
from interp.layout import raster_boxes
from interp.pixels import nearest
from interp.tokens import TokenGrid


def grid_of(*boxes: np.ndarray, sizes) -> TokenGrid:
    """A row of cells in each picture, all of one prompt."""
    counts = [len(box) for box in boxes]
    n = sum(counts)
    return TokenGrid(
        row=np.zeros(n, int),
        position=np.arange(n),
        image=np.repeat(np.arange(len(boxes)), counts),
        view=np.repeat(np.arange(len(boxes)), counts),
        cell=np.stack([np.zeros(n, int), np.concatenate([np.arange(k) for k in counts])], 1),
        box=np.concatenate(boxes).astype(float),
        fillers=np.zeros((0, 2), int),
        shapes=tuple((1, k) for k in counts),
        view_image=tuple(range(len(boxes))),
        view_names=("base",) * len(boxes),
        sizes=tuple(sizes),
        n_batch=1,
        n_pos=n,
    )


def even(n: int, length: float, start: float = 0.0) -> np.ndarray:
    """`[n, 2]` start and end of n equal parts of an edge."""
    at = start + np.linspace(0, length, n + 1)
    return np.stack([at[:-1], at[1:]], 1)


SMALL = np.array([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("box", "n", "expected"),
    [
        # each point in a pixel of its own, in rows from the top
        ((0, 0, 2, 2), 2, [[1, 2], [4, 5]]),
        # enlarged: four points a pixel
        ((1, 0, 3, 2), 4, [[2, 2, 3, 3]] * 2 + [[5, 5, 6, 6]] * 2),
        # the centre alone: of 3 x 2 pixels, (1.5, 1), on the border of two rows: the lower
        ((0, 0, 3, 2), 1, [[5]]),
        # points at 0.5 and 1.5 across, half of them above the picture
        ((0, -1, 2, 1), 2, [[IGNORE, IGNORE], [1, 2]]),
        # to the right, below, and to the left
        ((2, 1, 4, 3), 2, [[6, IGNORE], [IGNORE, IGNORE]]),
        ((-1, 0, 1, 2), 2, [[IGNORE, 1], [IGNORE, 4]]),
        ((7, 7, 9, 9), 2, [[IGNORE] * 2] * 2),
    ],
)
def test_worked_out_by_hand(box, n, expected):
    assert nearest(np.array([box]), SMALL, n).tolist() == [expected]


@given(
    mask=arrays(np.int64, (5, 7), elements=st.integers(0, 300)),
    box=st.tuples(*[st.floats(-9, 12)] * 2, *[st.floats(0.01, 20)] * 2),
    n=st.integers(1, 6),
)
def test_equal_to_a_loop_over_points(mask, box, n):
    left, top, width, height = box
    found = nearest(np.array([[left, top, left + width, top + height]]), mask, n)
    assert (found.shape, found.dtype) == ((1, n, n), np.int64)
    for row in range(n):
        for column in range(n):
            x, y = left + (column + 0.5) / n * width, top + (row + 0.5) / n * height
            # the last digits decide on a border: either side will do
            near = {
                int(mask[int(b), int(a)]) if 0 <= a < 7 and 0 <= b < 5 else IGNORE
                for a in (x - 1e-5, x + 1e-5)
                for b in (y - 1e-5, y + 1e-5)
            }
            assert found[0, row, column] in near


@pytest.mark.parametrize("size", [(64, 48), (101, 67), (13, 21), (300, 7)])
@pytest.mark.parametrize("model", [(32, 24), (40, 56), (96, 96)])
def test_cells_put_together_are_pillows_nearest_resizing(size, model):
    """Of a picture that is stretched over the model's input, cells of 8 x 8 model pixels."""
    mask = np.random.default_rng(0).integers(0, 200, size[::-1])
    cols, rows = model[0] // 8, model[1] // 8
    boxes = raster_boxes(even(cols, size[0]), even(rows, size[1]))
    found = grid_of(boxes, sizes=[size]).warp(mask, 8)
    whole = found.reshape(rows, cols, 8, 8).swapaxes(1, 2).reshape(model[::-1])
    expected = Image.fromarray(mask.astype(np.uint8)).resize(model, Image.Resampling.NEAREST)
    # where a point falls on the border of two pixels, the last digit of Pillow's sum decides
    column, row = (
        (2 * np.arange(n) + 1) * length % (2 * n) > 0 for n, length in zip(model, size, strict=True)
    )
    clear = row[:, None] & column
    assert np.array_equal(whole[clear], np.asarray(expected)[clear])
    assert clear.any() or size == (64, 48)  # halved: every point is on a border


def test_point_on_a_border_does_not_depend_on_the_last_digit():
    mask = np.arange(12).reshape(3, 4)
    box = np.array([[0.0, 0.0, 4.0, 2.0]])  # points at 1 and 3 across, 0.5 and 1.5 down
    assert nearest(box, mask, 2).tolist() == [[[1, 3], [5, 7]]]
    for digit in (-1e-12, 1e-12):
        assert np.array_equal(nearest(box + digit, mask, 2), nearest(box, mask, 2))


def test_each_token_gets_the_mask_of_its_own_picture():
    wide, tall = np.full((2, 8), 3), np.full((9, 3), 4)
    tall[:, 1] = IGNORE
    grid = grid_of(
        raster_boxes(even(2, 8), even(1, 2)),
        raster_boxes(even(3, 3), even(1, 9)),
        sizes=[(8, 2), (3, 9)],
    )
    found = grid.warp([wide, tall], 5)
    assert found.shape == (5, 5, 5)
    assert [np.unique(one).tolist() for one in found] == [[3], [3], [4], [IGNORE], [4]]
    view = grid.select("base").warp((wide, tall), 1)
    assert view.ravel().tolist() == [3, 3, 4, IGNORE, 4]


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16])
def test_narrow_masks_become_wide(kind):
    found = nearest(np.array([[-1, 0, 1, 1]]), np.array([[254]], dtype=kind), 2)
    assert found.dtype == np.int64
    assert found[0, 0].tolist() == [IGNORE, 254]


def test_labels_and_warp_agree_on_pure_cells_and_on_most_others():
    """Regions of the size that they have in photographs, 24 x 24 tokens of 14 x 14."""
    rng = np.random.default_rng(0)
    seeds, kinds = rng.random((40, 2)) * [640, 480], rng.integers(0, 9, 40)
    x, y = np.meshgrid(np.arange(640), np.arange(480))
    away = [(x - a) ** 2 + (y - b) ** 2 for a, b in seeds]
    mask = kinds[np.argmin(away, axis=0)]
    # resized to 448 x 336 and cropped: 80 pixels of the picture are cut off on both sides
    boxes = raster_boxes(even(24, 480, 80), even(24, 480))
    grid = grid_of(boxes, sizes=[(640, 480)])
    warped = grid.warp(mask, 14).reshape(576, -1)
    votes = np.stack([(warped == label).sum(1) for label in range(9)], 1).argmax(1)
    labels, purity = grid.labels(mask, 9), grid.purity(mask, 9)
    assert np.array_equal(votes[purity > 0.6], labels[purity > 0.6])
    assert 0.3 < (purity < 1).mean() < 0.7
    assert (votes == labels).mean() > 0.98
    centre = grid.warp(mask, 1).ravel()
    assert np.array_equal(centre[purity == 1], labels[purity == 1])
    assert 0.85 < (centre == labels).mean() < (votes == labels).mean()


def test_what_does_not_fit_is_refused():
    grid = grid_of(np.array([[0, 0, 3, 2]]), sizes=[(3, 2)])
    with pytest.raises(ValueError, match="px=0 parts of a cell; its model pixels"):
        grid.warp(SMALL, 0)
    with pytest.raises(ValueError, match="a mask of 2 x 3 pixels for a picture of 3 x 2"):
        grid.warp(SMALL.T, 2)
    with pytest.raises(ValueError, match="2 masks for 1 images"):
        grid.warp([SMALL, SMALL], 2)
