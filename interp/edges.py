"""Attention edges as data: who reads from whom.

An edge is a pair of sequence positions in one row of a batch. Information flows src -> dst: *src*
is the key (the token that is looked at), *dst* the query (the token that looks). An `EdgeSet` is a
set of such pairs, kept sparse and sorted, so that two sets built in different ways compare equal,
hash equal and print alike; a dense mask is made only where an edit needs one. In which layers and
heads edges are cut is no matter of the set but of the edit: `Knockout(edges, layers=, heads=)`.

Sets are made from the prompt (`x.edges(src="image", dst="last")`) or from a picture's tokens
(`x.grid.edges`, `x.grid.neighbours`), or from positions (`EdgeSet.of`, `between`, `from_mask`).
They combine with `|`, `&` and `-`; `where(mask)` keeps what a layer's mask leaves open.

Controls come from `random_like`: as many edges *per query* as the set itself, drawn from
candidates, since cutting three edges of a token that has five hurts more than cutting three of
eighty, whatever the edges carry; on request they also lie as far away (`match="distance"`) or carry
as much attention (`match="attention"`), see `interp.matching`.

>>> edges = EdgeSet.of([(0, 12, 40), (0, 13, 40)], n_batch=1, n_pos=64)   # (row, src, dst)
>>> edges
EdgeSet(2 edges, 1 query, 1 x 64 positions)
>>> (0, 12, 40) in edges
True
>>> len(edges - edges)
0
>>> control = edges.random_like(match="count", seed=0)     # two others that query 40 sees
>>> len(control), len(control & edges)
(2, 0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from interp.errors import EdgeError
from interp.matching import by_attention, by_count, by_distance
from interp.pairs import PairSet


@dataclass(frozen=True, eq=False, repr=False)
class EdgeSet(PairSet):
    """A set of attention edges (src -> dst) over a batch of sequences.

    `PairSet` has how it is made and combined; here is what it has to do with masks and patterns.
    """

    # -- a layer's mask and pattern --------------------------------------------------------------

    def where(self, mask: Tensor | np.ndarray) -> EdgeSet:
        """Only the edges that a mask leaves open, in every head if it has heads.

        Args:
            mask: bool, True = may attend, `[batch, dst, src]` or `[batch, head, dst, src]`, as
                `run["blocks.0.attn.hook_mask"]` has it; a batch of 1 stands for all rows.

        Raises:
            EdgeError: a mask of another kind or size.
        """
        dtype = str(mask.dtype).removeprefix("torch.")
        if dtype != "bool":
            raise EdgeError(f"a mask says True or False, not {dtype}; compare first (mask == 0?)")
        kept = np.ones(len(self), dtype=bool)
        for one in self._at(mask, "a mask"):
            kept &= one.astype(bool)
        return self.only(kept)

    def attention(self, pattern: Tensor | np.ndarray) -> np.ndarray:
        """Attention on each edge, `[n_edges]` float64: the mean over heads, if there are several.

        Args:
            pattern: `[batch, dst, src]` or `[batch, head, dst, src]`, as
                `run["blocks.0.attn.hook_pattern"]` has it; one head by `pattern[:, 3]`.

        Raises:
            EdgeError: a pattern of another size, or one that is NaN on an edge.
        """
        total, n_heads = np.zeros(len(self)), 0
        for one in self._at(pattern, "a pattern"):
            total += one
            n_heads += 1
        total /= n_heads
        if not np.isfinite(total).all():
            row, dst, src = self.table[~np.isfinite(total)][0]
            raise EdgeError(f"no number on edge src={src} -> dst={dst} in row {row} of the pattern")
        return total

    def mass(self, pattern: Tensor | np.ndarray) -> np.ndarray:
        """Attention on each query's edges together, `[n_queries]`, in the order of `queries`."""
        return np.bincount(self._query_number, self.attention(pattern), len(self.queries[0]))

    @property
    def _query_number(self) -> np.ndarray:
        """`[n_edges]`: which of `queries` each edge is of."""
        return np.repeat(np.arange(len(self.queries[1])), self.queries[1])

    def _at(self, values: Tensor | np.ndarray, what: str) -> Iterator[np.ndarray]:
        """The values on the edges, head by head: all heads together would be a large array."""
        shape = tuple(values.shape)
        square = (self.n_pos, self.n_pos)
        if len(shape) not in (3, 4) or shape[0] not in (1, self.n_batch) or shape[-2:] != square:
            raise EdgeError(
                f"{what} of shape {list(shape)} for {self!r}; [{self.n_batch}, {self.n_pos}, "
                f"{self.n_pos}] would do, or one with heads, [{self.n_batch}, head, ...]"
            )
        row = self.row if shape[0] == self.n_batch else np.zeros_like(self.row)
        at = [row.astype(np.int64), self.dst.astype(np.int64), self.src.astype(np.int64)]
        for head in [None] if len(shape) == 3 else range(shape[1]):
            one = values if head is None else values[:, head]
            if isinstance(one, Tensor):
                on_edges = one.detach()[tuple(torch.from_numpy(a).to(one.device) for a in at)]
                yield on_edges.double().cpu().numpy()
            else:
                yield np.asarray(one[tuple(at)], dtype=np.float64)

    # -- controls -------------------------------------------------------------------------------

    def random_like(
        self,
        candidates: EdgeSet | None = None,
        *,
        match: str = "count",
        seed: int = 0,
        mask: Tensor | np.ndarray | None = None,
        pattern: Tensor | np.ndarray | None = None,
        distance: Callable[[EdgeSet], np.ndarray] | None = None,
        tolerance: float | None = None,
        allow_fewer: bool = False,
    ) -> EdgeSet:
        """A control: per query as many edges as here, drawn from `candidates` without replacement.

        Args:
            candidates: edges to draw from, for instance every causally visible image token. By
                default all that the queries see, but for this set and for themselves. With
                "distance" and "attention" an edge of the set is never drawn, as the best stand-in
                for an edge is the edge itself; with "count" the candidates are taken as they come.
            match: "count" for any edges; "distance" for edges as long as the set's, with the
                smallest sum of deviations that there is; "attention" for edges that carry together,
                query by query, as nearly as exchanges of one for one can bring it what the set's
                carry.
            seed: of the draw; the same seed gives the same edges.
            mask: what the queries see, as in `where`, of which candidates are left out that it
                closes. Without it, of default candidates, a causal mask, which knows no padding;
                for "attention", where the pattern is above 0.
            pattern: for "attention", as in `attention`.
            distance: for "distance", lengths of edges, NaN for those that have none: for instance
                `x.grid.distance`, in cells. By default in positions, `|dst - src|`.
            tolerance: how far an edge's length may be from its match, by default 1; of a query's
                summed attention, by default 0.05.
            allow_fewer: leave out what cannot be had: of a query that has too few candidates take
                those there are, with "distance" leave out edges that nothing matches within the
                tolerance, and with "attention" queries that cannot be brought within it.

        Raises:
            EdgeError: what cannot be had, unless `allow_fewer`.

        Usage: `edges.random_like(match="distance", distance=x.grid.distance, mask=mask)`
        """
        if match not in ("count", "distance", "attention"):
            raise EdgeError(f"match={match!r}; there are 'count', 'distance' and 'attention'")
        for name, value, of in (
            ("pattern", pattern, "attention"),
            ("distance", distance, "distance"),
        ):
            if value is not None and match != of:
                raise EdgeError(f'{name} is for match="{of}", and this is match="{match}"')
        if match == "attention" and pattern is None:
            raise EdgeError('match="attention" needs the pattern: pattern=run["...hook_pattern"]')
        if tolerance is not None and (match == "count" or not tolerance >= 0):
            raise EdgeError(
                f"tolerance={tolerance} with match={match!r}; it is a number from 0, for "
                "'distance' or 'attention'"
            )
        if candidates is None:
            pool = self._visible(mask, pattern)
        else:
            self.same_batch(candidates)
            pool = candidates if mask is None else candidates.where(mask)
            pool = pool if match == "count" else pool - self
        queries, wanted = self.queries
        at = np.searchsorted(queries, pool.query_of)
        group = np.where(np.append(queries, -1)[at] == pool.query_of, at, -1)
        rng = np.random.default_rng(seed)
        within = ""
        if match == "count":
            chosen = by_count(wanted, group, rng)
        elif match == "distance":
            limit = 1.0 if tolerance is None else tolerance
            chosen = self._as_long(pool, group, distance, limit, rng)
            within = f" within {limit:g} of its edges' lengths"
        else:
            assert pattern is not None
            limit = 0.05 if tolerance is None else tolerance
            chosen = self._as_heavy(pool, group, pattern, limit, allow_fewer, rng)
        if len(chosen) < len(self) and not allow_fewer:
            got = np.bincount(group[chosen], minlength=len(queries))
            row, dst = divmod(int(queries[(got < wanted).argmax()]), self.n_pos)
            raise EdgeError(
                f"only {len(chosen)} candidate edges for a control of {len(self)}: some query has "
                f"fewer candidates than edges{within}, the first is position {dst} of row {row}; "
                f"widen the candidates{' or the tolerance' * bool(within)} or pass allow_fewer=True"
            )
        return EdgeSet(pool.table[chosen], self.n_batch, self.n_pos)

    def _as_long(
        self,
        pool: EdgeSet,
        group: np.ndarray,
        distance: Callable[[EdgeSet], np.ndarray] | None,
        limit: float,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Numbers of the edges of `pool` that are a control by distance."""
        own, others = (_lengths(edges, distance) for edges in (self, pool))
        if np.isnan(own).any():
            row, dst, src = self.table[np.isnan(own)][0]
            raise EdgeError(
                f"edge src={src} -> dst={dst} in row {row} has no length here, so nothing "
                "matches it; leave out distance to count in positions"
            )
        return by_distance(self._query_number, own, group, others, limit, rng)

    def _as_heavy(
        self,
        pool: EdgeSet,
        group: np.ndarray,
        pattern: Tensor | np.ndarray,
        limit: float,
        allow_fewer: bool,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Numbers of the edges of `pool` that are a control by attention."""
        queries, wanted = self.queries
        target, weight = self.mass(pattern), pool.attention(pattern)
        chosen = by_attention(wanted, target, group, weight, rng)
        sums = np.bincount(group[chosen], weight[chosen], len(queries))
        off = np.abs(sums - target)
        if allow_fewer:
            return chosen[(off <= limit)[group[chosen]]]
        # queries that lack candidates are another error, with other words
        off[np.bincount(group[chosen], minlength=len(queries)) < wanted] = 0
        if (off > limit).any():
            worst = int(off.argmax())
            row, dst = divmod(int(queries[worst]), self.n_pos)
            raise EdgeError(
                f"query {dst} of row {row} gives its edges {target[worst]:.3f} of its attention, "
                f"and the nearest control {sums[worst]:.3f}: farther apart than {limit:g}; widen "
                f"the candidates, or pass tolerance={np.ceil(off[worst] * 1e3) / 1e3:g} to take "
                "them as they are, or allow_fewer=True to leave such queries out"
            )
        return chosen

    def _visible(
        self, mask: Tensor | np.ndarray | None, pattern: Tensor | np.ndarray | None
    ) -> EdgeSet:
        """What this set's queries see, without this set and themselves."""
        row, dst = np.divmod(self.queries[0], self.n_pos)
        known = mask is not None or pattern is not None
        n_seen = np.full(len(dst), self.n_pos) if known else dst  # else all that comes before it
        table = np.empty((int(n_seen.sum()), 3), dtype=np.int32)
        table[:, 0], table[:, 1] = np.repeat(row, n_seen), np.repeat(dst, n_seen)
        table[:, 2] = np.arange(len(table)) - np.repeat(np.cumsum(n_seen) - n_seen, n_seen)
        seen = EdgeSet(table, self.n_batch, self.n_pos)
        if mask is not None:
            seen = seen.where(mask)
        elif pattern is not None:
            seen = seen.only(seen.attention(pattern) > 0)
        return seen.without_self() - self


def _lengths(edges: EdgeSet, distance: Callable[[EdgeSet], np.ndarray] | None) -> np.ndarray:
    if distance is None:
        return np.abs(edges.dst - edges.src).astype(np.float64)
    lengths = np.asarray(distance(edges), dtype=np.float64)
    if lengths.shape != (len(edges),):
        raise EdgeError(f"distance gave {list(lengths.shape)} for {len(edges)} edges")
    return lengths
