"""Pictures made ready for a model, batch by batch, with the labels of their image tokens.

A *part* is a batch of pictures: what the model takes, their masks, and for each image token its
label, how pure it is, and perhaps the share of each class. `DataParts` prepares the parts of a
dataset as they are asked for, the next one in a thread while somebody works on this one. Which
pictures stand in which part depends on the dataset, the batch size and the seed alone, never on how
many processes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from interp.inputs import Inputs
from interp.labels import IGNORE
from interp.model import MLLM

QUESTION = "What is in the picture?"
T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True, eq=False)
class Part:
    """Prepared pictures and the labels of their image tokens.

    Attributes:
        number: of the part.
        x: model inputs; where a family looks at a picture several times, the finest look.
        masks: one `[height, width]` a picture, in its own size.
        names: of the pictures.
        labels: `[n_tokens]` int64 majority class, `IGNORE` where nothing is labelled.
        purity: `[n_tokens]` share of the majority class among a token's labelled pixels.
        shares: `[n_tokens, K]` share of each class, or None where they were not kept.
    """

    number: int
    x: Inputs
    masks: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    labels: np.ndarray
    purity: np.ndarray
    shares: np.ndarray | None = None

    @classmethod
    def of(cls, number: int, model: MLLM, samples: list[Any], question: str, n: int) -> Part:
        """Prepare some samples with `n` classes.

        Raises:
            ValueError: a mask of another size than its picture, or with a class that there is not.
        """
        x = model.prepare([sample.image for sample in samples], question).select("finest")
        masks = tuple(sample.mask for sample in samples)
        shares = x.grid.fractions(masks, n)
        some = shares.any(1)
        labels = np.where(some, shares.argmax(1), IGNORE).astype(np.int64)
        names = tuple(sample.name for sample in samples)
        return cls(number, x, masks, names, labels, shares.max(1), shares)


class Parts(Protocol):
    """Prepared pictures in numbered parts."""

    @property
    def classes(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def n_parts(self) -> int: ...  # noqa: D102

    def parts(self, numbers: Iterable[int]) -> Iterator[Part]:
        """The parts of these numbers, in the order given."""
        ...


class DataParts:
    """The pictures of a dataset, prepared for a model when they are asked for.

    Attributes:
        n: how many pictures are read.
        batch_size: pictures in a part; the last one may have fewer.
    """

    def __init__(
        self,
        model: MLLM,
        data: Any,
        n: int | None = None,
        *,
        question: str = QUESTION,
        batch_size: int = 8,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        """Say what to read; nothing is opened yet.

        Args:
            model: for which pictures are prepared.
            data: a dataset of `interp.datasets`.
            n: the first so many pictures (of the shuffled ones, with `shuffle`); all if None.
            question: the prompt; image tokens precede it in most families.
            batch_size: pictures in a part.
            shuffle: in an order drawn with the seed.
            seed: of that order.

        Raises:
            ValueError: no picture, fewer pictures than `n`, or a batch size below 1.
        """
        if n is not None and not 1 <= n <= len(data):
            raise ValueError(f"{n} pictures asked of {data.name}, which has {len(data)}")
        if not len(data) or batch_size < 1:
            raise ValueError(f"{len(data)} pictures in batches of {batch_size}: at least 1 of each")
        self.n = len(data) if n is None else n
        self.batch_size = batch_size
        self._model, self._data, self._question = model, data, question
        order = np.random.default_rng(seed).permutation(len(data)) if shuffle else range(len(data))
        self._order = list(map(int, order))[: self.n]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(self._data.classes)

    @property
    def n_parts(self) -> int:
        """How many parts."""
        return -(-self.n // self.batch_size)

    def pictures(self, part: int) -> list[int]:
        """Which pictures of the dataset stand in a part."""
        return self._order[part * self.batch_size : (part + 1) * self.batch_size]

    def parts(self, numbers: Iterable[int]) -> Iterator[Part]:
        """See `Parts`; prepared ahead."""
        return ahead(self._prepare, numbers)

    def _prepare(self, number: int) -> Part:
        samples = [self._data[i] for i in self.pictures(number)]
        return Part.of(number, self._model, samples, self._question, len(self.classes))


def ahead(make: Callable[[S], T], of: Iterable[S], depth: int = 2) -> Iterator[T]:
    """`map(make, of)`, made by a thread up to `depth` ahead of who asks.

    One thread: tokenizers must not be used by two. An error is raised where its result is asked.

    >>> list(ahead(lambda n: n * n, range(4)))
    [0, 1, 4, 9]
    """
    waiting: list[Future[T]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        try:
            for one in of:
                waiting.append(thread.submit(make, one))
                if len(waiting) > depth:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
