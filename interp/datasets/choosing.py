"""Some samples of a set, drawn with a seed.

Sets lie on disk in the order of their names: the first hundred pictures of Cityscapes are of one
city, those of ADE20K of a few kinds of rooms. Who wants fewer pictures than there are draws them.

>>> from interp.datasets import scenes
>>> few = drawn(scenes("test"), 3, seed=1)
>>> [sample.name for sample in few], len(few)
(['test/543', 'test/649', 'test/705'], 3)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from interp.datasets.base import Labelled, Pictures, Segmentation
from interp.errors import DataWrong


class Drawn(Pictures):
    """Some samples of a set, in the set's order; see `drawn`."""

    def __init__(self, data: Segmentation, indices: tuple[int, ...]) -> None:
        super().__init__(data.name, data.split, data.classes, data.colors, len(indices))
        self._data, self._indices = data, indices

    def read(self, index: int) -> Labelled:  # type: ignore[override]
        """The set's own sample."""
        return self._data[self._indices[index]]

    def identity(self, chosen: range) -> Iterator[bytes]:
        """Which samples, and what the set itself says."""
        yield repr([self._indices[i] for i in chosen]).encode()
        yield self._data.fingerprint().encode()


def drawn(data: Segmentation, n: int, seed: int = 0) -> Drawn:
    """`n` samples of a set, drawn without putting back.

    Args:
        data: any set.
        n: how many.
        seed: of the draw.

    Raises:
        DataWrong: more than there are.
    """
    if not 1 <= n <= len(data):
        raise DataWrong(f"{n} pictures asked of {data.name}, which has {len(data)}")
    order = np.random.default_rng(seed).permutation(len(data))[:n]
    return Drawn(data, tuple(sorted(map(int, order))))
