"""Receipts: what an edit really did, layer by layer.

`model.run` hands one receipt back an edit and layer. It counts the edges that were asked for and
those that the edit really flipped, tells how much attention they carried, and how many queries
were left with nothing to look at. Print them: an intervention that removed 0.1% of the attention
is not evidence of much, whatever came after.

*Attention mass* is, over the edited queries and heads, the mean share of a query's attention that
lay on the cut edges just before they were cut (or, for `Unmask`, that flows through the newly
opened ones). It is between 0 and 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from interp.attention import repeat_heads, softmax


@dataclass(frozen=True)
class Receipt:
    """What one edit did in one layer.

    Attributes:
        edit: the edit, as it prints.
        layer: language-model layer.
        asked: edges the edit holds.
        changed: edges it flipped: cut ones that were open, opened ones that were closed.
        mass: mean share of attention removed or opened (see the module), None if not asked for.
        empty_rows: queries left with no key.
    """

    edit: str
    layer: int
    asked: int
    changed: int
    mass: float | None
    empty_rows: int


class Receipts(tuple[Receipt, ...]):
    """The receipts of one run; prints as a table, `.table()` is the same as a data frame."""

    def table(self) -> pd.DataFrame:
        """One row a receipt."""
        columns = list(Receipt.__dataclass_fields__)
        return pd.DataFrame([asdict(receipt) for receipt in self], columns=columns)

    def __repr__(self) -> str:
        if not self:
            return "no edits, no receipts"
        return self.table().to_string(index=False, float_format="{:.4f}".format)

    __str__ = __repr__


def attention_mass(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    mask: Tensor,
    edges: Tensor,
    heads: tuple[int, ...] | None,
) -> float:
    """Mean share of attention that lies on `edges` under `mask`, over edited queries and heads.

    Only the rows that have such an edge are computed.

    Args:
        query: `[batch, query, head, d_head]` after rotation (`hook_rot_q`).
        key: `[batch, key, kv_head, d_head]` after rotation.
        scaling: factor on the scores.
        softcap: bound of the scores (Gemma 2), if any.
        mask: `[batch or 1, 1 or head, query, key]` bool, under which the mass is taken.
        edges: `[batch, query, key]` bool.
        heads: the edited heads, None for all.
    """
    row, dst = edges.any(-1).nonzero(as_tuple=True)
    if not len(row):
        return 0.0
    # grouped by row of the batch, so that the keys are never gathered once a query
    total, count = 0.0, 0
    key = repeat_heads(key.transpose(1, 2), query.shape[2])  # [batch, head, key, d_head]
    chosen = slice(None) if heads is None else list(heads)
    mask = mask.expand(query.shape[0], query.shape[2], -1, -1)
    for b in row.unique().tolist():
        at = dst[row == b]
        q = query[b, at].transpose(0, 1)[chosen]  # [head, n, d_head]
        scores: Any = q @ key[b, chosen].transpose(-1, -2) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~mask[b, chosen][:, at], -torch.inf)
        on_edges = softmax(scores) * edges[b, at]
        total += float(on_edges.sum())
        count += on_edges.shape[0] * on_edges.shape[1]
    return total / count
