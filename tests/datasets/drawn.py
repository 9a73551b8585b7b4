"""Five drawn pictures a split in every layout that the field uses, with masks that are known.

`ade20k(tmp_path)` and so on write a set as it is released (folders, names and numbers in the masks)
and return a `Drawn`: where it is, and the class numbers that were meant. Nothing of the library is
used to write, so reading is tested against something independent.

A picture's regions have a colour that depends on the class, plus noise: a probe can learn them.
Sizes differ from picture to picture unless `size=` is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

VOID = 255
SIZES = ((48, 36), (36, 48), (64, 40), (50, 50), (33, 47))  # width, height

# numbers in released masks, by class number, written down from the sets' own documents
CITY_IDS = {0: 7, 1: 8, 2: 11, 3: 12, 11: 24, 13: 26, 18: 33}
COCO_IDS = {0: 0, 10: 10, 11: 12, 24: 26, 26: 30, 61: 69, 62: 71, 79: 89, 80: 91, 170: 181}


@dataclass(frozen=True)
class Drawn:
    """A set on disk: where it is, and by split the masks that were meant, by name."""

    root: Path
    masks: dict[str, dict[str, np.ndarray]]


def mask_of(classes: tuple[int, ...], size: tuple[int, int], seed: int) -> np.ndarray:
    """[h, w] int64: upright bands of the classes in random order over two rows, a void corner."""
    width, height = size
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.int64)
    for rows in (slice(0, height // 2), slice(height // 2, height)):
        order = rng.permutation(classes)
        mask[rows] = order[np.arange(width) * len(order) // width]
    mask[:5, :7] = VOID
    return mask


def picture_of(mask: np.ndarray, seed: int) -> Image.Image:
    """A colour a class, and noise."""
    rng = np.random.default_rng([seed, 1])
    colors = np.random.default_rng(0).integers(30, 226, (256, 3))
    return Image.fromarray(
        (colors[mask] + rng.normal(0, 8, (*mask.shape, 3))).clip(0, 255).astype(np.uint8)
    )


def draw(
    split: str,
    names: list[str],
    classes: tuple[int, ...],
    write: Callable[[str, Image.Image, np.ndarray], None],
    size: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """Draw samples of these names, hand each to `write`, and return their masks."""
    masks = {}
    for k, name in enumerate(names):
        seed = sum(map(ord, split)) * 100 + k
        masks[name] = mask_of(classes, size or SIZES[k % len(SIZES)], seed)
        write(name, picture_of(masks[name], seed), masks[name])
    return masks


def save(image: Image.Image, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def grey(numbers: np.ndarray) -> Image.Image:
    """A grey picture of numbers, of 8 bits, or 16 if they need it."""
    return Image.fromarray(numbers.astype(np.uint8 if numbers.max() < 256 else np.uint16))


def ade20k(tmp_path: Path, size: tuple[int, int] | None = None) -> Drawn:
    """SceneParse150: 0 unlabelled, class k is written k + 1."""
    root, masks = tmp_path / "ADEChallengeData2016", {}
    for split, short in (("training", "train"), ("validation", "val")):

        def write(name: str, image: Image.Image, mask: np.ndarray, split: str = split) -> None:
            save(image, root / "images" / split / f"{name}.jpg", quality=95)
            numbers = np.where(mask == VOID, 0, mask + 1)
            save(grey(numbers), root / "annotations" / split / f"{name}.png")

        names = [f"ADE_{short}_{k:08d}" for k in range(1, 6)]
        masks[split] = draw(split, names, (0, 1, 2, 149), write, size)
    return Drawn(root, masks)


def voc(tmp_path: Path, size: tuple[int, int] | None = None) -> Drawn:
    """VOC 2012: palette masks, lists of names, and pictures that no list names."""
    root, masks = tmp_path / "VOCdevkit" / "VOC2012", {}
    colors = np.random.default_rng(5).integers(0, 256, 768).tolist()
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)

    def write(name: str, image: Image.Image, mask: np.ndarray) -> None:
        save(image, root / "JPEGImages" / f"{name}.jpg", quality=95)
        indices = grey(mask).convert("L")
        indices = Image.frombytes("P", indices.size, indices.tobytes())
        indices.putpalette(colors)
        save(indices, root / "SegmentationClass" / f"{name}.png")

    for split, first in (("train", 32), ("val", 33)):
        names = [f"2007_{first + 100 * k:06d}" for k in range(5)]
        masks[split] = draw(split, names, (0, 1, 15, 20), write, size)
        # lists are not sorted, and some copies end lines with a space, or as Windows does
        (lists / f"{split}.txt").write_bytes(" \r\n".join([*names[::-1], ""]).encode())
    save(Image.new("RGB", (20, 20)), root / "JPEGImages" / "2007_999999.jpg")
    masks["trainval"] = masks["train"] | masks["val"]
    (lists / "trainval.txt").write_text("\n".join(sorted(masks["trainval"])))
    return Drawn(root, masks)


def cityscapes(
    tmp_path: Path, size: tuple[int, int] | None = None, train_ids: bool = False
) -> Drawn:
    """Cityscapes: folders of cities, ids (or trainIds) in masks, and the files beside them."""
    root, masks = tmp_path / "cityscapes", {}
    cities = {"train": ("aachen", "bochum"), "val": ("frankfurt", "lindau")}
    for split, (one, two) in cities.items():

        def write(name: str, image: Image.Image, mask: np.ndarray, split: str = split) -> None:
            save(image, root / "leftImg8bit" / split / f"{name}_leftImg8bit.png")
            stem = root / "gtFine" / split / f"{name}_gtFine"
            numbers = np.array([CITY_IDS.get(k, 3) for k in range(256)])[mask]  # 3: out of roi
            if train_ids:
                save(grey(mask), Path(f"{stem}_labelTrainIds.png"))
            else:
                save(grey(numbers), Path(f"{stem}_labelIds.png"))
            save(grey(mask * 0 + 26001), Path(f"{stem}_instanceIds.png"))
            save(image, Path(f"{stem}_color.png"))
            Path(f"{stem}_polygons.json").write_text("{}")

        names = [f"{one}/{one}_000000_{19 + 10 * k:06d}" for k in range(3)]
        names += [f"{two}/{two}_000000_{19 + 10 * k:06d}" for k in range(2)]
        masks[split] = draw(split, names, (0, 2, 11, 18), write, size)
    return Drawn(root, masks)


def coco_stuff(
    tmp_path: Path, size: tuple[int, int] | None = None, released: bool = False
) -> Drawn:
    """COCO-Stuff 164k with `labelTrainIds`, or with masks as released, which have gaps."""
    root, masks = tmp_path / "coco_stuff164k", {}
    for split, first in (("train2017", 9), ("val2017", 139)):

        def write(name: str, image: Image.Image, mask: np.ndarray, split: str = split) -> None:
            save(image, root / "images" / split / f"{name}.jpg", quality=95)
            place = root / "annotations" / split
            raw = np.array([COCO_IDS.get(k, VOID) for k in range(256)])[mask]
            save(grey(raw), place / f"{name}.png")
            if not released:
                save(grey(mask), place / f"{name}_labelTrainIds.png")

        names = [f"{first + 146 * k:012d}" for k in range(5)]
        masks[split] = draw(split, names, (0, 11, 80, 170), write, size)
    return Drawn(root, masks)


def folder(tmp_path: Path, size: tuple[int, int] | None = None) -> Drawn:
    """A set of one's own, in splits train and val, with four classes."""
    root, masks = tmp_path / "mine", {}
    for split in ("train", "val"):

        def write(name: str, image: Image.Image, mask: np.ndarray, split: str = split) -> None:
            save(image, root / "images" / split / f"{name}.png")
            save(grey(mask), root / "masks" / split / f"{name}.png")

        masks[split] = draw(split, [f"{split}{k}" for k in range(5)], (0, 1, 2, 3), write, size)
    (root / "classes.txt").write_text("sky\ngrass\nroad\nhouse\n")
    return Drawn(root, masks)
