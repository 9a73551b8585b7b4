"""Image tokens and their pixels: the grid against the model itself, labels against hand counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
