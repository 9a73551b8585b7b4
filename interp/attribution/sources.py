"""From which tokens a head reads: groups of source positions for every reading position.

An attribution by head alone says *who*; by head and source it says *who, from where*. Here the
positions whose reading is looked at ("dst", one row each) get every position of the sequence
("src") sorted into a group. Three ways of sorting come ready:

| sources | groups |
|---|---|
| "region" | tokens of the same region, right or wrong; other image tokens; text; itself |
| "place" | image tokens, text, the first token, itself |
| "whole" | one group with everything: a head as a whole |

Any other is an array of group numbers (`Sources`). What the mask closes has no attention, whatever
its group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from interp.attribution.targets import Score
from interp.edges import EdgeSet
from interp.errors import EdgeError, nearest
from interp.inputs import Inputs

REGION = ("same-region correct", "same-region wrong", "other regions", "text and BOS", "self")
PLACE = ("image", "text", "first token", "self")
WHOLE = ("all",)


@dataclass(frozen=True, eq=False)
class Sources:
    """Source groups of some reading positions of a batch.

    Attributes:
        names: of the groups.
        row, position: `[n]` the reading positions.
        group: `[n, n_pos]` int8, which group a source position is in; -1 for none.
    """

    names: tuple[str, ...]
    row: Tensor
    position: Tensor
    group: Tensor

    def __post_init__(self) -> None:
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        object.__setattr__(self, "names", names)
        for name in ("row", "position", "group"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name)))
        if len(set(names)) < len(names):
            raise EdgeError(f"source groups {', '.join(names)}: a name is there twice")
        n = len(self.row)
        if self.position.shape != (n,) or self.group.ndim != 2 or len(self.group) != n:
            raise EdgeError(
                f"{n} rows, positions {list(self.position.shape)}, groups "
                f"{list(self.group.shape)}: one row, position and line of groups a reading position"
            )
        if n and (self.group.min() < -1 or self.group.max() >= len(self.names)):
            raise EdgeError(
                f"groups are -1 (none) or 0..{len(self.names) - 1}, found "
                f"{self.group.unique().tolist()}"
            )

        if n and len(torch.stack([self.row, self.position], 1).unique(dim=0)) < n:
            raise EdgeError("a reading position is there twice, and would be counted twice")

    def __len__(self) -> int:
        return len(self.row)

    @property
    def is_in(self) -> Tensor:
        """`[n, n_pos, n_groups]` bool."""
        return self.group[..., None] == torch.arange(len(self.names), device=self.group.device)

    def in_order(self, score: Score) -> Sources:
        """The same, its readers in the order of a target's queries, if they are the same ones."""
        if score.row is None or score.position is None or len(score.row) != len(self):
            return self
        n_pos = self.group.shape[1]
        own, wanted = self.row * n_pos + self.position, score.row * n_pos + score.position
        order, goal = own.argsort(), wanted.argsort()
        if not torch.equal(own[order], wanted[goal]):
            return self
        at = torch.empty_like(order)
        at[goal] = order
        return replace(self, row=self.row[at], position=self.position[at], group=self.group[at])

    def only(self, names: Iterable[str]) -> Sources:
        """Some of the groups, the others left out.

        Raises:
            EdgeError: a name that is no group.
        """
        wanted = tuple(names)
        for name in wanted:
            if name not in self.names:
                raise EdgeError(
                    f"no source group {name!r}, there are {', '.join(self.names)}; "
                    f"{nearest(name, self.names)}"
                )
        number = torch.full((len(self.names) + 1,), -1, dtype=torch.int8)  # the last is for -1
        for new, name in enumerate(wanted):
            number[self.names.index(name)] = new
        return replace(self, names=wanted, group=number[self.group.long()])

    def edges(self, group: int, visible: Tensor, n_batch: int) -> EdgeSet:
        """The edges from one group to the reading positions, as far as they are visible.

        Args:
            group: its number.
            visible: `[n, n_pos]` bool, what each reading position may attend to.
            n_batch: rows of the batch.
        """
        n, src = ((self.group == group) & visible).nonzero(as_tuple=True)
        table = np.empty((len(n), 3), dtype=np.int32)
        table[:, 0], table[:, 1] = self.row[n].numpy(), self.position[n].numpy()
        table[:, 2] = src.numpy()
        return EdgeSet(table, n_batch, self.group.shape[1])


def by_region(
    x: Inputs, row: Tensor, position: Tensor, labels: np.ndarray, right: np.ndarray
) -> Sources:
    """Groups by the picture's regions and by which tokens are right.

    Args:
        x: the batch.
        row, position: `[n]` reading positions, image tokens.
        labels: `[n_tokens]` class of each image token of the batch; regions are connected tokens
            of one class.
        right: `[n_tokens]` bool, tokens whose class is read rightly where the question starts.
    """
    token = x.grid.token_at
    rows = row.numpy()  # a tensor with one number would pass for that number
    dst, src = token[rows, position.numpy()], token[rows]  # [n], [n, n_pos]
    if (dst < 0).any():
        raise EdgeError(
            'sources="region" sorts what image tokens read; for readers that are words take '
            'sources="place", or dst="image"'
        )
    region = np.asarray(x.grid.regions(labels))
    same = (region[src] == region[dst][:, None]) & (region[src] >= 0)
    group = np.where(same, np.where(right[src], 0, 1), 2)
    outside = ~x.grid.is_placeholder[rows]
    group[outside & (src < 0)] = REGION.index("text and BOS")
    group[(src < 0) & ~outside] = REGION.index("other regions")  # newlines, another view
    return _with_self(REGION, row, position, group)


def by_place(x: Inputs, row: Tensor, position: Tensor) -> Sources:
    """Groups by what stands at a source: picture, words, the first token of the row."""
    group = np.where(x.grid.is_placeholder, PLACE.index("image"), PLACE.index("text"))
    group[x.is_first] = PLACE.index("first token")
    return _with_self(PLACE, row, position, group[row.numpy()])


def whole(x: Inputs, row: Tensor, position: Tensor) -> Sources:
    """One group with every source, the reading position itself included."""
    group = torch.zeros(len(row), x.n_pos, dtype=torch.int8)
    return Sources(WHOLE, row, position, group)


def _with_self(names: tuple[str, ...], row: Tensor, position: Tensor, group: np.ndarray) -> Sources:
    group = group.astype(np.int8)
    group[np.arange(len(row)), position.numpy()] = names.index("self")
    return Sources(names, row, position, torch.from_numpy(group))
