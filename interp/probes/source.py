"""Where the logistic solver gets its features from, and in what units.

A `Source` gives the features of S stages of one width in chunks [S, m, d], pass after pass.
They are in units near the standard ones (`interp.probes.units`). With them come the targets of
their tokens: labels or shares, and weights.

`Stack` is the source that is in memory. It is written once, in the pass that also takes its sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from interp.probes.units import Sums, wide

_FRAME = 4096  # tokens that units are taken from


@dataclass(frozen=True, eq=False)
class Targets:
    """What m tokens are: `index` [m] int64, or `shares` [m, K] where labels are soft.

    `weights` [m] are those of the tokens, None where all are 1.
    """

    index: Tensor | None = None
    shares: Tensor | None = None
    weights: Tensor | None = None

    def __getitem__(self, at: slice) -> Targets:
        return Targets(*(None if t is None else t[at] for t in self._all()))

    def only(self, seen: Tensor) -> Targets:
        """The same, with the classes of these sorted numbers counted from 0."""
        index = self.index
        if index is not None:
            index = torch.searchsorted(seen.to(index), index.contiguous())
        return Targets(
            index,
            None if self.shares is None else self.shares[:, seen.to(self.shares.device)],
            self.weights,
        )

    def to(self, like: Tensor) -> Targets:
        """The same, where `like` is and of its precision."""
        index, *floats = self._all()
        return Targets(
            None if index is None else index.to(like.device),
            *(None if t is None else t.to(like) for t in floats),
        )

    def _all(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.index, self.shares, self.weights

    def full(self, n_classes: int, dtype: torch.dtype) -> Tensor:
        """[m, K] weights of each class in each token."""
        if self.shares is not None:
            full = self.shares.to(dtype)
        else:
            assert self.index is not None
            full = one_hot(self.index, n_classes).to(dtype)
        return full if self.weights is None else full * self.weights.to(dtype)[:, None]

    def weigh(self, x: Tensor) -> Tensor:
        """Something [..., m] of each token times the token's weight."""
        return x if self.weights is None else x * self.weights

    def total(self) -> Tensor | int:
        """The sum of the weights."""
        if self.weights is not None:
            return self.weights.sum(dtype=wide(self.weights))
        some = self.index if self.shares is None else self.shares
        assert some is not None
        return len(some)

    def residual_(self, logp: Tensor) -> Tensor:
        """The loss [S] of log-probabilities [S, K, m], which become its derivative by the logits.

        The derivative is p - 1 at the token's class (p - share), times the token's weight.
        """
        if self.shares is not None:
            shares = self.weigh(self.shares.T)
            loss = -(logp * shares).sum((1, 2), dtype=wide(logp))
            residual = logp.exp_()
            if self.weights is not None:
                residual.mul_(self.weights)
            residual.sub_(shares)
            return loss
        assert self.index is not None
        index = self.index.expand(len(logp), 1, -1)
        loss = -self.weigh(logp.gather(1, index)).sum((1, 2), dtype=wide(logp))
        residual = logp.exp_()
        ones = residual.new_ones(1) if self.weights is None else self.weights
        if self.weights is not None:
            residual.mul_(self.weights)
        residual.scatter_add_(1, index, -ones.expand(index.shape))
        return loss


Chunks = Iterable[tuple[Tensor, Targets]]


class Source(Protocol):
    """Features of S stages of one width.

    Attributes:
        n_tokens: how many tokens there are, in all processes.
        dtype: what products are made in, float32 or float64.
    """

    @property
    def n_tokens(self) -> int: ...  # noqa: D102

    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102

    def chunks(self, stride: int = 1) -> Chunks:
        """One pass: features [S, m, d] and targets; of every `stride`-th token only."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the stages only (numbers among those that are left)."""
        ...


@dataclass(eq=False)
class Stack:
    """A source in memory: `z` [S, N, d] and its targets."""

    z: Tensor
    targets: Targets

    @classmethod
    def of(
        cls,
        features: Tensor | Sequence[Tensor],
        labels: Tensor | None,
        n_classes: int,
        *,
        shares: Tensor | None = None,
        weights: Tensor | None = None,
        rows: Tensor | None = None,
        names: Sequence[str] | None = None,
        overwrite: bool = False,
    ) -> tuple[Stack, Sums]:
        """Stack features, in units of their own, and sum them up: one pass.

        Args:
            features: as in `fit_logistic`.
            labels, n_classes, shares, weights: likewise, of the rows that are taken.
            rows: numbers of the rows to take; None for all.
            names: what an error calls the stages.
            overwrite: use the features' own memory.

        Raises:
            ValueError: see `fit_logistic`.
        """
        dtype = _dtype(features)
        n = len(features[0]) if rows is None else len(rows)
        device, width = features[0].device, features[0].shape[1]
        rows = None if rows is None else rows.to(device)
        like = torch.empty(0, dtype=dtype, device=device)
        targets = _targets(labels, n_classes, n, shares, weights).to(like)
        if overwrite and isinstance(features, Tensor):
            z = features
        else:
            z = like.new_empty(len(features), n, width)
        double = wide(z)
        shift, unit = (t.to(double) for t in _frame(features, rows, n, dtype))
        total = targets.total()
        y = z.new_zeros(n_classes, dtype=double)
        x, gram = z.new_zeros(len(z), width, dtype=double), z.new_zeros(len(z), width, width)
        cross = z.new_zeros(len(z), width, n_classes, dtype=double)
        for at in slices(n, chunk_size(z, n_classes)):
            for slot, states, zero, one in zip(z, features, shift, unit, strict=True):
                some = states[at] if rows is None else states[rows[at]]
                torch.sub(some, zero.to(dtype), out=slot[at]).mul_((1 / one).to(dtype))
            part, full = z[:, at], targets[at].full(n_classes, dtype)
            light = part.transpose(1, 2)
            heavy = targets[at].weigh(light)
            y += full.sum(0, dtype=double)
            x += heavy.sum(2)
            gram.baddbmm_(heavy, part)
            cross += light @ full
        broken = torch.nonzero(~torch.isfinite(x + shift).all(1)).flatten().tolist()
        if broken:
            if names is not None:
                raise ValueError(f"stage {names[broken[0]]!r} holds nan or infinite values")
            raise ValueError(f"features of stages {broken} hold nan or infinite values")
        taken = Sums(float(total), y, shift, unit, x, list(gram), list(cross), dtype)
        return cls(z, targets), taken

    @property
    def n_tokens(self) -> int:
        """See `Source`."""
        return self.z.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """See `Source`."""
        return self.z.dtype

    def chunks(self, stride: int = 1) -> Iterator[tuple[Tensor, Targets]]:
        """See `Source`."""
        every = slice(None, None, stride)
        z, targets = self.z[:, every], self.targets[every]
        for at in slices(z.shape[1], chunk_size(z)):
            yield z[:, at], targets[at]

    def keep(self, rows: Sequence[int]) -> None:
        """See `Source`."""
        # Close the gaps in place: a second copy of the features would not always fit.
        for to, source in enumerate(rows):
            if to != source:
                self.z[to].copy_(self.z[source])
        self.z = self.z[: len(rows)]


def slices(n: int, size: int) -> Iterator[slice]:
    """0..n in pieces of one size."""
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def chunk_size(z: Tensor, n_classes: int = 1) -> int:
    """Tokens of [S, n, d] at a time: on a CPU, what its cache holds of one stage."""
    if z.device.type == "cpu":
        return min(8192, max(256, 2**18 // z.shape[2]))
    return min(2**16, max(1024, 2**28 // (len(z) * (z.shape[2] + n_classes))))


def _dtype(features: Tensor | Sequence[Tensor]) -> torch.dtype:
    good = (torch.float32, torch.float64)
    if not isinstance(features, Tensor):
        return features[0].dtype if features[0].dtype in good else torch.float32
    first = features
    if first.ndim != 3 or first.dtype not in good:
        raise ValueError(
            "features must be [stages, tokens, width] in float32 or float64, "
            f"got {list(first.shape)} {first.dtype}"
        )
    return first.dtype


def _targets(
    labels: Tensor | None, k: int, n: int, shares: Tensor | None, weights: Tensor | None
) -> Targets:
    if n == 0 or (labels is not None and labels.shape != (n,)):
        got = "none" if labels is None else list(labels.shape)
        raise ValueError(f"labels must be [{n}], one a token and at least one, got {got}")
    if shares is not None:
        if shares.shape != (n, k) or not bool((shares >= 0).all()):
            raise ValueError(
                f"shares must be [{n}, {k}] and not negative, got {list(shares.shape)}"
            )
        off = float((shares.double().sum(1) - 1).abs().max())
        if not off < 1e-4:
            raise ValueError(f"shares of a token must add up to 1; one is off by {off:.1g}")
    elif labels is None:
        raise ValueError("neither labels nor shares: a probe needs to know what tokens are")
    elif not 0 <= int(labels.min()) <= int(labels.max()) < k:
        raise ValueError(f"labels must be 0..{k - 1}, got {int(labels.min())}..{int(labels.max())}")
    if weights is not None and not (
        weights.shape == (n,) and bool(((weights > 0) & weights.isfinite()).all())
    ):
        raise ValueError(
            f"weights must be [{n}] and positive; got {list(weights.shape)}, least "
            f"{float(weights.min())}. To leave a token out, drop it"
        )
    return Targets(
        labels.long() if labels is not None and shares is None else None, shares, weights
    )


def _frame(
    features: Tensor | Sequence[Tensor], rows: Tensor | None, n: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Shift and unit [S, d] from tokens that are spread over all."""
    at = torch.arange(0, n, max(1, n // _FRAME), device=features[0].device)
    at = at if rows is None else rows[at]
    shifts, units = [], []
    for states in features:
        some = states[at]
        some = some.to(wide(some))
        shift = some.mean(0)
        spread = (some - shift).square().mean(0).sqrt()
        # a power of two: dividing by it is exact
        units.append(torch.exp2(torch.where(spread > 0, spread.log2().round(), 0.0)))
        shifts.append(shift.to(dtype))
    return torch.stack(shifts), torch.stack(units)
