"""Sufficient statistics: all that least squares needs to know of any number of tokens.

For features X `[n, d]` and targets Y `[n, K]` (the share of each class in a token) the ridge
solution needs X'X, X'Y, the sums of both, and nothing else. These are sums over tokens. So they
add up over batches, files and machines, they take the same room for a thousand tokens as for ten
million, and PCA, standardisation and the error on held-out tokens come from them as well.

Sums of squares of states cancel badly: a few features of a language model have a mean a thousand
times their spread. So sums are taken of z = (x - shift) / unit, with a shift near the mean and a
unit near the spread, both fixed beforehand from one part of the stream (`Frame`). Products are made
in float32 (relative error about 1e-7 of a feature's variance, since z is of order one) or, with
`precise`, in float64; everything that is added up is float64.

A *shard* is some consecutive parts. Floating-point sums depend on their order, so shards are added
by a binary tree over their numbers: (0 + 1) + (2 + 3), whoever made them and in whatever order they
come. `Pile` is that tree; two piles with different shards merge, and the total has the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from interp.probes.stream import Tokens
from interp.world import World


@dataclass(frozen=True, eq=False)
class Frame:
    """The units in which sums are taken: z = (x - shift) / unit.

    Attributes:
        shift: stage -> `[d]` float64, near the mean, exact in float32.
        unit: stage -> `[d]` float64, a power of two near the spread, so that dividing is exact.
    """

    shift: Mapping[str, Tensor]
    unit: Mapping[str, Tensor]

    @classmethod
    def of(cls, tokens: Tokens) -> Frame:
        """The frame of some tokens, labelled or not.

        Raises:
            ValueError: no token, or nan or infinite values, naming the stage.
        """
        if not len(tokens):
            raise ValueError("the first part of the stream has no token to take units from")
        shift, unit = {}, {}
        for stage, x in tokens.features.items():
            wide = x.double()
            mean = wide.mean(0)
            # a number of float32's, so that subtracting it from float32 states rounds nothing more
            shift[stage] = mean.float().double()
            spread = (wide - mean).square().mean(0).sqrt()
            # what does not vary has no unit: one of the size of rounding would make noise of it
            varies = spread > 1e-12 * mean.abs()
            exponent = torch.where(varies, spread.log2().round(), 0.0)
            unit[stage] = torch.exp2(exponent)
            if not bool(torch.isfinite(shift[stage] + unit[stage]).all()):
                raise ValueError(f"stage {stage!r} holds nan or infinite values")
        return cls(shift, unit)

    def cpu(self) -> Frame:
        """The same in main memory."""
        if all(shift.device.type == "cpu" for shift in self.shift.values()):
            return self
        return Frame(*({k: v.cpu() for k, v in part.items()} for part in (self.shift, self.unit)))

    def same(self, other: Frame) -> bool:
        """Whether sums in the other frame can be added to sums in this one."""
        return self is other or (
            list(self.shift) == list(other.shift)
            and all(
                torch.equal(mine[stage], theirs[stage])
                for mine, theirs in ((self.shift, other.shift), (self.unit, other.unit))
                for stage in mine
            )
        )

    def shared(self, world: World) -> Frame:
        """The first process's frame, in all of them."""
        world.from_first_(*self.shift.values(), *self.unit.values())
        return self


@dataclass(eq=False)
class Moments:
    """Sums over weighted tokens, float64, in the units of a frame.

    Attributes:
        frame: the units.
        n: `[2]` weights and tokens.
        y: `[T]` targets.
        yy: `[T]` squares of the targets.
        x: stage -> `[d]`.
        xx: stage -> `[d, d]`.
        xy: stage -> `[d, T]`.
    """

    frame: Frame
    n: Tensor
    y: Tensor
    yy: Tensor
    x: dict[str, Tensor]
    xx: dict[str, Tensor]
    xy: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        tokens: Tokens,
        targets: Tensor,
        frame: Frame,
        *,
        weights: Tensor | None = None,
        precise: bool = False,
    ) -> Moments:
        """The sums of some labelled tokens.

        Args:
            tokens: without ignored ones.
            targets: `[n, T]`.
            frame: the units.
            weights: `[n]`, of the tokens; all 1 if None.
            precise: products in float64.

        Raises:
            ValueError: nan or infinite features, naming the stage.
        """
        dtype = torch.float64 if precise else torch.float32
        y = targets.to(dtype)
        weighted = y if weights is None else y * weights.to(dtype)[:, None]
        total = (
            torch.tensor(len(tokens), dtype=torch.float64)
            if weights is None
            else weights.sum(dtype=torch.float64)
        )
        n = torch.stack([total.to(y.device), total.new_full((), len(tokens)).to(y.device)])
        x, xx, xy = {}, {}, {}
        for stage, states in tokens.features.items():
            wide = precise or states.dtype == torch.float64
            z = states.double() if wide else states.float()
            # one over a power of two is exact, and multiplying is quicker
            z = (z - frame.shift[stage].to(z.dtype)).mul_(
                frame.unit[stage].reciprocal().to(z.dtype)
            )
            z = z.to(dtype)
            # a model may be spread over devices, and its stages with it
            heavy = z if weights is None else z * weights.to(z)[:, None]
            x[stage] = heavy.sum(0).double()
            xx[stage] = _symmetric(heavy, z).double()
            xy[stage] = (z.T @ weighted.to(z.device)).double()
            if not bool(torch.isfinite(x[stage]).all()):
                raise ValueError(f"stage {stage!r} holds nan or infinite values")
        return cls(
            frame,
            n,
            weighted.sum(0, dtype=torch.float64),
            (weighted * y).sum(0, dtype=torch.float64),
            x,
            xx,
            xy,
        )

    def add_(self, other: Moments) -> Moments:
        """Add other sums of the same frame to these, in place."""
        self._require(other)
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine += theirs
        return self

    def __add__(self, other: Moments) -> Moments:
        self._require(other)
        return self.like(a + b for a, b in zip(self.tensors(), other.tensors(), strict=True))

    def _require(self, other: Moments) -> None:
        if not self.frame.same(other.frame):
            raise ValueError("sums that were taken in different frames do not add up")

    def tensors(self) -> list[Tensor]:
        """Every sum, in a fixed order."""
        per_stage = [part[stage] for stage in self.x for part in (self.x, self.xx, self.xy)]
        return [self.n, self.y, self.yy, *per_stage]

    def like(self, tensors: Iterable[Tensor]) -> Moments:
        """Moments of the same stages made of other sums, in the order of `tensors`."""
        n, y, yy, *rest = tensors
        stages = list(self.x)
        x, xx, xy = (dict(zip(stages, rest[i::3], strict=True)) for i in range(3))
        return Moments(self.frame, n, y, yy, x, xx, xy)

    def cpu(self) -> Moments:
        """The same in main memory, with their frame."""
        there = self.like(tensor.cpu() for tensor in self.tensors())
        there.frame = self.frame.cpu()
        return there

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        return sum(tensor.nbytes for tensor in self.tensors())


def _symmetric(a: Tensor, b: Tensor) -> Tensor:
    """a'b `[d, d]` where that is known to be symmetric: what lies below the diagonal is copied."""
    d = a.shape[1]
    if d < 512:
        return a.T @ b
    half = d // 2
    out = a.new_empty(d, d)
    out[:half, :half] = _symmetric(a[:, :half], b[:, :half])
    out[half:, half:] = _symmetric(a[:, half:], b[:, half:])
    out[:half, half:] = a[:, :half].T @ b[:, half:]
    out[half:, :half] = out[:half, half:].T
    return out


class Pile:
    """Sums of numbered shards, added up by a binary tree over their numbers.

    A node (level, k) holds the sum of the shards k * 2**level and following, once all of them are
    there. It is made from its two children alone, so what it holds does not depend on the order in
    which shards came, nor on who added them up. At most one node a level waits for its neighbour
    when shards come in order.
    """

    def __init__(self, n_shards: int) -> None:
        if n_shards < 1:
            raise ValueError(f"{n_shards} shards; at least one would do")
        self.n_shards = n_shards
        self._nodes: dict[tuple[int, int], Moments] = {}

    def add(self, shard: int, sums: Moments) -> None:
        """Add one shard.

        Raises:
            ValueError: a number that there is not, or one that is there already.
        """
        if not 0 <= shard < self.n_shards:
            raise ValueError(f"shard {shard} of {self.n_shards}; they are counted from 0")
        self.put(0, shard, sums)

    def put(self, level: int, k: int, sums: Moments) -> None:
        """Add a whole node: the sum of 2**level shards."""
        if taken := self.shards & set(self._leaves(level, k)):
            raise ValueError(f"shards {sorted(taken)} are in the pile already")
        while True:
            if self._width(level) == 1:
                break  # the root
            other = self._nodes.pop((level, k ^ 1), None)
            alone = (k ^ 1) >= self._width(level)  # the last node of an odd level goes up as it is
            if other is None and not alone:
                break
            if other is not None:
                sums = other + sums if k & 1 else sums + other
            level, k = level + 1, k >> 1
        self._nodes[level, k] = sums

    def merge(self, other: Pile) -> Pile:
        """Add another pile's shards to this one, and return it.

        Raises:
            ValueError: another number of shards, or the same shard twice.
        """
        if other.n_shards != self.n_shards:
            raise ValueError(f"piles of {self.n_shards} and of {other.n_shards} shards")
        for level, k, sums in other.nodes():
            self.put(level, k, sums)
        return self

    def nodes(self) -> Iterator[tuple[int, int, Moments]]:
        """What the pile holds: (level, number, sums)."""
        return ((level, k, sums) for (level, k), sums in sorted(self._nodes.items(), key=_place))

    @property
    def shards(self) -> set[int]:
        """The numbers of the shards that are in it."""
        return {leaf for level, k in self._nodes for leaf in self._leaves(level, k)}

    def total(self) -> Moments:
        """The sum of all shards.

        Raises:
            ValueError: shards are missing; it names them.
        """
        if missing := sorted(set(range(self.n_shards)) - self.shards):
            few = ", ".join(map(str, missing[:10]))
            raise ValueError(f"{len(missing)} of {self.n_shards} shards are missing: {few}")
        return next(iter(self._nodes.values()))

    def gather(self, world: World, like: Moments) -> None:
        """In the first process: add what all others hold. They must hold `world.share`'s shards.

        Args:
            world: all processes.
            like: any moments of the same shapes.
        """
        if world.size == 1:
            return
        for rank in range(1, world.size):
            shadow = Pile(self.n_shards)  # which nodes that process holds, without asking it
            for shard in World(rank, world.size).share(range(self.n_shards)):
                shadow.put(0, shard, like.like(t.new_zeros(1) for t in like.tensors()))
            if world.rank not in (0, rank):
                continue
            for level, k, _ in shadow.nodes():
                held = self._nodes[level, k] if world.rank == rank else like
                sent = [world.to_first(t, rank) for t in held.tensors()]
                if world.first:
                    self.put(level, k, like.like(sent))

    def _width(self, level: int) -> int:
        return -(-self.n_shards // 2**level)

    def _leaves(self, level: int, k: int) -> range:
        return range(k << level, min((k + 1) << level, self.n_shards))


def _place(node: tuple[tuple[int, int], Moments]) -> tuple[int, int]:
    (level, k), _ = node
    return k << level, level
