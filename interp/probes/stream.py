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
from interp.world import World


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
            {stage: x[keep.to(x.device)] for stage, x in self.features.items()},
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


def label_counts(stream: TokenStream, world: World | None = None) -> Tensor:
    """`[K]` float64: tokens of each class (soft shares added up), from a pass over the labels."""
    world = world or World()
    counts = torch.zeros(len(stream.classes), dtype=torch.float64)
    for _, tokens in stream.labels(world.share(range(stream.n_parts))):
        counts += tokens.labelled().targets(len(counts), torch.float64).sum(0).cpu()
    world.sum_(counts)
    return counts


def draw_labels(often: Tensor, n: int, seed: int, part: int) -> Tensor:
    """`[n]` int64 labels drawn by frequency; the same in every process and pass.

    Args:
        often: `[K]` weights of the classes.
        n: how many.
        seed, part: what the draw depends on.
    """
    if n == 0:
        return torch.zeros(0, dtype=torch.int64)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + part) % 2**63)
    return torch.multinomial(often, n, replacement=True, generator=generator)


class Shuffled:
    """A stream whose tokens have labels drawn from the whole set: the shuffled-label control.

    Drawn by frequency, not moved about within a part: a batch of pictures has frequencies of its
    own, which its states tell. Tokens without a label stay without.
    """

    def __init__(self, stream: TokenStream, often: Tensor, seed: int = 0) -> None:
        """Args: the stream, `[K]` how often each class is (`label_counts`), and a seed."""
        self._stream, self._often, self._seed = stream, often, seed

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self._stream.classes

    @property
    def widths(self) -> Mapping[str, int]:
        """Stage -> width."""
        return self._stream.widths

    @property
    def n_parts(self) -> int:
        """How many parts."""
        return self._stream.n_parts

    def read(self, parts: Iterable[int]) -> Iterator[tuple[int, Tokens]]:
        """See `TokenStream`."""
        return ((part, self._drawn(part, tokens)) for part, tokens in self._stream.read(parts))

    def labels(self, parts: Iterable[int]) -> Iterator[tuple[int, Tokens]]:
        """See `TokenStream`."""
        return ((part, self._drawn(part, tokens)) for part, tokens in self._stream.labels(parts))

    def _drawn(self, part: int, tokens: Tokens) -> Tokens:
        drawn = draw_labels(self._often, len(tokens), self._seed, part).to(tokens.labels)
        return Tokens(tokens.features, torch.where(tokens.labels == IGNORE, IGNORE, drawn))
