"""The way back from a model pixel to the picture, against transformers' own image processor."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from interp.families.geometry import Geometry

SIDE, PATCH = 80, 8


def processor(resample=0, **options) -> CLIPImageProcessor:
    """CLIP's: resize the shortest edge (nearest pixel: nothing bleeds), crop the middle."""
    settings = {
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "resample": resample,
        "do_normalize": False,
        "do_rescale": False,
        **options,
    }
    return CLIPImageProcessor(**settings)


@pytest.mark.parametrize("size", [(80, 80), (203, 97), (97, 203), (333, 81), (33, 47), (640, 427)])
@pytest.mark.parametrize("crop", [80, 72, 65])
def test_every_model_pixel_comes_from_where_the_geometry_says(size, crop):
    """The picture's red is its column, its green its row: each pixel of the model's input tells
    where it came from."""
    width, height = size
    column, row = np.meshgrid(np.arange(width), np.arange(height))
    picture = np.stack([column % 256, row % 256, (column // 256) * 16 + row // 256], -1)
    made = processor(crop_size={"height": crop, "width": crop})
    out = made(images=Image.fromarray(picture.astype(np.uint8)), return_tensors="np")
    red, green, blue = out["pixel_values"][0].astype(int)
    came_from = red + 256 * (blue // 16), green + 256 * (blue % 16)
    geometry = Geometry.of(made, size, (crop, crop))
    at = np.arange(crop) + 0.5
    x, y = ((at + geometry.offset[i]) / geometry.scale[i] for i in (0, 1))
    # nearest-pixel resizing takes the pixel that holds the point: half a pixel from its centre
    assert np.abs(came_from[0] + 0.5 - x[None, :]).max() < 0.51
    assert np.abs(came_from[1] + 0.5 - y[:, None]).max() < 0.51


@pytest.mark.parametrize("size", [(160, 90), (90, 160), (61, 100)])
def test_drawn_rectangle_lands_in_the_tokens_whose_boxes_hold_it(size):
    made = processor()
    geometry = Geometry.of(made, size, (SIDE, SIDE))
    rows = cols = SIDE // PATCH
    boxes = geometry.boxes(rows, cols)
    rectangle = boxes[3 * cols + 4, :2], boxes[5 * cols + 6, 2:]  # tokens (3..5, 4..6)
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    (left, top), (right, bottom) = np.rint(rectangle).astype(int)
    picture[top:bottom, left:right, 0] = 255
    red = made(images=Image.fromarray(picture), return_tensors="np")["pixel_values"][0][0]
    share = red.reshape(rows, PATCH, cols, PATCH).mean((1, 3)) / 255
    inside = np.zeros((rows, cols), bool)
    inside[3:6, 4:7] = True
    assert share[inside].min() > 0.7  # the corner loses up to a pixel of 8 on two sides
    assert share[~inside].max() < 0.2


def test_boxes_tile_the_crop_and_nothing_else():
    geometry = Geometry.of(processor(), (160, 80), (SIDE, SIDE))
    boxes = geometry.boxes(10, 10)
    assert boxes[0].tolist() == [40, 0, 48, 8]
    assert boxes[-1].tolist() == [112, 72, 120, 80]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert areas.sum() == pytest.approx(80 * 80)


def test_crop_larger_than_the_picture_pads_as_transformers_does():
    made = processor(do_resize=False)
    size = (71, 60)
    picture = Image.fromarray(np.full((60, 71, 3), 255, np.uint8))
    white = made(images=picture, return_tensors="np")["pixel_values"][0][0]
    y, x = np.nonzero(white)
    geometry = Geometry.of(made, size, (SIDE, SIDE))
    assert geometry.offset == (-x.min(), -y.min())


def test_a_stretched_picture_and_a_hand_made_input():
    stretch = processor(size={"height": SIDE, "width": SIDE})
    for made in (stretch, None):
        assert Geometry.of(made, (160, 40), (SIDE, SIDE)).scale == (0.5, 2.0)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"do_pad": True}, NotImplementedError, r"pads its pictures \(do_pad\)"),
        (
            {"size": {"longest_edge": 80}},
            NotImplementedError,
            "only height/width and shortest_edge",
        ),
        ({"crop_size": {"height": 64, "width": 64}}, ValueError, "makes 64 x 64 .*takes 80 x 80"),
    ],
)
def test_setting_that_cannot_be_undone_is_refused(options, error, says):
    made = processor()
    for name, value in options.items():
        setattr(made, name, value)
    with pytest.raises(error, match=says):
        Geometry.of(made, (100, 90), (SIDE, SIDE))
