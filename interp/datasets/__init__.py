"""Pictures with segmentation masks.

A dataset here is a lazy sequence of samples, each with an `image`, a `mask` of class numbers in the
picture's own size, and a `name`; the sequence knows its `classes` and their `colors`, and has a
`fingerprint()` (`base.Segmentation`). There are the bundled `scenes`, the sets of the field in
their standard folders (`ade20k`, `voc`, `cityscapes`, `coco_stuff`), any `folder` of one's own, and
any set of the Hugging Face library (`hf`). `open_data("ade20k:PATH")` opens one by a word,
`check_data` says whether a folder is right, `contact_sheet` draws a few of its pictures.

A new set is one function that returns such a sequence, and one row in `opening.KINDS`.
"""

from __future__ import annotations

from interp.datasets.ade20k import ade20k
from interp.datasets.base import Pictures, Sample, Segmentation
from interp.datasets.checking import check_data
from interp.datasets.choosing import drawn
from interp.datasets.cityscapes import cityscapes
from interp.datasets.coco_stuff import coco_stuff
from interp.datasets.folder import folder
from interp.datasets.hf import hf
from interp.datasets.opening import Data, open_data
from interp.datasets.resizing import resized
from interp.datasets.scenes import Scene, Scenes, scenes
from interp.datasets.sheet import contact_sheet
from interp.datasets.voc import voc

__all__ = [
    "Data",
    "Pictures",
    "Sample",
    "Scene",
    "Scenes",
    "Segmentation",
    "ade20k",
    "check_data",
    "cityscapes",
    "coco_stuff",
    "contact_sheet",
    "drawn",
    "folder",
    "hf",
    "open_data",
    "resized",
    "scenes",
    "voc",
]
