"""The way back from a model pixel to the picture, against transformers' own image processor."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import is_torchvision_available

from interp.families.geometry import Geometry, image_settings

SIDE, PATCH = 80, 8
KINDS = {"clip": CLIPImageProcessorPil, "llava": LlavaImageProcessorPil}
if is_torchvision_available():  # transformers then prefers its other implementation
    KINDS |= {
        "clip with torchvision": transformers.CLIPImageProcessor,
        "llava with torchvision": transformers.LlavaImageProcessor,
    }


def processor(kind="clip", resample=0, **options):
    """CLIP's: resize the shortest edge (nearest pixel: nothing bleeds), crop the middle."""
    settings = {
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "resample": resample,
        "do_normalize": False,
        "do_rescale": False,
        **options,
    }
    return KINDS[kind](**settings)


def came_from(made, size):
    """Column and row in the original picture of each pixel that `made` makes, and -1 for padding.

    The picture's red is its column, its green its row, its blue the hundreds of both.
    """
    width, height = size
    column, row = np.meshgrid(np.arange(width), np.arange(height))
    picture = np.stack([column % 250, row % 250, 1 + (column // 250) * 16 + row // 250], -1)
    out = made(images=Image.fromarray(picture.astype(np.uint8)), return_tensors="np")
    red, green, blue = out["pixel_values"][0].astype(int)
    known = (red < 250) & (blue > 0)
    blue -= 1
    return np.where(known, red + 250 * (blue // 16), -1), np.where(
        known, green + 250 * (blue % 16), -1
    )


@pytest.mark.parametrize("size", [(80, 80), (203, 97), (97, 203), (333, 81), (33, 47), (640, 427)])
@pytest.mark.parametrize("crop", [80, 72, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_every_model_pixel_comes_from_where_the_geometry_says(kind, size, crop):
    made = processor(kind, crop_size={"height": crop, "width": crop})
    column, row = came_from(made, size)
    geometry = Geometry.of(made, size, (crop, crop))
    x, y = (geometry.back(axis, np.arange(crop) + 0.5) for axis in (0, 1))
    # nearest-pixel resizing takes the pixel that holds the point: half a pixel from its centre
    assert np.abs(column + 0.5 - x[None, :]).max() < 0.51
    assert np.abs(row + 0.5 - y[:, None]).max() < 0.51


@pytest.mark.parametrize("size", [(80, 80), (203, 98), (97, 203), (62, 47)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "llava" in kind])
def test_padding_to_a_square_is_undone(kind, size):
    """LLaVA-1.5's own preprocessing: pad with the mean colour, then resize."""
    made = processor(kind, do_pad=True, image_mean=[1.0, 1.0, 1.0])  # pads with 255: no column
    column, row = came_from(made, size)
    picture = column >= 0
    geometry = Geometry.of(made, size, (SIDE, SIDE))
    x, y = (geometry.back(axis, np.arange(SIDE) + 0.5) for axis in (0, 1))
    assert np.abs(column + 0.5 - x[None, :])[picture].max() < 0.51
    assert np.abs(row + 0.5 - y[:, None])[picture].max() < 0.51
    inside = ((x > 0) & (x < size[0]))[None, :] & ((y > 0) & (y < size[1]))[:, None]
    assert np.array_equal(inside, picture)


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


@pytest.mark.parametrize("size", [(71, 60), (60, 71), (70, 63), (79, 80)])
@pytest.mark.parametrize("kind", KINDS)
def test_crop_larger_than_the_picture_pads_as_transformers_does(kind, size):
    """Of an odd number of columns, Pillow's version puts more in front, torchvision's fewer."""
    made = processor(kind, do_resize=False)
    picture = Image.fromarray(np.full((*size[::-1], 3), 255, np.uint8))
    white = made(images=picture, return_tensors="np")["pixel_values"][0][0]
    y, x = np.nonzero(white)
    assert Geometry.of(made, size, (SIDE, SIDE)).offset == (-x.min(), -y.min())


def test_a_stretched_picture_and_a_hand_made_input():
    stretch = processor(size={"height": SIDE, "width": SIDE})
    for made in (stretch, None):
        assert Geometry.of(made, (160, 40), (SIDE, SIDE)).scale == (0.5, 2.0)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"do_pad": True}, NotImplementedError, r"CLIP\w+ pads its pictures \(do_pad\)"),
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


def test_settings_of_the_processor_go_over_those_of_its_image_part():
    both = SimpleNamespace(image_processor=processor())
    both.images_kwargs = {"do_center_crop": False, "size": None}
    settings = image_settings(both)
    assert (settings.do_center_crop, dict(settings.size)) == (False, {"shortest_edge": SIDE})
    assert Geometry.of(settings, (160, 80), (160, 80)).offset == (0, 0)
    assert image_settings(None) is None
