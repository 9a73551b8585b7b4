"""From files to arrays: how a picture is read, how a mask is read, what its numbers mean.

A mask is a picture whose pixels are numbers of classes, and most ways of opening one spoil them
without an error:

* A **palette** PNG holds indices and a table of colours. Converted to RGB, or to grey, the indices
  are gone. Here it is read as it is, and a mask in RGB, or in a lossy format, is refused.
* A **grey** PNG of 1, 2 or 4 bits (optimisers of PNGs make such) is stretched to 0..255 by Pillow,
  so that class 3 comes out as 51. That is undone.
* In **uint8**, 0 - 1 is 255 and 255 + 1 is 0. Numbers are widened to int64 before anything else.

What a number means differs from set to set: ADE20K counts from 1, Cityscapes has 34 ids of which 19
are scored, COCO-Stuff has gaps. All of it is one table, raw number to class number (`Coding`),
applied once; a number that the table does not have is an error that names the file.

Pictures are opened in RGB, *without* turning them by their EXIF orientation: masks were drawn on
the pixels as they lie in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from interp.errors import DataWrong
from interp.labels import IGNORE

#: in a `Coding`, for numbers that no mask of the set should hold
WRONG = -1

_WHOLE_NUMBERS = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
_LOSSY = ("JPEG", "MPO")


@dataclass(frozen=True)
class Coding:
    """What the numbers in a set's mask files mean.

    Attributes:
        table: entry v is the class number of raw value v, `IGNORE` or `WRONG`; values beyond its
            end are wrong.
        hint: said with the error when a mask holds a wrong value.
    """

    table: tuple[int, ...]
    hint: str = ""

    @classmethod
    def plain(
        cls,
        n_classes: int,
        *,
        ignore: int | tuple[int, ...] = IGNORE,
        reduce_zero_label: bool = False,
        hint: str = "",
    ) -> Coding:
        """Numbers as they are, or counted from 1.

        Args:
            n_classes: how many classes there are.
            ignore: raw value, or values, that mean "no label"; they win over classes.
            reduce_zero_label: 0 means "no label" and class k is written k + 1.
            hint: see the class.

        >>> Coding.plain(3, ignore=4, reduce_zero_label=True).table
        (255, 0, 1, 2, 255)
        """
        ignored = (ignore,) if isinstance(ignore, int) else tuple(ignore)
        if any(not 0 <= value < 2**16 for value in ignored):
            raise DataWrong(f"ignore={ignore}: values of masks are 0..65535")
        table = [IGNORE] * reduce_zero_label + list(range(n_classes))
        table += [WRONG] * (max((0, *ignored)) + 1 - len(table))
        for value in ignored:
            table[value] = IGNORE
        return cls(tuple(table), hint)

    @classmethod
    def mapped(cls, numbers: Mapping[int, int], hint: str = "") -> Coding:
        """Raw value to class number (or `IGNORE`), one by one.

        >>> Coding.mapped({1: 0, 3: 1}).table
        (-1, 0, -1, 1)
        """
        return cls(tuple(numbers.get(v, WRONG) for v in range(max(numbers) + 1)), hint)

    def wrong_values(self, raw: np.ndarray) -> np.ndarray:
        """The values of a raw mask that mean nothing, sorted."""
        values = np.unique(raw)
        table = np.array(self.table)
        inside = (values >= 0) & (values < len(table))
        means = np.where(inside, table[np.where(inside, values, 0)], WRONG)
        return np.asarray(values[means == WRONG])

    def decode(self, raw: np.ndarray, file: str) -> np.ndarray:
        """Class numbers, `[height, width]` int64, of a raw mask.

        Args:
            raw: `[height, width]`, as `read_mask` gives it.
            file: said in the error.

        Raises:
            DataWrong: values that the table does not have.
        """
        raw = np.asarray(raw).astype(np.int64)
        table = np.array(self.table, dtype=np.int64)
        if raw.size and raw.min() >= 0 and raw.max() < len(table):
            mask = table[raw]
            if (mask != WRONG).all():
                return np.asarray(mask)
        wrong = self.wrong_values(raw)
        share = np.isin(raw, wrong).mean() if raw.size else 0.0
        raise DataWrong(
            f"{file} holds {_some(wrong)} ({share:.1%} of its pixels), where only "
            f"{self.allowed()} {'mean' if len(self.table) > 1 else 'means'} something"
            + (f". {self.hint}" if self.hint else "")
        )

    def allowed(self) -> str:
        """The values that a mask may hold, in words.

        >>> Coding.plain(3).allowed()
        '0..2 and 255'
        """
        values = [v for v, number in enumerate(self.table) if number != WRONG]
        starts = [v for v in values if v - 1 not in values]
        stops = [v for v in values if v + 1 not in values]
        runs = [f"{a}..{b}" if b > a else f"{a}" for a, b in zip(starts, stops, strict=True)]
        return " and ".join([", ".join(runs[:-1]), runs[-1]] if runs[:-1] else runs)


def read_picture(source: Path | bytes, file: str) -> Image.Image:
    """A picture in RGB, its pixels as they lie in the file (EXIF orientation is not applied).

    Args:
        source: a file, or its content.
        file: said in the error.

    Raises:
        DataWrong: not there, or no picture.
    """
    picture = _opened(source, file)[0]
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # which would copy it


def read_mask(source: Path | bytes, file: str) -> np.ndarray:
    """The numbers in a mask file, `[height, width]` int64, as they are.

    Raises:
        DataWrong: not there, no picture, colours, fractions or a lossy format.
    """
    image, stretch = _opened(source, file)
    if image.format in _LOSSY:
        raise DataWrong(
            f"{file} is a {image.format}: lossy formats change the numbers of classes at every "
            "border. Masks are PNG (or TIFF)"
        )
    if image.mode not in _WHOLE_NUMBERS:
        raise DataWrong(
            f"{file} is an image of mode {image.mode}, not of class numbers. A mask is a grey or "
            "palette PNG; one that was saved through RGB shows colours and has lost its numbers, "
            "so take the released file, or write numbers: Image.fromarray(mask.astype('uint8'))"
        )
    return np.asarray(image).astype(np.int64) // stretch


def check_sizes(image: Image.Image, mask: np.ndarray, picture_file: str, mask_file: str) -> None:
    """Refuse a mask of another size than its picture.

    Raises:
        DataWrong: naming both files and sizes.
    """
    height, width = mask.shape
    if image.size != (width, height):
        turned = image.size == (height, width)
        raise DataWrong(
            f"{picture_file} is {image.width} x {image.height} pixels, but its mask {mask_file} is "
            f"{width} x {height}; they must lie pixel on pixel"
            + (" (was one of them turned by its EXIF orientation?)" if turned else "")
        )


def _opened(source: Path | bytes, file: str) -> tuple[Image.Image, int]:
    """A picture, and what Pillow multiplied its greys by."""
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            stretch = 1
            if image.format == "PNG" and image.mode == "L" and image.tile:
                # how bits become greys is known before the pixels are read, and forgotten after
                stretch = {"L;2": 85, "L;4": 17}.get(str(image.tile[0].args), 1)
            image.load()
            return image, stretch
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNGs
        raise DataWrong(f"{file} cannot be read as a picture: {error}") from error


def _some(values: np.ndarray, n: int = 5) -> str:
    words = ", ".join(str(v) for v in values[:n])
    return words + (f" and {len(values) - n} more values" if len(values) > n else "")
