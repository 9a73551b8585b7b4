"""COCO-Stuff 164k: COCO's 80 kinds of things and 91 kinds of stuff over all of COCO 2017, 118,287
pictures for training and 5,000 for validation.

    images/val2017/000000000139.jpg
    annotations/val2017/000000000139_labelTrainIds.png     (0..170, 255 unlabelled)
    annotations/val2017/000000000139.png                   (as released: 0..181, 255 unlabelled)

The released masks (`stuffthingmaps_trainval2017.zip`, put into `annotations/`) hold COCO's category
ids less one, and 11 of those 182 numbers were never used. Tools of the field close the gaps and
write the result as `*_labelTrainIds.png`. Those are read if there are any, else the released ones,
with the gaps closed here.
"""

from __future__ import annotations

import os

from interp.datasets.layouts import Files, Layout
from interp.datasets.masks import Coding
from interp.datasets.palettes import palette
from interp.labels import IGNORE

_CLASSES, _COLORS = palette("coco_stuff")

#: numbers below 182 that no released mask holds
GAPS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)

#: number in a released mask to class number
TRAIN_IDS = {
    **{v: k for k, v in enumerate(v for v in range(182) if v not in GAPS)},
    IGNORE: IGNORE,
}

COCO_STUFF = Layout(
    kind="coco-stuff",
    title="COCO-Stuff 164k",
    classes=_CLASSES,
    colors=_COLORS,
    splits=("train2017", "val2017"),
    pictures="images/{split}",
    masks="annotations/{split}",
    picture_endings=(".jpg",),
    codings=(
        ("_labelTrainIds.png", Coding.plain(len(_CLASSES))),
        (".png", Coding.mapped(TRAIN_IDS)),
    ),
    below=("", "coco_stuff164k"),
    released=(118_287, 5_000),
)


def coco_stuff(root: str | os.PathLike[str], split: str = "val2017") -> Files:
    """COCO-Stuff 164k, 171 classes.

    Args:
        root: the folder that `images` and `annotations` are in.
        split: "train2017" or "val2017".

    Raises:
        DataWrong: what was looked for and what is there.
    """
    return COCO_STUFF.open(root, split)
