"""PASCAL VOC 2012, segmentation: 20 kinds of things and background, 1,464 pictures for training and
1,449 for validation.

    VOC2012/JPEGImages/2007_000033.jpg                 (17,125 pictures; most have no mask)
    VOC2012/SegmentationClass/2007_000033.png          (palette: the index is the class, 255 void)
    VOC2012/ImageSets/Segmentation/{train,val}.txt     (which sample is in which split)
"""

from __future__ import annotations

import os

from interp.datasets.layouts import Files, Layout
from interp.datasets.masks import Coding
from interp.datasets.palettes import palette

_CLASSES, _COLORS = palette("voc")

VOC = Layout(
    kind="voc",
    title="PASCAL VOC 2012",
    classes=_CLASSES,
    colors=_COLORS,
    splits=("train", "val", "trainval"),
    pictures="JPEGImages",
    masks="SegmentationClass",
    picture_endings=(".jpg",),
    codings=((".png", Coding.plain(len(_CLASSES))),),
    below=("", "VOC2012", "VOCdevkit/VOC2012"),
    names="ImageSets/Segmentation/{split}.txt",
    released=(1_464, 1_449, 2_913),
)


def voc(root: str | os.PathLike[str], split: str = "val") -> Files:
    """PASCAL VOC 2012, 21 classes with background.

    Args:
        root: `VOC2012`, or the folder that it or `VOCdevkit` is in.
        split: "train", "val" or "trainval".

    Raises:
        DataWrong: what was looked for and what is there.
    """
    return VOC.open(root, split)
