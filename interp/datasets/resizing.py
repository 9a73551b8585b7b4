"""Every picture of a set in one size.

A study compares the same token positions over all pictures, so it needs pictures that give equal
grids of tokens. `resized` brings pictures (bicubic, which averages when it shrinks) and masks
(nearest neighbour, so that no class is made up between two others) to one size. It stretches: what
a picture's sides were to each other is lost.

>>> from interp.datasets import scenes
>>> small = resized(scenes("test", n=3), (40, 30))
>>> small[0].image.size, small[0].mask.shape, len(small), small.classes[0]
((40, 30), (30, 40), 3, 'sea')
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from interp.datasets.base import Pictures, Sample, Segmentation
from interp.errors import DataWrong


class Resized(Pictures):
    """A set with all pictures and masks in one size; see `resized`."""

    def __init__(self, data: Segmentation, size: tuple[int, int]) -> None:
        super().__init__(data.name, data.split, data.classes, data.colors, len(data))
        self._data, self.size = data, size

    def read(self, index: int) -> Sample:
        """Sample `index`, brought to size."""
        sample = self._data[index]
        # "I" holds 32 bits: no label is cut off on the way
        mask = Image.fromarray(np.asarray(sample.mask, dtype=np.int32))
        return Sample(
            sample.image.resize(self.size, Image.Resampling.BICUBIC),
            np.asarray(mask.resize(self.size, Image.Resampling.NEAREST)).astype(np.int64),
            sample.name,
        )

    def identity(self, chosen: range) -> Iterator[bytes]:
        """The size, and what the set itself says."""
        yield repr(self.size).encode()
        # a range's stop may be -1, which a slice would read as the last
        part = slice(chosen.start, chosen.stop if chosen.stop >= 0 else None, chosen.step)
        yield self._data[part].fingerprint().encode()


def resized(data: Segmentation, size: tuple[int, int]) -> Resized:
    """A set with every picture (bicubic) and mask (nearest) in one size.

    Args:
        data: any set.
        size: (width, height) in pixels.

    Raises:
        DataWrong: a size that is none.
    """
    if len(size) != 2 or any(int(side) != side or side < 1 for side in size):
        raise DataWrong(f"size={size!r}: give (width, height) in pixels")
    return Resized(data, (int(size[0]), int(size[1])))
