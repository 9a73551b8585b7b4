"""What probes are fitted on: image tokens, part by part.

A layerwise probe on a large set reads more states than any disk holds. So a solver never asks for
"the features"; it asks a *stream* for its numbered parts (a part is a batch of images), one after
the other and as often as it needs, and keeps what it makes of them. A stream gives the same parts
in every pass and in every process, so work can be shared out by part number.

`Held` is the stream of features that are in memory already.

>>> stream = Held({"adapter": torch.tensor([[0.0], [1.0], [4.0]])}, torch.tensor([0, 0, 1]),
...               ["sky", "sea"], tokens_a_part=2)
>>> stream.n_parts, [tokens.labels.tolist() for _, tokens in stream.read(range(2))]
(2, [[0, 0], [1]])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from interp.labels import IGNORE


@dataclass(frozen=True, eq=False)
class Tokens:
    """Image tokens of one part: the same tokens at every stage.

    Attributes:
        features: stage -> `[n, d]` floats.
        labels: `[n]` int64, 0..K-1 or `IGNORE`; on the features' device.
        shares: `[n, K]` float32, share of each class in the token, where labels are soft; rows add
            up to 1 (to 0 where the label is `IGNORE`). None where a token is all its label's.
    """

    features: Mapping[str, Tensor]
    labels: Tensor
    shares: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def labelled(self) -> Tokens:
        """The tokens that have a label."""
        keep = self.labels != IGNORE
        if bool(keep.all()):
            return self
        return Tokens(
            {stage: x[keep] for stage, x in self.features.items()},
            self.labels[keep],
            None if self.shares is None else self.shares[keep],
        )

    def targets(self, n_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """`[n, K]` share of each class: soft where they are, else one of them 1."""
        if self.shares is not None:
            return self.shares.to(dtype)
        return one_hot(self.labels, n_classes).to(dtype)


class TokenStream(Protocol):
    """Numbered parts that can be read again and again.

    Attributes:
        classes: names of the classes.
        widths: stage -> width of its features, in the order of the stages.
        n_parts: how many parts there are.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def widths(self) -> Mapping[str, int]: ...  # noqa: D102

    @property
    def n_parts(self) -> int: ...  # noqa: D102

    def read(self, parts: Iterable[int]) -> Iterator[tuple[int, Tokens]]:
        """The parts of these numbers, with their numbers, in the order given."""
        ...

    def labels(self, parts: Iterable[int]) -> Iterator[tuple[int, Tokens]]:
        """The same without features (and without running a model)."""
        ...


@dataclass(frozen=True, eq=False)
class Held:
    """Features that are in memory, as a stream.

    Attributes:
        features: stage -> `[n_tokens, d]`.
        token_labels: `[n_tokens]` int64, 0..K-1 or `IGNORE`.
        class_names: names of the classes.
        shares: `[n_tokens, K]` as in `Tokens`, or None.
        tokens_a_part: how many tokens make a part.
    """

    features: Mapping[str, Tensor]
    token_labels: Tensor
    class_names: Sequence[str]
    shares: Tensor | None = None
    tokens_a_part: int = 8192

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(self.class_names)

    @property
    def widths(self) -> Mapping[str, int]:
        """Stage -> width."""
        return {stage: int(x.shape[1]) for stage, x in self.features.items()}

    @property
    def n_parts(self) -> int:
        """How many parts."""
        return -(-len(self.token_labels) // self.tokens_a_part)

    def read(self, parts: Iterable[int]) -> Iterator[tuple[int, Tokens]]:
        """See `TokenStream`."""
        return ((part, self._part(part, self.features)) for part in parts)

    def labels(self, parts: Iterable[int]) -> Iterator[tuple[int, Tokens]]:
        """See `TokenStream`."""
        return ((part, self._part(part, {})) for part in parts)

    def _part(self, part: int, features: Mapping[str, Tensor]) -> Tokens:
        at = slice(part * self.tokens_a_part, (part + 1) * self.tokens_a_part)
        return Tokens(
            {stage: x[at] for stage, x in features.items()},
            self.token_labels[at],
            None if self.shares is None else self.shares[at],
        )
