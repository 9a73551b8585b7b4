"""Pairs (src, dst) of positions, sparse: the set that `interp.edges.EdgeSet` is.

An edge is one row of a table (row of the batch, dst, src). The table is kept sorted and without
doubles, so that two sets built in different ways compare equal, hash equal and print alike; that
order is also by query, so all edges of a query lie together. A million edges take 12 MB.

Here are how sets are made from positions, how they combine, and how they go to plain data and back.
What they mean for a model, its masks and patterns, and controls, is `EdgeSet`'s.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from interp.errors import EdgeError


@dataclass(frozen=True, eq=False, repr=False)
class PairSet:
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
        if not table.size:
            table = np.zeros((0, 3), dtype=np.int32)  # an empty list comes as floats
        else:
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
        # one number an edge, and in place, since a set may be large
        flat = _flat(table, self.n_pos)
        flat.sort()
        fresh = np.ones(len(flat), dtype=bool)
        np.not_equal(flat[1:], flat[:-1], out=fresh[1:])
        if not fresh.all():
            flat = flat[fresh]
        table = np.empty((len(flat), 3), dtype=np.int32)
        for column in (2, 1):
            table[:, column] = flat % self.n_pos
            flat //= self.n_pos
        table[:, 0] = flat
        table.flags.writeable = False
        object.__setattr__(self, "table", table)

    # -- making one ----------------------------------------------------------------------------

    @classmethod
    def of(cls, edges: Iterable[tuple[int, int, int]], n_batch: int, n_pos: int) -> Self:
        """From (row, src, dst) triples, in the order in which one says them."""
        triples = np.array(list(edges))
        if triples.ndim == 2 and triples.shape[1] == 3:
            triples = triples[:, [0, 2, 1]]
        return cls(triples, n_batch, n_pos)  # which refuses any other shape

    @classmethod
    def from_mask(cls, mask: Tensor | np.ndarray) -> Self:
        """From a boolean `[batch, dst, src]`, True where there is an edge."""
        array = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
        if array.dtype != np.bool_ or array.ndim != 3 or array.shape[1] != array.shape[2]:
            raise EdgeError(
                f"edges come from a bool mask [batch, dst, src], not from {array.dtype} "
                f"{list(array.shape)}"
            )
        return cls(np.argwhere(array), array.shape[0], array.shape[1])

    @classmethod
    def between(cls, src: np.ndarray, dst: np.ndarray) -> Self:
        """All edges from positions to positions of the same row.

        Args:
            src: `[batch, pos]` bool, the keys.
            dst: `[batch, pos]` bool, the queries.

        >>> words = np.array([[True, True, False]])
        >>> [edge for edge in PairSet.between(src=words, dst=~words)]
        [(0, 0, 2), (0, 1, 2)]
        """
        src, dst = np.asarray(src), np.asarray(dst)
        if (
            src.dtype != np.bool_
            or dst.dtype != np.bool_
            or src.ndim != 2
            or src.shape != dst.shape
        ):
            raise EdgeError(
                "edges run between two bool arrays [batch, pos], not between "
                f"{src.dtype} {list(src.shape)} and {dst.dtype} {list(dst.shape)}"
            )
        tables = [np.zeros((0, 3), dtype=np.int32)]
        for row, (keys, queries) in enumerate(zip(src, dst, strict=True)):
            tables.append(pairs(row, np.flatnonzero(keys), np.flatnonzero(queries)))
        return cls(np.concatenate(tables), *src.shape)

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
        found, counts = np.unique(self.query_of, return_counts=True)
        return found, counts

    @property
    def query_of(self) -> np.ndarray:
        """Each edge's query as `row * n_pos + dst`, `[n_edges]`."""
        return self.row.astype(np.int64) * self.n_pos + self.dst

    def __contains__(self, edge: object) -> bool:
        """Whether (row, src, dst) is one of the edges."""
        if not isinstance(edge, tuple) or len(edge) != 3:
            raise EdgeError(f"an edge is a tuple (row, src, dst), not {edge!r}")
        row, src, dst = edge
        wanted = (row, dst, src)
        at = bisect_left(self.table, wanted, key=tuple)
        return at < len(self) and tuple(self.table[at]) == wanted

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """The edges as (row, src, dst), by row, then dst, then src."""
        return ((row, src, dst) for row, dst, src in self.table.tolist())

    def __len__(self) -> int:
        return len(self.table)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PairSet):
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
            f"{type(self).__name__}({n} edge{'s' * (n != 1)}, {q} quer{'ies' if q != 1 else 'y'}, "
            f"{self.n_batch} x {self.n_pos} positions)"
        )

    # -- combining ------------------------------------------------------------------------------

    def __or__(self, other: PairSet) -> Self:
        self.same_batch(other)
        return type(self)(np.concatenate([self.table, other.table]), self.n_batch, self.n_pos)

    def __and__(self, other: PairSet) -> Self:
        self.same_batch(other)
        return self.only(np.isin(_flat(self.table, self.n_pos), _flat(other.table, self.n_pos)))

    def __sub__(self, other: PairSet) -> Self:
        self.same_batch(other)
        return self.only(~np.isin(_flat(self.table, self.n_pos), _flat(other.table, self.n_pos)))

    def only(self, kept: np.ndarray) -> Self:
        """The edges for which `kept`, `[n_edges]` bool, is True."""
        return type(self)(self.table[kept], self.n_batch, self.n_pos)

    def same_batch(self, other: PairSet) -> None:
        """Raise unless both are edges of a batch of one size."""
        if (self.n_batch, self.n_pos) != (other.n_batch, other.n_pos):
            raise EdgeError(f"{self!r} and {other!r} are edges of different batches")

    def causal(self) -> Self:
        """Only the edges a causal mask leaves open (src <= dst)."""
        return self.only(self.src <= self.dst)

    def without_self(self) -> Self:
        """Only the edges between two different positions."""
        return self.only(self.src != self.dst)

    def of_row(self, row: int) -> Self:
        """Only the edges of one row of the batch; the set is still one of the whole batch.

        Raises:
            EdgeError: a row that the batch does not have.
        """
        if not -self.n_batch <= row < self.n_batch:
            raise EdgeError(f"row {row} of a batch whose rows are 0..{self.n_batch - 1}")
        return self.only(self.row == row % self.n_batch)

    # -- as plain data --------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; `from_json` gives an equal set back."""
        return {"n_batch": self.n_batch, "n_pos": self.n_pos, "edges": self.table.tolist()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The set that `to_json` wrote."""
        return cls(np.array(data["edges"]), data["n_batch"], data["n_pos"])


def pairs(row: int, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
    """A table of all edges from positions to positions of one row of the batch."""
    table = np.empty((len(dst), len(src), 3), dtype=np.int32)
    table[..., 0], table[..., 1], table[..., 2] = row, dst[:, None], src
    return table.reshape(-1, 3)


def _flat(table: np.ndarray, n_pos: int) -> np.ndarray:
    """One number an edge, in the order of a sorted table."""
    flat = table[:, 0].astype(np.int64)
    for column in (1, 2):
        flat *= n_pos
        np.add(flat, table[:, column], out=flat, casting="unsafe")  # uint64 too, checked to fit
    return flat
