"""Names and colours of classes are the field's."""

from __future__ import annotations

import colorsys

import pytest

from interp.datasets.coco_stuff import TRAIN_IDS
from interp.datasets.palettes import class_list, color_map, known_palettes, palette
from interp.errors import DataWrong

KNOWN = {  # number of classes, and some that papers and leaderboards name by number
    "ade20k": (150, {0: "wall", 7: "bed", 12: "person", 21: "water", 48: "skyscraper",
                     80: "bus", 127: "bicycle", 136: "traffic light", 149: "flag"}),
    "voc": (21, {0: "background", 1: "aeroplane", 8: "cat", 15: "person", 20: "tvmonitor"}),
    "cityscapes": (19, {0: "road", 8: "vegetation", 11: "person", 13: "car", 18: "bicycle"}),
    "coco_stuff": (171, {0: "person", 10: "fire hydrant", 11: "stop sign", 79: "toothbrush",
                         80: "banner", 157: "tree", 170: "wood"}),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_lists(name):
    n, known = KNOWN[name]
    names, colors = palette(name)
    assert len(names) == len(set(names)) == len(colors) == n
    assert {k: names[k] for k in known} == known
    assert all(label == label.strip() and label for label in names)
    assert all(0 <= level <= 255 for color in colors for level in color)
    # ADE20K as released draws road and skyscraper alike
    assert len(set(colors)) == n - (name == "ade20k")


def test_coco_names_by_its_own_ids():
    """Numbers in COCO-Stuff's own list of labels, which count from 1 and have gaps."""
    ids = {1: "person", 13: "stop sign", 90: "toothbrush", 92: "banner", 124: "grass", 149: "road",
           157: "sky-other", 169: "tree", 178: "water-other", 182: "wood"}  # fmt: skip
    names = palette("coco_stuff")[0]
    assert {k: names[TRAIN_IDS[k - 1]] for k in ids} == ids


def test_released_colours():
    assert palette("ade20k")[1][149] == (92, 0, 255)
    assert palette("ade20k")[1][6] == palette("ade20k")[1][48] == (140, 140, 140)
    assert palette("cityscapes")[1][13] == (0, 0, 142)
    # PASCAL's first colours by name: maroon, green, olive, navy, purple, teal, grey
    assert palette("voc")[1][:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert palette("voc")[1][1:] == color_map(20)


def test_made_colours_differ_and_none_is_black():
    colors = color_map(255)
    assert len(set(colors)) == 255
    assert min(max(color) for color in colors) >= 32
    assert len({round(colorsys.rgb_to_hsv(*color)[0], 2) for color in colors[:6]}) == 6


def test_lists_of_ones_own():
    assert class_list(["a", "b"], [(1, 2, 3), (4, 5, 6)]) == (("a", "b"), ((1, 2, 3), (4, 5, 6)))
    assert class_list(" sea, land ")[0] == ("sea", "land")
    assert class_list("voc") == palette("voc")
    assert len(class_list([f"c{k}" for k in range(255)])[0]) == 255


@pytest.mark.parametrize(
    ("classes", "colors", "words"),
    [
        ([f"c{k}" for k in range(256)], None, "256 classes.*255 means 'ignored'"),
        (["a", "b", "a"], None, "given twice: a"),
        ([], None, "must not be empty: none"),
        (["a", " "], None, "must not be empty"),
        (["a", "b"], [(1, 2, 3)], "1 colours for 2 classes"),
    ],
)
def test_lists_that_cannot_be(classes, colors, words):
    with pytest.raises(DataWrong, match=words):
        class_list(classes, colors)


def test_unknown_list():
    with pytest.raises(DataWrong, match="no class list 'coco'; there are ade20k, cityscapes"):
        palette("coco")
    assert known_palettes() == sorted(KNOWN)
