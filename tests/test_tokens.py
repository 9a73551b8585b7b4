"""Image tokens and their pixels: the grid against the model itself, labels against hand counts."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.edges import EdgeSet
from interp.errors import EdgeError
from interp.families.geometry import Geometry
from interp.grids import build_grids
from interp.labels import IGNORE
from interp.layout import Lattice, Layout, View
from interp.pixels import class_counts
from interp.tokens import TokenGrid
from tests.conftest import IMAGE_TOKEN, random_inputs


def view(shape, size, *, name="base", slots=None, box=None) -> View:
    """A grid that fills its picture, one vector a cell at all stages."""
    boxes = Geometry.stretched(size, size).boxes(*shape) if box is None else box
    n = len(boxes)
    at = np.stack([np.zeros(n, int), np.arange(n)], axis=1)
    lattice = Lattice(shape, boxes, at, (1, n))
    return View(name, shape, boxes, np.arange(n) if slots is None else slots, lattice, lattice)


def grid_of(shape=(2, 3), size=(6, 4), *, box=None, n_images=1, before=1) -> TokenGrid:
    """`n_images` rows, each with `before` words, one image and one word more."""
    n = shape[0] * shape[1]
    ids = np.zeros((n_images, before + n + 1), dtype=int)
    ids[:, before : before + n] = IMAGE_TOKEN
    layout = Layout(size, n, (view(shape, size, box=box),))
    return build_grids(ids, IMAGE_TOKEN, [layout] * n_images).llm


def two_views() -> TokenGrid:
    """A picture of 8 x 4 pixels as 1 x 2 tokens and then as 2 x 4 whose rows end with a newline,
    and one of 4 x 4 pixels as 2 x 2; two words, then the first; one word, then the second."""
    ids = np.zeros((2, 14), dtype=int)
    ids[0, 2:14] = ids[1, 1:5] = IMAGE_TOKEN
    fine = view((2, 4), (8, 4), name="tiles", slots=np.array([2, 3, 4, 5, 7, 8, 9, 10]))
    first = Layout((8, 4), 12, (view((1, 2), (8, 4)), fine))
    second = Layout((4, 4), 4, (view((2, 2), (4, 4)),))
    return build_grids(ids, IMAGE_TOKEN, [first, second]).llm


@pytest.mark.parametrize("token", [0, 3, 7, 12])
def test_with_attention_off_a_token_depends_on_the_pixels_of_its_box_only(rand, rx, token):
    """The measurement behind the family table. Zeroing every head of the vision tower leaves each
    token a function of its own patch; TransformerLens hooks on the very points do it, and plain
    autograd says which pixels are left."""
    points = [block.self_attn.hook_z for block in rand.module.model.vision_tower.encoder.layers]
    tensors = {k: v.clone() for k, v in rx.tensors.items()}
    pixels = tensors["pixel_values"].requires_grad_(True)
    caught: list[torch.Tensor] = []
    handle = rand.module.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: caught.append(output)
    )
    for point in points:
        point.add_hook(lambda z, hook: z * 0)
    try:
        rand.module(**tensors, use_cache=False)
    finally:
        handle.remove()
        for point in points:
            point.remove_hooks()
    (gradient,) = torch.autograd.grad(caught[0][0, token].square().sum(), pixels)
    y, x = gradient[0].abs().sum(0).nonzero(as_tuple=True)
    left, top, right, bottom = rx.grid.box[token]
    assert (x.min(), y.min(), x.max() + 1, y.max() + 1) == (left, top, right, bottom)


def test_grid_of_the_bundled_model_prints_as_documented(x):
    assert str(x.grid) == "10 x 10 image tokens, positions 5..104, 8 x 8 px each"
    assert (x.grid.n_batch, x.grid.n_pos) == tuple(x.tensors["input_ids"].shape)


def test_batch_of_many_images_prints_short():
    printed = repr(grid_of(n_images=6)).splitlines()
    assert printed[0] == "image 0: 2 x 3 image tokens, positions 1..6, 2 x 2 px each"
    assert printed[-1] == "... and 3 more images"


def test_tokens_of_a_padded_batch_keep_row_and_position(rand):
    x = random_inputs(rand, 2, padding=3)
    grid = x.grid
    assert np.array_equal(grid.is_image, x.tensors["input_ids"].numpy() == IMAGE_TOKEN)
    assert grid.position[grid.of_image(0)].tolist() == list(range(2, 18))
    assert grid.position[grid.of_image(1)].tolist() == list(range(5, 21))
    assert x.is_text.sum(1).tolist() == [8, 5]  # the first row's padding is words
    states = torch.arange(2 * x.n_pos).reshape(2, x.n_pos)
    assert grid.gather(states)[1].tolist() == list(range(x.n_pos + 5, x.n_pos + 21))
    assert grid.of_image(-1).tolist() == grid.of_image(1).tolist()


def test_images_with_different_grids_share_a_batch_but_do_not_stack():
    ids = np.array([[IMAGE_TOKEN] * 6 + [1], [IMAGE_TOKEN] * 4 + [1, 1, 1]])
    layouts = [
        Layout((6, 4), 6, (view((2, 3), (6, 4)),)),
        Layout((4, 4), 4, (view((2, 2), (4, 4)),)),
    ]
    grid = build_grids(ids, IMAGE_TOKEN, layouts).llm
    assert (
        grid.labels([np.zeros((4, 6), int), np.ones((4, 4), int)], 2).tolist() == [0] * 6 + [1] * 4
    )
    assert len(grid.image_block()) == 6 * 6 + 4 * 4
    states = torch.arange(14).reshape(2, 7)
    with pytest.raises(ValueError, match=r"different grids \[\(2, 2\), \(2, 3\)\] do not stack"):
        grid.gather(states)
    assert [part.tolist() for part in grid.split(states)] == [[0, 1, 2, 3, 4, 5], [7, 8, 9, 10]]


def test_state_of_another_stage_is_refused():
    with pytest.raises(ValueError, match=r"shape \[1, 9, 2\]; this grid is of states \[1, 8, "):
        grid_of().gather(torch.zeros(1, 9, 2))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([1], "hold 3 image placeholders, but 1 image.s. give 4 image tokens"),
        ([1, 1], "needs 4 placeholders, and they would lie in rows 0 and 1 of the batch"),
    ],
)
def test_placeholders_that_do_not_fit_the_pictures_are_refused(rows, says):
    ids = np.array([[IMAGE_TOKEN] * 3] * len(rows))
    layouts = [
        Layout((2, 2), 4, (view((2, 2), (2, 2)),)),
        Layout((2, 2), 2, (view((1, 2), (2, 2)),)),
    ]
    with pytest.raises(ValueError, match=says):
        build_grids(ids, IMAGE_TOKEN, layouts[: len(rows)])


# -- views -----------------------------------------------------------------------------------------


def test_views_are_numbered_over_the_batch_and_tokens_through_an_images_views():
    grid = two_views()
    assert grid.view_names == ("base", "tiles", "base")
    assert grid.view_image == (0, 0, 1)
    assert grid.counts == (10, 4)
    assert grid.position[grid.of_view(1)].tolist() == [4, 5, 6, 7, 9, 10, 11, 12]
    assert grid.edges(src=2, dst=9, image=0).table.tolist() == [[0, 12, 4]]
    assert not grid.uniform
    assert repr(grid).splitlines() == [
        "image 0 base: 1 x 2 image tokens, positions 2..3, 4 x 4 px each",
        "image 0 tiles: 2 x 4 image tokens, positions 4..12, 2 x 2 px each",
        "image 1 base: 2 x 2 image tokens, positions 1..4, 2 x 2 px each",
    ]
    with pytest.raises(IndexError, match="view 3 of 3"):
        grid.of_view(3)


def test_newline_tokens_are_placeholders_but_no_image_tokens():
    grid = two_views()
    assert grid.fillers.tolist() == [[0, 8], [0, 13]]
    assert (grid.is_placeholder ^ grid.is_image).nonzero()[1].tolist() == [8, 13]
    assert grid.is_placeholder.sum() == 12 + 4


def test_one_view_of_each_image_is_a_grid_of_its_own():
    grid, fine = two_views(), two_views().select("finest")
    assert fine.shapes == ((2, 4), (2, 2))
    assert fine.view.tolist() == [0] * 8 + [1] * 4
    assert np.array_equal(fine.is_placeholder, grid.is_placeholder)
    assert fine.edges(src=0, dst=7, image=0).table.tolist() == [[0, 12, 4]]
    states = torch.arange(28).reshape(2, 14)
    assert fine.split(states)[1].tolist() == [15, 16, 17, 18]
    with pytest.raises(ValueError, match="image 1 has no view 'tiles', it has base; select"):
        grid.select("tiles")
    assert grid.select("base").box.tolist()[:2] == [[0, 0, 4, 4], [4, 0, 8, 4]]


# -- pixels ----------------------------------------------------------------------------------------


def test_scores_go_back_to_the_pixels_of_their_tokens():
    grid = grid_of()
    assert (
        grid.to_pixels(np.arange(6)).tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    )
    assert np.array_equal(grid.labels(grid.to_pixels(np.arange(6)), 6), np.arange(6))
    logits = torch.randn(6, 5, dtype=torch.bfloat16)
    painted = grid.to_pixels(logits)
    assert painted.shape == (4, 6, 5)
    assert np.array_equal(painted[3, 5], logits[5].float().numpy())


@pytest.mark.parametrize("shape", [(2, 3), (4, 1), (1, 6)])
def test_bilinear_is_what_torch_does_to_a_map_of_logits(shape):
    size = (36, 20)
    scores = torch.randn(shape[0] * shape[1], 3, generator=torch.Generator().manual_seed(0))
    as_map = scores.reshape(1, *shape, 3).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(as_map, size[::-1], mode="bilinear")
    painted = grid_of(shape, size).to_pixels(scores, how="bilinear")
    assert painted == pytest.approx(expected[0].permute(1, 2, 0).numpy(), abs=1e-5)


def test_pixels_that_no_token_sees_are_told_apart():
    middle = Geometry((1.0, 1.0), (1.0, 0.0), (4, 4)).boxes(2, 2)  # one column cut off each side
    grid = grid_of((2, 2), (6, 4), box=middle)
    assert grid.to_pixels(np.arange(4))[0].tolist() == [IGNORE, 0, 0, 1, 1, IGNORE]
    for how in ("nearest", "bilinear"):
        painted = grid.to_pixels(np.arange(4.0), how=how)
        assert np.isnan(painted[:, [0, 5]]).all()
        assert not np.isnan(painted[:, 1:5]).any()
    assert grid.to_pixels(np.arange(4), fill=-1)[3].tolist() == [-1, 2, 2, 3, 3, -1]


def test_every_pixel_of_an_enlarged_picture_gets_the_token_around_its_centre():
    grid = grid_of((8, 8), (3, 3))  # cells smaller than a pixel
    painted = grid.to_pixels(np.arange(64))
    box = grid.box[painted.ravel()]
    y, x = np.indices((3, 3)).reshape(2, -1) + 0.5
    assert (box[:, 0] <= x).all()
    assert (x < box[:, 2]).all()
    assert (box[:, 1] <= y).all()
    assert (y < box[:, 3]).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: two_views().to_pixels(np.zeros(10)), r'base and tiles; choose.*select\("finest"'),
        (lambda: grid_of().to_pixels(np.zeros(5)), "5 scores for the 6 tokens of image 0"),
        (lambda: grid_of().to_pixels(np.arange(6), how="bilinear"), "'bilinear' for int64"),
        (lambda: grid_of().to_pixels(np.zeros(6), how="cubic"), "how='cubic' for float64"),
    ],
)
def test_scores_that_do_not_fit_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# -- labels ----------------------------------------------------------------------------------------

MASK = np.array(
    [
        [0, 0, 0, 1, IGNORE, IGNORE],
        [0, 0, 2, 1, IGNORE, IGNORE],
        [1, 1, 1, 1, IGNORE, 2],
        [0, 1, 0, 0, IGNORE, IGNORE],
    ]
)


def test_labels_take_the_majority_and_ignored_pixels_count_for_nothing():
    grid = grid_of()
    # one labelled pixel is enough, none gives IGNORE, a tie goes to the lower class
    assert grid.labels(MASK, 3).tolist() == [0, 1, IGNORE, 1, 0, 2]
    assert grid.purity(MASK, 3).tolist() == [1, 0.5, 0, 0.75, 0.5, 1]
    assert grid.fractions(MASK, 3)[1].tolist() == [0.25, 0.5, 0.25]
    assert grid.labels([MASK], 3).dtype == np.int64
    # mixed cells can be left out: here all under three quarters of one class
    assert grid.labels(MASK, 3, pure=0.75).tolist() == [0, IGNORE, IGNORE, 1, IGNORE, 2]


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
@pytest.mark.parametrize("shape", [(20, 30), (7, 11), (20, 90)])
def test_counts_are_those_of_a_loop_over_tokens(shape, dtype):
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 151, (48, 64)).astype(dtype)
    mask[mask == 150] = IGNORE
    geometry = Geometry((0.9, 1.1), (-7.0, 5.0), (64, 48))  # in part outside the picture
    boxes = geometry.boxes(*shape)
    counts = class_counts(boxes, mask, 150)
    grid = grid_of(shape, (64, 48), box=boxes)
    for token in range(len(boxes)):
        pixels = grid.pixels(token, mask)
        naive = [int((pixels == c).sum()) for c in range(150)]
        assert counts[token].tolist() == naive
    assert counts.sum() > 0


def test_class_numbers_may_reach_past_the_label_that_is_none():
    mask = np.array([[300, IGNORE], [299, 300]])
    assert class_counts(np.array([[0, 0, 2, 2]]), mask, 301)[0, 299:].tolist() == [1, 2]
    with pytest.raises(ValueError, match="class -1, but there are only 301"):
        class_counts(np.array([[0, 0, 2, 2]]), mask * 0 - 1, 301)


@pytest.mark.parametrize(
    ("edge", "first", "second"),
    [(1.6, [0, 1, 0, 1], [2, 2]), (1.4, [0, 0], [1, 2, 1, 2]), (1.5, [0, 0], [1, 2, 1, 2])],
)
def test_pixel_belongs_to_the_token_that_holds_its_centre(edge, first, second):
    boxes = np.array([[0, 0, edge, 2], [edge, 0, 3, 2]])
    grid = grid_of((1, 2), (3, 2), box=boxes)
    mask = np.array([[0, 1, 2], [0, 1, 2]])
    assert [grid.pixels(t, mask).tolist() for t in (0, 1)] == [first, second]
    counts = [np.bincount(pixels, minlength=3).tolist() for pixels in (first, second)]
    assert class_counts(boxes, mask, 3).tolist() == counts
    assert grid.to_pixels(np.array([0, 1]))[0].tolist() == [0] * (len(first) // 2) + [1] * (
        len(second) // 2
    )


def test_box_smaller_than_a_pixel_takes_the_pixel_around_it_and_one_outside_takes_none():
    boxes = np.array([[0.1, 0.1, 0.2, 0.2], [1.6, 0, 1.8, 1], [-5, 0, -2, 2], [3, 0, 9, 2]])
    grid = grid_of((1, 4), (3, 2), box=boxes)
    mask = np.array([[4, 5, 6], [7, 8, 9]])
    assert [grid.pixels(t, mask).tolist() for t in range(4)] == [[4], [5], [], []]


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        (np.zeros((6, 4), int), "a mask of 4 x 6 pixels for a picture of 6 x 4"),
        ([MASK, MASK], "2 masks for 1 images"),
        (MASK + 1, "holds class 3, but there are only 3 classes"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks, says):
    masks = np.where(np.asarray(masks) == IGNORE + 1, IGNORE, masks)
    with pytest.raises(ValueError, match=says):
        grid_of().labels(list(masks) if masks.ndim == 3 else masks, 3)


# -- edges -----------------------------------------------------------------------------------------


def test_edges_run_from_key_to_query_in_every_image():
    grid = grid_of(n_images=2, before=3)
    edges = grid.edges(src=[0, 1], dst=5)
    assert edges.table.tolist() == [[0, 8, 3], [0, 8, 4], [1, 8, 3], [1, 8, 4]]
    assert grid.edges(src=[0, 1], dst=5, image=1).table.tolist() == [[1, 8, 3], [1, 8, 4]]
    assert grid.edges(src=None, dst=[0]).src.tolist() == [*range(3, 9)] * 2
    assert len(grid.edges(src=[], dst=[1])) == 0
    assert grid.edges(np.array([True] + [False] * 5), 1) == grid.edges(0, 1)


def test_edges_where_reads_a_mask_over_tokens_as_dst_by_src():
    grid = grid_of(n_images=2, before=3)
    mask = np.zeros((2, 6, 6), bool)
    mask[1, 4, 2] = True
    assert grid.edges_where(mask) == grid.edges(src=2, dst=4, image=1)
    assert grid.edges_where(torch.ones(2, 6, 6, dtype=torch.bool)) == grid.image_block()


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (6, r"image 0 has no token 6: its 6 tokens are numbered 0\.\.5"),
        ([0, -1], "image 0 has no token -1"),
        ([0.5], r"whole numbers 0\.\.5, or 6 bools, not float64 \[1\]"),
        (np.array([True, False]), r"or 6 bools, not bool \[2\]"),
        ([[0, 1]], r"not int64 \[1, 2\]"),
    ],
)
def test_token_that_does_not_exist_is_refused(tokens, says):
    with pytest.raises(EdgeError, match=says):
        grid_of().edges(src=tokens, dst=0)


# -- which tokens ----------------------------------------------------------------------------------


def pictures() -> TokenGrid:
    """One row: two words, a picture of 3 x 4 tokens of 10 x 20 px, a word, one of 2 x 2 of 5 x 5,
    three positions more."""
    ids = np.zeros((1, 22), dtype=int)
    ids[0, 2:14] = ids[0, 15:19] = IMAGE_TOKEN
    first = Layout((40, 60), 12, (view((3, 4), (40, 60)),))
    second = Layout((10, 10), 4, (view((2, 2), (10, 10)),))
    return build_grids(ids, IMAGE_TOKEN, [first, second]).llm


def test_tokens_by_cell_stand_in_that_row_and_column():
    grid = pictures()
    corner, cells = grid.at((0, 1)), grid.at([(2, 3), (0, 0)], image=0)
    assert grid.position[corner].tolist() == [3, 16]
    assert grid.cell[cells].tolist() == [[0, 0], [2, 3]]
    assert grid.image[cells].tolist() == [0, 0]
    tiled = two_views()
    assert tiled.position[tiled.at((1, 2), view="tiles", image=0)].tolist() == [11]
    assert tiled.select("finest").at((1, 1)).sum() == 2


@given(st.tuples(*[st.floats(-5, 45)] * 2), st.tuples(*[st.floats(1, 50)] * 2), st.integers(0, 1))
@settings(max_examples=60)
def test_tokens_inside_a_box_are_those_of_its_pixels(corner, size, image):
    grid = pictures()
    box = (*corner, corner[0] + size[0], corner[1] + size[1])
    for how in ("centre", "whole", "any"):
        naive = []
        for token in range(len(grid)):
            left, top, right, bottom = grid.box[token]
            inside = {
                "centre": box[0] <= (left + right) / 2 < box[2]
                and box[1] <= (top + bottom) / 2 < box[3],
                "whole": box[0] <= left and right <= box[2] and box[1] <= top and bottom <= box[3],
                "any": max(box[0], left) < min(box[2], right)
                and max(box[1], top) < min(box[3], bottom),
            }[how]
            naive.append(inside and grid.image[token] == image)
        if any(naive):
            assert grid.inside(box, how=how, image=image).tolist() == naive
        else:
            with pytest.raises(EdgeError, match=f"no token of image {image}"):
                grid.inside(box, how=how, image=image)


def test_tokens_of_a_class_are_those_that_labels_gives_it():
    grid = grid_of()
    for label in (0, 1, 2):
        assert grid.of_class(MASK, label).tolist() == (grid.labels(MASK, 3) == label).tolist()
    assert grid.of_class(MASK, 1, pure=0.75).tolist() == [False] * 3 + [True] + [False] * 2
    # segments: numbers as they come, on both sides of the label that is none
    segments = np.where(MASK == IGNORE, IGNORE, MASK * 200 + 100)
    for label in (0, 1, 2):
        assert np.array_equal(
            grid.of_class(segments, label * 200 + 100), grid.of_class(MASK, label)
        )
    many = np.arange(400).reshape(20, 20)  # more segments than the label that is none
    many[many == IGNORE] = 1000
    many[0, 3] = IGNORE
    cells = grid_of((20, 20), (20, 20))
    for token in (0, 254, 256, 257, 399):
        assert np.flatnonzero(cells.of_class(many, many.flat[token])).tolist() == [token]
    two = grid_of(n_images=2)
    assert two.of_class([MASK, MASK * 0 + 2], 2).tolist() == [False] * 5 + [True] * 7


def test_regions_are_connected_by_sides_within_a_view():
    grid = grid_of((4, 4), (4, 4), n_images=2)
    labels = np.array([0, 0, 1, 0, 1, 0, 1, 0, 1, 1, 0, 0, IGNORE, 0, 0, 1])
    regions = grid.regions(np.tile(labels, 2))
    naive = naive_regions(labels.reshape(4, 4))
    first, second = regions[:16], regions[16:]
    for part in (first, second):
        same = part[:, None] == part[None]
        assert np.array_equal(same, naive[:, None] == naive[None])
        assert part[12] == -1
    assert not set(first) & set(second) - {-1}
    assert sorted(set(regions) - {-1}) == list(range(regions.max() + 1))


def naive_regions(labels: np.ndarray) -> np.ndarray:
    """By filling, one cell after the other."""
    out = np.full(labels.shape, -1)
    for start in np.ndindex(labels.shape):
        todo = [start] if out[start] < 0 and labels[start] != IGNORE else []
        while todo:
            y, x = todo.pop()
            out[y, x] = start[0] * 4 + start[1]
            for at in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if min(at) >= 0 and max(at) < 4 and out[at] < 0 and labels[at] == labels[start]:
                    todo.append(at)
    return out.ravel()


def test_edges_take_tokens_of_the_whole_batch_image_by_image():
    grid = pictures()
    tokens = grid.at((0, 1)) | grid.inside((0, 0, 6, 6), image=1)
    edges = grid.edges(src=tokens, dst=torch.tensor(grid.at((1, 1))))
    assert list(edges) == [(0, 3, 7), (0, 15, 18), (0, 16, 18)]
    assert list(grid.edges(src=tokens, dst=3, image=1)) == [(0, 15, 18), (0, 16, 18)]
    assert grid.mark(tokens)[0].nonzero()[0].tolist() == [3, 15, 16]
    only_second = grid.edges(src=grid.image == 1, dst=None)
    assert only_second == grid.image_block(1)


# -- edges by where tokens lie ---------------------------------------------------------------------


@pytest.mark.parametrize("grid", [two_views(), pictures()], ids=["views", "pictures"])
@pytest.mark.parametrize("radius", [1, 1.5, 2, 3, 99])
@pytest.mark.parametrize("metric", ["chebyshev", "euclid"])
def test_neighbours_are_the_tokens_of_a_view_within_a_radius(grid, radius, metric):
    naive = set()
    for a, b in itertools.permutations(range(len(grid)), 2):
        dy, dx = abs(grid.cell[a] - grid.cell[b])
        away = max(dy, dx) if metric == "chebyshev" else (dy**2 + dx**2) ** 0.5
        if grid.view[a] == grid.view[b] and away <= radius:
            naive.add((grid.row[a], grid.position[a], grid.position[b]))
    found = grid.neighbours(radius, metric=metric)
    assert set(found) == naive
    own = grid.row[grid.of_image(1)[0]], set(grid.position[grid.of_image(1)])
    in_second = {e for e in naive if e[0] == own[0] and {e[1], e[2]} <= own[1]}
    assert set(grid.neighbours(radius, metric=metric, image=1)) == in_second
    # and the distance of an edge is what it was chosen by
    assert (grid.distance(found, metric=metric) <= radius).all()
    others = grid.distance(grid.image_block() - found, metric=metric)
    assert not (others[others > 0] <= radius).any()


@pytest.mark.parametrize("rows", [0, 1, 2, 9])
def test_look_ahead_opens_what_is_closed_as_far_as_so_many_rows_below(rows):
    for grid in (two_views(), pictures(), tiles_in_turn()):
        naive = {
            (grid.row[a], grid.position[a], grid.position[b])
            for a, b in itertools.permutations(range(len(grid)), 2)
            if grid.view[a] == grid.view[b]
            and grid.position[a] > grid.position[b]
            and grid.cell[a][0] - grid.cell[b][0] <= rows
        }
        ahead = grid.look_ahead(rows)
        assert set(ahead) == naive
        assert not len(ahead.causal())
        if rows == 9 and len(grid.shapes) == grid.n_images:
            assert ahead | grid.image_block().causal() == grid.image_block()
    assert len(two_views().look_ahead(rows, image=1)) == [2, 6, 6, 6][min(rows, 3)]


def tiles_in_turn() -> TokenGrid:
    """One row, a picture of 2 x 4 tokens, of which the left half comes first, then the right."""
    ids = np.full((1, 8), IMAGE_TOKEN)
    slots = np.array([0, 1, 4, 5, 2, 3, 6, 7])
    return build_grids(ids, IMAGE_TOKEN, [Layout((8, 4), 8, (view((2, 4), (8, 4), slots=slots),))])[
        0
    ]


def test_distance_of_edges_that_join_no_two_cells_of_a_view_is_no_number():
    grid = two_views()
    edges = EdgeSet.of([(0, 4, 10), (0, 2, 4), (0, 0, 4), (0, 4, 8), (1, 1, 4)], 2, 14)
    found = dict(zip(edges, grid.distance(edges), strict=True))
    assert found[0, 4, 10] == pytest.approx(2**0.5)
    assert found[1, 1, 4] == pytest.approx(2**0.5)
    assert np.isnan([found[0, 2, 4], found[0, 0, 4], found[0, 4, 8]]).all()


def test_control_of_as_distant_edges_keeps_every_querys_distances():
    """On 12 x 12 cells, what is three cells away has other cells three cells away to stand in."""
    grid = grid_of((12, 12), (48, 48))
    ring = (grid.neighbours(4) - grid.neighbours(3)).causal()
    edges = EdgeSet(ring.table[::3], 1, grid.n_pos)
    long = functools.partial(grid.distance, metric="chebyshev")
    control = edges.random_like(match="distance", distance=long, tolerance=0, allow_fewer=True)
    assert len(control) > 0.9 * len(edges)
    assert (grid.distance(control, metric="chebyshev") == 4).all()
    assert not len(control & edges)
    chosen = grid.is_image[control.row, control.src]
    assert chosen.all()  # words have no distance in cells


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda g: g.at((3, 0)), r"no cell \(3, 0\) in image 0, which has 3 x 4"),
        (lambda g: g.at((2, 0)), r"no cell \(2, 0\) in image 1, which has 2 x 2"),
        (lambda g: g.at((0, -1)), r"no cell \(0, -1\)"),
        (lambda g: g.at((0.5, 1)), r"\(row, column\), one or several, not float64"),
        (lambda g: g.at([0, 1, 2]), r"not int64 \[3\]"),
        (lambda g: two_views().at((0, 0)), "has base and tiles, .*view='tiles' would do, not None"),
        (lambda g: two_views().at((0, 0), view="tiles"), "image 1 has base, .*not 'tiles'"),
        (lambda g: g.inside((0, 0, 0.5, 0.5)), r"no token of image 0 .*40 x 60 pixels"),
        (lambda g: g.inside((5, 0, 5, 9)), r"left, top, right, bottom"),
        (lambda g: g.inside((5, 0, 9)), r"left, top, right, bottom"),
        (lambda g: g.inside((0, 0, 40, 60), how="center"), "how='center'; there are 'centre'"),
        (lambda g: g.neighbours(0), "radius=0 reaches no neighbour"),
        (lambda g: g.neighbours(2, metric="l2"), "metric='l2'; there are 'chebyshev' and"),
        (lambda g: g.look_ahead(-1), "rows=-1; 0 is the rest"),
        (lambda g: g.distance(grid_of().edges(0, 1)), "1 x 8 positions. for a grid in 1 x 22"),
        (lambda g: g.mark(np.arange(3)), r"16 bools, not int64 \[3\]"),
        (lambda g: g.edges(src=np.ones(12, bool), dst=0), r"4 bools, not bool \[12\]"),
    ],
)
def test_places_that_a_grid_does_not_have_are_refused(call, says):
    with pytest.raises(EdgeError, match=says):
        call(pictures())


def test_class_or_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="label 7 is in no mask; they hold 0, 1, 2"):
        grid_of().of_class(MASK, 7)
    with pytest.raises(ValueError, match="label 255 is in no mask"):
        grid_of().of_class(MASK, IGNORE)
    with pytest.raises(ValueError, match=r"\[5\] labels for 6 tokens"):
        grid_of().regions(np.zeros(5))
