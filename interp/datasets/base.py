"""What a dataset is here: a lazy sequence of pictures, each with a mask and a name.

`Segmentation` says what the rest of the library asks of one, and nothing else; `Pictures` is the
base of those that read files. Its samples are read when indexed, in a fixed order, so a set takes
no memory, two machines see the same sample 17, and a slice (`data[:100]`, again such a set) costs
nothing. Sets pickle, so a `DataLoader` with workers may index them.

Masks hold class numbers 0 .. K - 1 and `IGNORE` (255) in the picture's own size.

>>> from interp.datasets import scenes
>>> data: Segmentation = scenes("test")
>>> data.name, len(data), data[:2][1].name
('scenes', 1000, 'test/1')
"""

from __future__ import annotations

import copy
import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, overload

import numpy as np
from PIL import Image

from interp.datasets.palettes import Color


class Labelled(Protocol):
    """A picture with its mask; `Sample` and `Scene` are such."""

    @property
    def image(self) -> Image.Image:
        """The picture, RGB."""

    @property
    def mask(self) -> np.ndarray:
        """`[height, width]` whole numbers: class numbers and `IGNORE`, in the picture's size."""

    @property
    def name(self) -> str:
        """Unique in its set."""


class Segmentation(Protocol):
    """A sequence of labelled pictures."""

    @property
    def name(self) -> str:
        """Which set, such as "ade20k"."""

    @property
    def split(self) -> str:
        """Which part of it; empty if it has no parts."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by class number."""

    @property
    def colors(self) -> tuple[Color, ...]:
        """RGB colours, 0 to 255, to display classes with."""

    def __len__(self) -> int: ...

    @overload
    def __getitem__(self, index: int) -> Labelled: ...
    @overload
    def __getitem__(self, index: slice) -> Segmentation: ...

    def __iter__(self) -> Iterator[Labelled]: ...

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what the set is: its recipe, names, order and a part of its content."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One labelled picture."""

    image: Image.Image
    """The picture, RGB."""
    mask: np.ndarray
    """`[height, width]` int64: class numbers and `IGNORE`."""
    name: str
    """Unique in its set."""


class Pictures(Sequence[Sample]):
    """Base of sets that are read when indexed. A slice is again one, and reads nothing.

    A set of another kind gives `read` and `identity`; what they need must pickle.

    Attributes:
        name: of the set.
        split: of the set; empty if it has none.
        classes: names by class number.
        colors: RGB by class number.
    """

    def __init__(
        self,
        name: str,
        split: str,
        classes: tuple[str, ...],
        colors: tuple[Color, ...],
        length: int,
    ) -> None:
        self.name, self.split, self.classes, self.colors = name, split, classes, colors
        self._chosen = range(length)

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Sample `index` of the whole set, whatever slice this is."""

    @abstractmethod
    def identity(self, chosen: range) -> Iterator[bytes]:
        """What tells this slice of the set from others; no path of the machine."""

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            part = copy.copy(self)
            part._chosen = self._chosen[index]
            return part
        return self.read(self._chosen[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(index) for index in self._chosen)

    def __repr__(self) -> str:
        split = f"split={self.split!r}, " if self.split else ""
        return f"{self.name}({split}{len(self)} pictures, {len(self.classes)} classes)"

    def fingerprint(self) -> str:
        """SHA-256 (hex) of kind, split, classes and number of samples, and of `identity`."""
        head = repr((self.name, self.split, self.classes, len(self)))
        digest = hashlib.sha256(head.encode())
        for part in self.identity(self._chosen):
            # the length first, so that no two lists of parts run together into the same bytes
            digest.update(f"{len(part)}:".encode())
            digest.update(part)
        return digest.hexdigest()


def spread(length: int, n: int) -> list[int]:
    """At most `n` indices, evenly spread over a sequence, the first and the last among them.

    >>> spread(100, 3), spread(2, 5), spread(0, 3)
    ([0, 50, 99], [0, 1], [])
    """
    if length <= n:
        return list(range(length))
    return [int(index) for index in np.linspace(0, length - 1, n).round()]
