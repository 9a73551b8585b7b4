"""Attention edges as data: who reads from whom.

An edge is a pair of sequence positions in one row of a batch. Information flows src -> dst: *src*
is the key (the token that is looked at), *dst* the query (the token that looks). An `EdgeSet` is a
set of such pairs, kept sparse and sorted, so that two sets built in different ways compare equal,
hash equal and print alike; a dense mask is made only where an edit needs one.

Sets combine with `|`, `&` and `-`. Controls come from `random_like`: as many edges *per query* as
the set itself, drawn from candidates, since cutting three edges of a token that has five hurts
more than cutting three of eighty, whatever the edges carry.

>>> edges = EdgeSet.of([(0, 12, 40), (0, 13, 40)], n_batch=1, n_pos=64)   # (row, src, dst)
>>> edges
EdgeSet(2 edges, 1 query, 1 x 64 positions)
>>> len(edges - edges)
0
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.errors import EdgeError


@dataclass(frozen=True, eq=False, repr=False)
class EdgeSet:
    """A set of attention edges (src -> dst) over a batch of sequences.

    Attributes:
        table: int32 `[n_edges, 3]`, columns (row of the batch, dst, src), sorted, without doubles,
            read-only.
        n_batch: rows of the batch.
        n_pos: positions of the sequence.

    Raises:
        EdgeError: a row or position outside the batch.
    """

    table: np.ndarray
    n_batch: int
    n_pos: int

    def __post_init__(self) -> None:
        table = np.asarray(self.table)
        if table.size and (table.ndim != 2 or table.shape[1] != 3 or table.dtype.kind not in "iu"):
            raise EdgeError(
                f"a table of edges is whole numbers [n_edges, 3], not {table.dtype} "
                f"{list(table.shape)}"
            )
        table = table.astype(np.int64).reshape(-1, 3)
        if len(table):
            low, high = table.min(0), table.max(0)
            if low.min() < 0 or high[0] >= self.n_batch or high[1:].max() >= self.n_pos:
                bad = table[
                    (table < 0).any(1)
                    | (table[:, 0] >= self.n_batch)
                    | (table[:, 1:] >= self.n_pos).any(1)
                ][0]
                raise EdgeError(
                    f"edge src={bad[2]} -> dst={bad[1]} in row {bad[0]} is out of range: this "
                    f"batch has rows 0..{self.n_batch - 1} and positions 0..{self.n_pos - 1}"
                )
        flat = (table[:, 0] * self.n_pos + table[:, 1]) * self.n_pos + table[:, 2]
        flat = np.unique(flat)
        rest, src = np.divmod(flat, self.n_pos)
        row, dst = np.divmod(rest, self.n_pos)
        table = np.stack([row, dst, src], axis=1).astype(np.int32)
        table.flags.writeable = False
        object.__setattr__(self, "table", table)

    # -- making one ----------------------------------------------------------------------------

    @classmethod
    def of(cls, edges: Iterable[tuple[int, int, int]], n_batch: int, n_pos: int) -> EdgeSet:
        """From (row, src, dst) triples, in the order in which one says them."""
        triples = np.array(list(edges))
        if triples.ndim == 2 and triples.shape[1] == 3:
            triples = triples[:, [0, 2, 1]]
        return cls(triples, n_batch, n_pos)  # which refuses any other shape

    @classmethod
    def from_mask(cls, mask: Tensor | np.ndarray) -> EdgeSet:
        """From a boolean `[batch, dst, src]`, True where there is an edge."""
        array = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
        if array.dtype != np.bool_ or array.ndim != 3 or array.shape[1] != array.shape[2]:
            raise EdgeError(
                f"edges come from a bool mask [batch, dst, src], not from {array.dtype} "
                f"{list(array.shape)}"
            )
        return cls(np.argwhere(array), array.shape[0], array.shape[1])

    def to_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """Dense boolean `[batch, dst, src]`, True on the edges."""
        mask = torch.zeros(self.n_batch, self.n_pos, self.n_pos, dtype=torch.bool)
        row, dst, src = torch.from_numpy(self.table.astype(np.int64)).unbind(1)
        mask[row, dst, src] = True
        return mask.to(device)

    # -- looking at it --------------------------------------------------------------------------

    @property
    def row(self) -> np.ndarray:
        """Row of the batch of each edge, `[n_edges]`."""
        return self.table[:, 0]

    @property
    def dst(self) -> np.ndarray:
        """Query position of each edge, `[n_edges]`."""
        return self.table[:, 1]

    @property
    def src(self) -> np.ndarray:
        """Key position of each edge, `[n_edges]`."""
        return self.table[:, 2]

    @cached_property
    def queries(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct queries as `row * n_pos + dst`, and how many edges each has."""
        ids = self.row.astype(np.int64) * self.n_pos + self.dst
        found, counts = np.unique(ids, return_counts=True)
        return found, counts

    def __len__(self) -> int:
        return len(self.table)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EdgeSet):
            return NotImplemented
        return (
            self.n_batch == other.n_batch
            and self.n_pos == other.n_pos
            and np.array_equal(self.table, other.table)
        )

    def __hash__(self) -> int:
        return hash((self.n_batch, self.n_pos, self.table.tobytes()))

    def __repr__(self) -> str:
        n, q = len(self), len(self.queries[0])
        return (
            f"EdgeSet({n} edge{'s' * (n != 1)}, {q} quer{'ies' if q != 1 else 'y'}, "
            f"{self.n_batch} x {self.n_pos} positions)"
        )

    # -- combining ------------------------------------------------------------------------------

    def __or__(self, other: EdgeSet) -> EdgeSet:
        self._same_batch(other)
        return EdgeSet(np.concatenate([self.table, other.table]), self.n_batch, self.n_pos)

    def __and__(self, other: EdgeSet) -> EdgeSet:
        self._same_batch(other)
        return EdgeSet(self.table[np.isin(self._ids, other._ids)], self.n_batch, self.n_pos)

    def __sub__(self, other: EdgeSet) -> EdgeSet:
        self._same_batch(other)
        return EdgeSet(self.table[~np.isin(self._ids, other._ids)], self.n_batch, self.n_pos)

    @property
    def _ids(self) -> np.ndarray:
        row, dst, src = self.table.astype(np.int64).T
        return (row * self.n_pos + dst) * self.n_pos + src

    def _same_batch(self, other: EdgeSet) -> None:
        if (self.n_batch, self.n_pos) != (other.n_batch, other.n_pos):
            raise EdgeError(f"{self!r} and {other!r} are edges of different batches")

    def causal(self) -> EdgeSet:
        """Only the edges a causal mask leaves open (src <= dst)."""
        return EdgeSet(self.table[self.src <= self.dst], self.n_batch, self.n_pos)

    def random_like(
        self, candidates: EdgeSet, *, seed: int = 0, allow_fewer: bool = False
    ) -> EdgeSet:
        """A control: per query as many edges as here, drawn from `candidates` without replacement.

        Args:
            candidates: edges to draw from, for instance every causally visible image token.
            seed: of the draw; the same seed gives the same edges.
            allow_fewer: take all candidates of a query that has fewer than needed.

        Raises:
            EdgeError: a query has fewer candidates than edges, unless `allow_fewer`.
        """
        self._same_batch(candidates)
        queries, wanted = self.queries
        query_of = candidates.row.astype(np.int64) * self.n_pos + candidates.dst
        order = np.lexsort((np.random.default_rng(seed).random(len(candidates)), query_of))
        sorted_queries = query_of[order]
        rank = np.arange(len(order)) - np.searchsorted(sorted_queries, sorted_queries)
        at = np.minimum(np.searchsorted(queries, sorted_queries), max(len(queries) - 1, 0))
        limit = np.where(queries[at] == sorted_queries, wanted[at], 0) if len(queries) else 0
        taken = candidates.table[order[rank < limit]]
        if len(taken) < len(self) and not allow_fewer:
            raise EdgeError(
                f"only {len(taken)} candidate edges for a control of {len(self)}: some query has "
                "fewer candidates than edges; widen the candidates or pass allow_fewer=True"
            )
        return EdgeSet(taken, self.n_batch, self.n_pos)

    # -- as plain data --------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; `from_json` gives an equal set back."""
        return {"n_batch": self.n_batch, "n_pos": self.n_pos, "edges": self.table.tolist()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EdgeSet:
        """The set that `to_json` wrote."""
        return cls(np.array(data["edges"]), data["n_batch"], data["n_pos"])
