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
        edges: `[3, n_edges]`, row, dst and src.
        heads: the edited heads, None for all.
    """
    # grouped by row of the batch, so that the keys are never gathered once a query
    total, count = 0.0, 0
    key = repeat_heads(key.transpose(1, 2), query.shape[2])  # [batch, head, key, d_head]
    chosen = torch.arange(query.shape[2]) if heads is None else torch.tensor(heads)
    chosen = chosen.to(query.device)
    mask = mask.expand(query.shape[0], query.shape[2], -1, -1)
    for b in edges[0].unique().tolist():
        _, dst, src = edges[:, edges[0] == b]
        at, number = dst.unique(return_inverse=True)
        on_edges = torch.zeros(len(at), mask.shape[-1], dtype=torch.bool, device=query.device)
        on_edges[number, src] = True
        q = query[b, at].transpose(0, 1)[chosen]  # [head, n, d_head]
        scores = q @ key[b, chosen].transpose(-1, -2) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~mask[b, chosen[:, None], at], -torch.inf)
        total += float((softmax(scores) * on_edges).sum())
        count += len(chosen) * len(at)
    return total / count if count else 0.0
