"""Masks through every family's exact geometry, held to what its own processor makes of a picture.

A mask is drawn: each class has a corner of the colour cube, `IGNORE` is black as padding is. The
family's processor (transformers' own) makes model pixels of the drawing, and their colours say
which class the model sees there. That has to be what `warp` says of the mask:

* to the last pixel, where the processor takes the nearest pixel, even of noise;
* but for the pixels at a border of two classes, where it interpolates as it does by default.

Which model pixels are a token's is measured by derivatives (`test_layouts`); nothing in how the
colours are read uses boxes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from interp.inputs import prepare
from interp.labels import IGNORE
from tests.families.test_layouts import SETTINGS, by_channel, measure
from tests.zoo import ZOO

N_CLASSES = 7
COLOURS = np.array([[n >> 2 & 1, n >> 1 & 1, n & 1] for n in range(8)], np.uint8) * 255
#: the mean is dark, so that what is padded with it is black as well
NORMALISE = {"do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.4, 0.3]}
#: twice resized, and the second time from whole pixels
TWICE = ("idefics3", "smolvlm")


def draw(mask: np.ndarray) -> Image.Image:
    """Class n in colour n + 1, what is ignored in black."""
    return Image.fromarray(COLOURS[np.where(mask == IGNORE, 0, mask + 1)])


def classes(pixels: np.ndarray) -> np.ndarray:
    """The class of each `[..., 3]` colour from 0 to 1: of the nearest corner of the cube."""
    number = (pixels > 0.5) @ np.array([4, 2, 1]) - 1
    return np.where(number < 0, IGNORE, number)


measured = cache(measure)


def ordered(pictures, side="right"):
    """Sizes of the pictures of each row, so that `measured` can remember them."""
    return tuple(map(tuple, pictures)), side


def seen(m, masks, **settings) -> dict[str, np.ndarray]:
    """The class of each model pixel of each token, `[n_tokens, px, px]`, by stage.

    Args:
        m: from `measure`, of pictures of the masks' sizes.
        masks: one a picture.
        settings: of the image processor.
    """
    drawn = iter(map(draw, masks))
    per_row = np.bincount([m.x.grid.row[m.x.grid.of_image(i)[0]] for i in range(len(masks))])
    rows = [[next(drawn) for _ in range(n)] for n in per_row]
    texts = ["what is in the picture ?"] * len(rows)
    x = prepare(m.family, m.module.config, m.processor, rows, texts, **NORMALISE, **settings)
    colours = by_channel(x.tensors["pixel_values"].numpy()).swapaxes(1, 2)  # [rows, pixels, 3]
    colours = colours * NORMALISE["image_std"] + NORMALISE["image_mean"]
    found = {}
    for stage, grid in m.grids.items():
        ids = grid.row * m.caught[stage].shape[1] + grid.position
        if (m.owner[stage] == -2).any():  # tokens that are mixed from several pieces
            continue
        found[stage] = classes(np.stack([piece(m, colours, m.owner[stage] == i) for i in ids]))
    return found


def piece(m, colours: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """`[px, px, 3]` of the model pixels that are one token's, where `mine` `[rows, pixels]`."""
    if m.x.tensors["pixel_values"].ndim > 2:  # one square of the tower's picture, in raster order
        side = int(mine.sum() ** 0.5)
        return colours[mine].reshape(side, side, 3)
    # a row of pixels is a patch twice (two frames); patches of a token come one after the other
    rows = np.flatnonzero(mine.any(1))
    n, px = int(len(rows) ** 0.5), int((colours.shape[1] / 2) ** 0.5)
    patches = colours[rows].reshape(n, n, 2, px, px, 3)[:, :, 0]
    return patches.swapaxes(1, 2).reshape(n * px, n * px, 3)


def nearest_errors(grid, masks, found: np.ndarray) -> int:
    """Model pixels whose class is not what the grid says, where nothing was interpolated.

    A model pixel whose centre falls on the border of two of the picture's may be of either: Pillow
    decides by the last digit of a running sum.
    """
    right = np.zeros(found.shape, bool)
    for dx, dy in product((-1e-5, 1e-5), repeat=2):
        moved = replace(grid, box=grid.box + np.array([dx, dy, dx, dy]))
        right |= found == moved.warp(masks, found.shape[1])
    return int((~right).sum())


def canvas(grid, view: int, values: np.ndarray) -> np.ndarray:
    """`[n_tokens, px, px]` put together to one view, `[rows * px, columns * px]`."""
    rows, cols = grid.shapes[view]
    px = values.shape[1]
    one = values[grid.of_view(view)].reshape(rows, cols, px, px)
    return one.swapaxes(1, 2).reshape(rows * px, cols * px)


def flat(image: np.ndarray) -> np.ndarray:
    """Where a pixel and the eight around it are of one class."""
    return ndimage.maximum_filter(image, 3) == ndimage.minimum_filter(image, 3)


def noise(size, seed=0) -> np.ndarray:
    """A mask without two neighbours that could be taken for each other, a frame of it ignored."""
    rng = np.random.default_rng(seed)
    mask = rng.integers(-1, N_CLASSES, size[::-1])
    mask[mask < 0] = IGNORE
    mask[0, : size[0] // 2] = mask[: size[1] // 2, -1] = IGNORE
    return mask


def regions(size) -> np.ndarray:
    """Seven regions: four corners, a band at the top, an off-centre rectangle, and the rest."""
    width, height = size
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    mask = np.full((height, width), 4)
    mask[y < 0.3] = 5
    mask[(x > 0.4) & (x < 0.75) & (y > 0.35) & (y < 0.85)] = 6
    for corner, (left, top) in enumerate(product((True, False), repeat=2)):
        across = x < 0.27 if left else x > 0.8
        mask[across & (y < 0.3 if top else y > 0.73)] = corner
    return mask


def border_errors(grid, masks, found: np.ndarray) -> tuple[int, float]:
    """Model pixels of another class than the grid says: how many where the eight around are of the
    same class, and which share of the others, where colours are mixed."""
    expected = grid.warp(masks, found.shape[1])
    inside = wrong_inside = wrong = 0
    for view in range(len(grid.shapes)):
        told, shown = (canvas(grid, view, values) for values in (expected, found))
        same = flat(told)
        inside += same.sum()
        wrong += (told != shown).sum()
        wrong_inside += (told != shown)[same].sum()
    assert inside > found.size / 2  # or there would be nothing to be wrong
    return int(wrong_inside), (wrong - wrong_inside) / (found.size - inside)


def majority(found: np.ndarray) -> np.ndarray:
    """`[n_tokens]`: the class of most model pixels of a token, of those that have one."""
    flattened = found.reshape(len(found), -1)
    counts = np.stack([(flattened == label).sum(1) for label in range(N_CLASSES)], axis=1)
    return np.where(counts.any(1), counts.argmax(1), IGNORE)


#: sizes of the pictures in each row of the batch, side of the padding of words
BATCHES = {
    "wide": ([[(90, 40)]], "right"),
    "tall": ([[(37, 82)]], "right"),
    "odd": ([[(101, 67)]], "right"),
    "smaller than the model's input": ([[(21, 13)]], "right"),
    "larger": ([[(333, 250)]], "right"),
    "several sizes": ([[(48, 48), (75, 50)], [(120, 90)]], "left"),
}
#: those of which the second resizing takes the pixels that a single one would take
WHOLE = {
    "wide": ([[(96, 32)]], "right"),
    "tall": ([[(64, 96)]], "right"),
    "larger": ([[(288, 288)]], "right"),
    "several sizes": ([[(96, 96), (32, 96)], [(96, 64)]], "left"),
}
#: where the canvas of the tiles is not filled
PADDED = {
    "llava-next": ("wide", "odd", "several sizes"),
    "llava-onevision": ("wide", "tall", "several sizes"),
}
NEAREST = [(n, b) for n in ZOO for b in (WHOLE if n in TWICE else BATCHES)]


def of_batch(name, batch):
    """The measurement of a batch of a case of the zoo."""
    if isinstance(batch, str):
        batch = (WHOLE if name in TWICE else BATCHES)[batch]
    return measured(name, *ordered(*batch))


def default_resample(m) -> int:
    """How the family's processor interpolates; those of `test_layouts` were told not to."""
    return type(m.processor.image_processor).resample


# -- the proof -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "batch"), NEAREST)
def test_every_model_pixel_is_of_the_class_that_warp_says(name, batch):
    m = of_batch(name, batch)
    masks = [noise(size, seed) for seed, size in enumerate(m.x.grid.sizes)]
    found = seen(m, masks, resample=0)
    assert {"adapter", "vision"} <= found.keys()
    assert ("llm" in found) == (
        name != "llava-onevision" or batch not in ("larger", "odd", "several sizes")
    )
    for stage, classes_seen in found.items():
        assert nearest_errors(m.grids[stage], masks, classes_seen) == 0, stage


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ZOO)
def test_interpolation_leaves_all_but_borders_where_warp_says(name, batch):
    m = of_batch(name, BATCHES[batch])
    masks = [regions(size) for size in m.x.grid.sizes]
    found = seen(m, masks, resample=default_resample(m))
    for stage, classes_seen in found.items():
        grid = m.grids[stage]
        inside, border = border_errors(grid, masks, classes_seen)
        assert inside == 0, stage
        assert border < 0.1, stage  # a whole pixel off would be a half
        # nothing drawn is black, so black is what the processor added; where it adds before it
        # resizes, the border is a mixture
        told = grid.warp(masks, classes_seen.shape[1]) == IGNORE
        if name == "llava-onevision" and batch == "several sizes":
            continue
        assert np.array_equal(classes_seen == IGNORE, told), stage
        assert told.any() == (batch in PADDED.get(name, ())), stage


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ZOO)
def test_labels_of_pure_tokens_are_what_the_model_sees(name, batch):
    m = of_batch(name, BATCHES[batch])
    masks = [regions(size) for size in m.x.grid.sizes]
    masks[0][:, : masks[0].shape[1] // 8] = IGNORE
    apart = [np.where(mask == IGNORE, N_CLASSES, mask) for mask in masks]
    for stage, classes_seen in seen(m, masks, resample=default_resample(m)).items():
        grid = m.grids[stage]
        labels, seen_labels = grid.labels(masks, N_CLASSES), majority(classes_seen)
        pure = grid.purity(apart, N_CLASSES + 1) == 1
        assert stage != "vision" or pure.any()
        assert np.array_equal(labels[pure], seen_labels[pure]), stage
        one = classes_seen.reshape(len(grid), -1)
        one = (one == one[:, :1]).all(1) & (seen_labels != IGNORE)
        assert np.array_equal(labels[one], seen_labels[one]), stage


# -- corners, worked out by hand -------------------------------------------------------------------

#: a picture of 96 x 64 pixels, 16 to a letter
DRAWN = ["abbbbc", "gggggg", "gggggg", "dffffe"]
STRETCHED = ["abbc", "gggg", "gggg", "dffe"]
AS_IT_IS = ["aabbbbbbbbcc"] * 2 + ["g" * 12] * 4 + ["ddffffffffee"] * 2
#: the majority class of each patch of 8 model pixels, in the finest view
CORNERS = {
    # 48 x 32, and 8 of 48 columns cut off on both sides: the corners with them
    "llava-clip-llama": ["bbbb", "gggg", "gggg", "ffff"],
    "llava-clip-qwen2": ["bbbb", "gggg", "gggg", "ffff"],
    # 32 x 32, a patch is 24 x 16 pixels of the picture
    "llava-siglip-mistral": STRETCHED,
    "gemma3": STRETCHED,
    "paligemma": STRETCHED,
    "paligemma2": STRETCHED,
    # 64 x 43 on 64 x 64, ten rows above and eleven below, the outermost patches dropped; a patch is
    # 12 x 11.9 pixels. The second row of them starts at 8.9; where no class has a half, majorities
    # of the picture's pixels and of the model's may differ
    "llava-next": ["abbbbbbc", "a?bbbb?c", "gggggggg", "gggggggg", "dffffffe", "dffffffe"],
    # 96 x 64, a patch is 8 x 8 pixels
    "llava-onevision": AS_IT_IS,
    "qwen2-vl": AS_IT_IS,
    "qwen2.5-vl": AS_IT_IS,
    "qwen3-vl": AS_IT_IS,
    "idefics3": AS_IT_IS,
    "smolvlm": AS_IT_IS,
    # 64 x 64, a patch is 12 x 8 pixels
    "internvl": ["abbbbbbc"] * 2 + ["gggggggg"] * 4 + ["dffffffe"] * 2,
}
#: of the same picture on its side, where that is not the same on its side: 32 x 64
ON_ITS_SIDE = {"internvl": ["abbbbbbc", "gggggggg", "gggggggg", "dffffffe"]}


def letters(lines) -> np.ndarray:
    return np.array([["abcdefg".find(letter) for letter in line] for line in lines])


@pytest.mark.parametrize("on_its_side", [False, True])
@pytest.mark.parametrize("name", ZOO)
def test_known_corners(name, on_its_side):
    mask, expected = letters(DRAWN).repeat(16, 0).repeat(16, 1), letters(CORNERS[name])
    if on_its_side:
        mask, expected = mask.T, letters(ON_ITS_SIDE.get(name, CORNERS[name])).T
    m = of_batch(name, ([[mask.shape[::-1]]], "right"))
    grid = m.x.patches
    finest = int(np.argmax([rows * cols for rows, cols in grid.shapes]))
    at = grid.of_view(finest)
    found = seen(m, [mask], resample=default_resample(m))["vision"]
    assert grid.shapes[finest] == expected.shape
    for labels in (
        grid.labels(mask, N_CLASSES),
        majority(grid.warp(mask, 8)),
        majority(found),
    ):
        labels = labels[at].reshape(expected.shape)
        assert np.array_equal(labels[expected >= 0], expected[expected >= 0])


# -- less common settings and pictures -------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
def test_less_common_settings(setting):
    make, settings = SETTINGS[setting]
    m = measure(make(), [[(90, 40), (101, 67)], [(37, 80)]], **settings)
    for resample, kind in ((0, noise), (default_resample(m), regions)):
        masks = [kind(size) for size in m.x.grid.sizes]
        for stage, classes_seen in seen(m, masks, resample=resample, **settings).items():
            if kind is regions:
                inside, border = border_errors(m.grids[stage], masks, classes_seen)
                assert (inside, border < 0.1) == (0, True), stage
            elif "Idefics" not in m.family.name and "SmolVLM" not in m.family.name:
                assert nearest_errors(m.grids[stage], masks, classes_seen) == 0, stage


@pytest.mark.parametrize("size", [(199, 41), (41, 199), (61, 45), (85, 83)])
def test_pan_and_scan_of_lengths_that_do_not_divide(size):
    settings = SETTINGS["pan and scan"][1]
    m = measure("gemma3", [[size], [(48, 40)]], **settings)
    masks = [noise(size) for size in m.x.grid.sizes]
    for stage, classes_seen in seen(m, masks, resample=0, **settings).items():
        assert nearest_errors(m.grids[stage], masks, classes_seen) == 0, stage


NARROW = [[(1, 50)], [(50, 1)], [(1, 1), (200, 3)], [(3, 200), (60, 40)]]


@pytest.mark.parametrize(
    ("name", "row"), [(n, r) for n in ZOO for r in (NARROW[:2] if n in TWICE else NARROW)]
)
def test_pictures_of_a_pixels_width(name, row):
    m = of_batch(name, ([row], "right"))
    masks = [noise(size, seed) for seed, size in enumerate(row)]
    for stage, classes_seen in seen(m, masks, resample=0).items():
        assert nearest_errors(m.grids[stage], masks, classes_seen) == 0, stage


@pytest.mark.parametrize(
    ("size", "n_newlines"), [((200, 3), 0), ((3, 200), {"llava-next": 12, "llava-onevision": 16})]
)
@pytest.mark.parametrize("name", ["llava-next", "llava-onevision"])
def test_picture_so_long_that_padding_takes_all_its_tiles(name, size, n_newlines):
    """The model then drops every patch of the tiles; newline tokens are left where rows are."""
    m = of_batch(name, ([[size], [(90, 40)]], "right"))
    first = m.x.grid.of_image(0)
    assert m.x.grid.view_names == ("base", "base", "tiles")
    assert len(first) == 16
    newlines = (m.x.grid.fillers[:, 0] == 0).sum()
    assert newlines == (n_newlines[name] if n_newlines else 0)
    masks = [noise(size) for size in m.x.grid.sizes]
    for stage, classes_seen in seen(m, masks, resample=0).items():
        assert nearest_errors(m.grids[stage], masks, classes_seen) == 0, stage


# -- slips are found out ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_slips_are_found_out(name):
    m = of_batch(name, ([[(288, 288)]] if name in TWICE else [[(90, 40)]], "right"))
    grid, masks = m.x.patches, [noise(size) for size in m.x.grid.sizes]
    found = seen(m, masks, resample=0)["vision"]
    assert nearest_errors(grid, masks, found) == 0
    step = (grid.box[:, 2:] - grid.box[:, :2]) / 8  # a model pixel in pixels of the picture
    for axis, share in product((0, 1), (-1, -0.5, 0.5, 1)):
        box = grid.box.copy()
        box[:, [axis, axis + 2]] += share * step[:, [axis]]
        assert nearest_errors(replace(grid, box=box), masks, found) > 0.05 * found.size
    swapped = np.arange(len(grid))
    swapped[[0, 1]] = 1, 0
    assert nearest_errors(replace(grid, box=grid.box[swapped]), masks, found) > 0
    assert nearest_errors(grid, masks, found.swapaxes(1, 2)) > 0.05 * found.size
    assert nearest_errors(grid, [mask[:, ::-1] for mask in masks], found) > 0.05 * found.size
    # an inexact scale, as of a size that was rounded otherwise
    assert nearest_errors(replace(grid, box=grid.box * 1.02), masks, found) > 0.02 * found.size
