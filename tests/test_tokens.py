"""Image tokens and their pixels: the grid against the model itself, labels against hand counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp.errors import EdgeError
from interp.families.geometry import Geometry
from interp.labels import IGNORE
from interp.tokens import TokenGrid, raster
from tests.conftest import IMAGE_TOKEN, random_inputs


def grid_of(shape=(2, 3), size=(6, 4), *, box=None, n_images=1, before=1) -> TokenGrid:
    """`n_images` rows, each with `before` words, one image and one word more."""
    n = shape[0] * shape[1]
    ids = np.zeros((n_images, before + n + 1), dtype=int)
    ids[:, before : before + n] = IMAGE_TOKEN
    boxes = Geometry((1.0, 1.0), (0.0, 0.0), size).boxes(*shape) if box is None else box
    return raster(
        ids,
        IMAGE_TOKEN,
        shapes=[shape] * n_images,
        boxes=[boxes] * n_images,
        sizes=[size] * n_images,
    )


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
    shapes, sizes = [(2, 3), (2, 2)], [(6, 4), (4, 4)]
    boxes = [Geometry((1, 1), (0, 0), size).boxes(*s) for s, size in zip(shapes, sizes)]
    grid = raster(ids, IMAGE_TOKEN, shapes=shapes, boxes=boxes, sizes=sizes)
    assert (
        grid.labels([np.zeros((4, 6), int), np.ones((4, 4), int)], 2).tolist() == [0] * 6 + [1] * 4
    )
    assert len(grid.image_block()) == 6 * 6 + 4 * 4
    with pytest.raises(ValueError, match=r"different grids \[\(2, 2\), \(2, 3\)\] do not stack"):
        grid.gather(torch.zeros(2, 7, 3))
    with pytest.raises(EdgeError, match=r"of \[6, 4\] tokens; \[n_images, dst, src\] would do"):
        grid.edges_where(np.ones((2, 6, 6), bool))
    with pytest.raises(IndexError, match="image 2 of a batch of 2; count from 0 to 1"):
        grid.of_image(2)


def test_placeholders_must_match_the_image_tokens():
    with pytest.raises(ValueError, match=r"hold 3 image placeholders, but 1 image\(s\) give 4"):
        raster(
            np.array([[IMAGE_TOKEN] * 3]),
            IMAGE_TOKEN,
            shapes=[(2, 2)],
            boxes=[np.zeros((4, 4))],
            sizes=[(2, 2)],
        )


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


def test_pixel_belongs_to_the_token_that_holds_its_centre():
    boxes = np.array([[0, 0, 1.6, 2], [1.6, 0, 3, 2]])
    grid = grid_of((1, 2), (3, 2), box=boxes)
    mask = np.array([[0, 1, 2], [0, 1, 2]])
    assert [grid.pixels(t, mask).tolist() for t in (0, 1)] == [[0, 1, 0, 1], [2, 2]]


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
