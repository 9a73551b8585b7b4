"""Where in the sequence a value edit acts, as data.

One says positions in whichever way is at hand, and all of them become a `Positions`:

* a whole number, or several: these positions *in every row* of the batch;
* (row, position) pairs, a list of them or an array `[n, 2]`;
* a bool mask `[batch, pos]`: `x.is_last`, `x.is_text`, `x.grid.mark(x.grid.inside(box))`;
* anything that carries `row` and `position` arrays, as a `TokenGrid` does: `x.grid` for the image
  tokens in the language model, `x.patches` in the vision tower, `x.adapter` behind the adapter.

Positions are counted in the tensor at the hook: in the language model those of the sequence, in the
vision tower its own (row, position), CLS included. What comes from a mask or a grid remembers the
extent it was made for and is refused elsewhere, so that image tokens of the prompt cannot pass for
patches of the tower.

>>> Positions.of([7, 5])
[5, 7]
>>> Positions.of([(0, 5), (1, 6)])
[(0, 5), (1, 6)]
>>> Positions.of([5, 7]) == Positions.of((7, 5, 5))
True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.errors import PositionError

#: stands in a table's column of rows for "every row"
EVERY = -1


@dataclass(frozen=True, eq=False, repr=False)
class Positions:
    """A set of positions (see the module docstring).

    Attributes:
        table: int64 `[n, 2]`, (row, position), sorted, without doubles, read-only; the row is
            `EVERY` where positions are meant in every row.
        extent: (rows, positions) of the batch it was made for, or None if that was not told.
    """

    table: np.ndarray
    extent: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        table = np.unique(np.asarray(self.table, dtype=np.int64).reshape(-1, 2), axis=0)
        if not len(table):
            raise PositionError("no positions, so nothing is edited; leave positions out for all")
        if table[:, 1].min() < 0 or table[:, 0].min() < EVERY:
            raise PositionError(
                f"positions {table[(table < 0).any(1)].tolist()}: rows and positions count from 0, "
                "padding included; x.is_last is the last position of each row"
            )
        table.flags.writeable = False
        object.__setattr__(self, "table", table)

    @classmethod
    def of(cls, value: Any) -> Positions | None:
        """From any of the ways to say positions; None (all of them) stays None.

        Raises:
            PositionError: something else, or an empty selection.
        """
        if value is None or isinstance(value, cls):
            return value
        if hasattr(value, "row") and hasattr(value, "position"):
            extent = None
            if hasattr(value, "n_batch") and hasattr(value, "n_pos"):
                extent = (int(value.n_batch), int(value.n_pos))
            return cls(np.stack([np.asarray(value.row), np.asarray(value.position)], 1), extent)
        array = value.cpu().numpy() if isinstance(value, Tensor) else _array(value)
        if array.dtype == np.bool_ and array.ndim == 2:
            return cls(np.argwhere(array), array.shape)
        if (array.size and array.dtype.kind not in "iu") or array.ndim > 2:
            array = np.zeros(0, dtype=object)
        if array.ndim == 2 and array.shape[1] == 2:
            if array.size and array.min() < 0:
                raise PositionError(f"(row, position) pairs count from 0, not {array.min()}")
            return cls(array)
        if array.ndim < 2 and array.dtype != object:
            array = array.reshape(-1)
            return cls(np.stack([np.full_like(array, EVERY), array], axis=1))
        raise PositionError(
            f"positions={value!r}: whole numbers (in every row), (row, position) pairs, a bool "
            "mask [batch, pos], or a grid (x.grid, x.patches) would do"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Positions):
            return NotImplemented
        return self.extent == other.extent and np.array_equal(self.table, other.table)

    def __hash__(self) -> int:
        return hash((self.extent, self.table.tobytes()))

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        every = bool((self.table[:, 0] == EVERY).all())
        if len(self) <= 8:
            return repr(self.table[:, 1].tolist() if every else [(r, p) for r, p in self._pairs()])
        n_rows = len(np.unique(self.table[:, 0]))
        where = "every row" if every else f"{n_rows} row{'s' * (n_rows != 1)}"
        first, last = self.table[:, 1].min(), self.table[:, 1].max()
        return f"<{len(self)} positions in {where}, {first}..{last}>"

    def _pairs(self) -> list[list[int]]:
        pairs: list[list[int]] = self.table.tolist()
        return pairs

    def mask(self, attended: np.ndarray) -> Tensor:
        """`[batch, pos]` bool, True on these positions.

        Args:
            attended: `[batch, pos]` bool of the tensor they are taken in, False on padding.

        Raises:
            PositionError: positions that it lacks, or that are padding in it.
        """
        n_batch, n_pos = attended.shape
        if self.extent is not None and self.extent != attended.shape:
            raise PositionError(
                f"these positions were made for {self.extent[0]} x {self.extent[1]} positions, but "
                f"the tensor here has {n_batch} x {n_pos}; take them from x.grid in the language "
                "model, from x.patches in the vision tower, from x.adapter behind the adapter"
            )
        for row, position in self.table[(self.table >= (n_batch, n_pos)).any(1)][:1]:
            place = "" if row == EVERY else f"row {row}, "
            raise PositionError(
                f"there is no {place}position {position}: the tensor here has rows "
                f"0..{n_batch - 1} and positions 0..{n_pos - 1}"
            )
        mask = np.zeros(attended.shape, dtype=bool)
        every = self.table[:, 0] == EVERY
        mask[:, self.table[every, 1]] = True
        mask[self.table[~every, 0], self.table[~every, 1]] = True
        padding = np.argwhere(mask & ~attended)
        if len(padding):
            raise PositionError(
                f"{len(padding)} of these positions are padding, the first is position "
                f"{padding[0, 1]} of row {padding[0, 0]}; nothing there is ever read"
            )
        return torch.from_numpy(mask)

    def to_json(self) -> dict[str, Any] | list[int]:
        """A list of positions in every row, or the pairs and their extent."""
        if self.extent is None and (self.table[:, 0] == EVERY).all():
            positions: list[int] = self.table[:, 1].tolist()
            return positions
        return {"pairs": self._pairs(), "extent": self.extent and list(self.extent)}

    @classmethod
    def from_json(cls, data: dict[str, Any] | list[int] | None) -> Positions | None:
        """What `to_json` wrote."""
        if not isinstance(data, dict):
            return cls.of(data)
        extent = data["extent"]
        return cls(np.array(data["pairs"]), None if extent is None else (extent[0], extent[1]))


def _array(value: Any) -> np.ndarray:
    try:
        return np.asarray(list(value) if not np.isscalar(value) else value)
    except (TypeError, ValueError):  # no sequence, or a ragged one
        return np.zeros(0, dtype=object)
