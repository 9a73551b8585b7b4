"""Any folder of pictures and masks with a list of classes: a set of one's own.

    mine/classes.txt               one name a line; line 0 is class 0
    mine/images/train/a.jpg        or mine/images/a.jpg, without splits
    mine/masks/train/a.png         8 or 16 bits or palette; 255 is "no label"

A picture and its mask have the same name, folders below included. `folder` takes other names of
folders, other endings (`mask_endings="_mask.png"`), another number for "no label", and masks that
count from 1 (`reduce_zero_label=True`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from interp.datasets.finding import contents
from interp.datasets.layouts import Files, Layout
from interp.datasets.masks import Coding
from interp.datasets.palettes import Color, class_list
from interp.errors import DataWrong
from interp.labels import IGNORE

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
MASKS = (".png", ".tif", ".tiff", ".bmp")
CLASSES = "classes.txt"


def folder(
    root: str | os.PathLike[str],
    split: str | None = None,
    *,
    images: str = "images",
    masks: str = "masks",
    classes: Sequence[str] | str | None = None,
    colors: Sequence[Color] | None = None,
    ignore: int | tuple[int, ...] = IGNORE,
    reduce_zero_label: bool = False,
    picture_endings: str | tuple[str, ...] = PICTURES,
    mask_endings: str | tuple[str, ...] = MASKS,
    name: str = "folder",
) -> Files:
    """A folder of pictures and masks.

    Args:
        root: the folder.
        split: a folder inside both `images` and `masks`; None reads all that is in them.
        images: folder of the pictures; with "{split}" in it, that is where the split's name goes.
        masks: folder of the masks, likewise.
        classes: names by class number, the name of a known list ("ade20k", "voc", "cityscapes",
            "coco_stuff"), or None for `classes.txt` in the folder.
        colors: RGB by class number.
        ignore: number, or numbers, in the files that mean "no label"; they win over classes.
        reduce_zero_label: 0 means "no label" and class k is written k + 1.
        picture_endings: of the pictures' files.
        mask_endings: of the masks' files; the first that is found is taken for all.
        name: of the set.

    Raises:
        DataWrong: what was looked for and what is there.
    """
    layout = folder_layout(
        root,
        images=images,
        masks=masks,
        classes=classes,
        colors=colors,
        ignore=ignore,
        reduce_zero_label=reduce_zero_label,
        picture_endings=picture_endings,
        mask_endings=mask_endings,
        name=name,
        split=split is not None,
    )
    return layout.open(root, split or "")


def folder_layout(
    root: str | os.PathLike[str],
    *,
    split: bool = True,
    images: str = "images",
    masks: str = "masks",
    classes: Sequence[str] | str | None = None,
    colors: Sequence[Color] | None = None,
    ignore: int | tuple[int, ...] = IGNORE,
    reduce_zero_label: bool = False,
    picture_endings: str | tuple[str, ...] = PICTURES,
    mask_endings: str | tuple[str, ...] = MASKS,
    name: str = "folder",
) -> Layout:
    """The layout of a folder; arguments as for `folder`.

    Args:
        split: whether it is read split by split; its splits are then the folders that are there.
    """
    root = Path(root)
    pictures, labels = (
        pattern if "{split}" in pattern or not split else f"{pattern}/{{split}}"
        for pattern in (images, masks)
    )
    listed = classes if classes is not None else _class_file(root)
    names, given = class_list(listed, colors)
    coding = Coding.plain(
        len(names),
        ignore=ignore,
        reduce_zero_label=reduce_zero_label,
        hint=f"There are {len(names)} classes. Masks that count from 1 want "
        "reduce_zero_label=True; another number for 'no label' is given as ignore=",
    )
    return Layout(
        kind=name,
        title=f"folder of {images} and {masks}",
        classes=names,
        colors=given,
        splits=_splits(root, pictures) if split else ("",),
        pictures=pictures,
        masks=labels,
        picture_endings=_several(picture_endings),
        codings=tuple((ending, coding) for ending in _several(mask_endings)),
    )


def _class_file(root: Path) -> list[str]:
    file = root / CLASSES
    if not file.is_file():
        there = contents(root) if root.is_dir() else "no such folder"
        raise DataWrong(
            f"{root} has no {CLASSES} (one class name a line); found: {there}. Or give classes=, "
            "a list of names"
        )
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _splits(root: Path, pictures: str) -> tuple[str, ...]:
    """Folders that stand where a split's name goes."""
    before, after = pictures.split("{split}")
    above = root / before
    if not above.is_dir():
        return ()
    return tuple(sorted(f.name for f in above.iterdir() if (f / after.lstrip("/")).is_dir()))


def _several(endings: str | tuple[str, ...]) -> tuple[str, ...]:
    return (endings,) if isinstance(endings, str) else tuple(endings)
