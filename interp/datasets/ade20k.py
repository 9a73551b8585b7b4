"""ADE20K, as SceneParse150 of the MIT scene parsing challenge has it: 150 classes of things indoors
and out, 20,210 pictures for training and 2,000 for validation.

    ADEChallengeData2016/images/training/ADE_train_00000001.jpg
    ADEChallengeData2016/annotations/training/ADE_train_00000001.png

Masks are grey PNGs in which 0 is "unlabelled" and class k is written k + 1. The shift by one is
made here, once. Some copies of the set hold masks that were shifted already (0..149 and 255): read
as released, every class would be taken for its neighbour, so a 255 in a mask is an error.
"""

from __future__ import annotations

import os

from interp.datasets.layouts import Files, Layout
from interp.datasets.masks import Coding
from interp.datasets.palettes import palette
from interp.labels import IGNORE

_CLASSES, _COLORS = palette("ade20k")

ADE20K = Layout(
    kind="ade20k",
    title="ADE20K (SceneParse150)",
    classes=_CLASSES,
    colors=_COLORS,
    splits=("training", "validation"),
    pictures="images/{split}",
    masks="annotations/{split}",
    picture_endings=(".jpg",),
    codings=(
        (
            ".png",
            Coding.mapped(
                {0: IGNORE, **{k + 1: k for k in range(len(_CLASSES))}},
                hint="If it holds 255 and nothing above 149, its numbers were shifted already "
                "(0..149, 255 unlabelled); take the released masks, or read these as a folder set "
                'with classes="ade20k"',
            ),
        ),
    ),
    below=("", "ADEChallengeData2016"),
    released=(20_210, 2_000),
)


def ade20k(root: str | os.PathLike[str], split: str = "validation") -> Files:
    """SceneParse150, 150 classes.

    Args:
        root: `ADEChallengeData2016`, or the folder that it is in.
        split: "training" or "validation".

    Raises:
        DataWrong: what was looked for and what is there.
    """
    return ADE20K.open(root, split)
