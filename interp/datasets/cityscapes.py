"""Cityscapes, fine annotations: streets of 50 cities, 19 scored classes, 2,975 pictures for
training and 500 for validation, 2048 x 1024 pixels each.

    leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png
    gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png

The released masks hold *ids*, 0 to 33, of which 19 are scored; the set's own tools translate them
to *trainIds*, 0 to 18, with 255 for the rest. `TRAIN_IDS` is that translation. If a split has no
`labelIds` but `labelTrainIds`, those are read as they are.
"""

from __future__ import annotations

import os

from interp.datasets.layouts import Files, Layout
from interp.datasets.masks import Coding
from interp.datasets.palettes import palette
from interp.labels import IGNORE

_CLASSES, _COLORS = palette("cityscapes")

#: ids of the scored classes, by class number (trainId)
SCORED_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

#: id to trainId; licence plates (-1) are written 255 in 8 bits
TRAIN_IDS = dict.fromkeys((*range(34), IGNORE), IGNORE) | {v: k for k, v in enumerate(SCORED_IDS)}

CITYSCAPES = Layout(
    kind="cityscapes",
    title="Cityscapes (fine)",
    classes=_CLASSES,
    colors=_COLORS,
    splits=("train", "val"),
    pictures="leftImg8bit/{split}",
    masks="gtFine/{split}",
    picture_endings=("_leftImg8bit.png",),
    codings=(
        ("_gtFine_labelIds.png", Coding.mapped(TRAIN_IDS)),
        ("_gtFine_labelTrainIds.png", Coding.plain(len(_CLASSES))),
    ),
    below=("", "cityscapes"),
    released=(2_975, 500),
)


def cityscapes(root: str | os.PathLike[str], split: str = "val") -> Files:
    """Cityscapes, 19 classes; the masks of its test split are not public.

    Args:
        root: the folder that `leftImg8bit` and `gtFine` are in.
        split: "train" or "val".

    Raises:
        DataWrong: what was looked for and what is there.
    """
    return CITYSCAPES.open(root, split)
