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
        hook: where it acted; of mask edits, the layer's `attn.hook_mask`.
        layer: the block's number in its tower, None outside of blocks.
        asked: edges the edit holds; of value edits, vectors it selects.
        open: of the edges, those that were open in every head it names; None for value edits.
        changed: edges it flipped: cut ones that were open, opened ones that were closed; of value
            edits, vectors that are another now.
        mass: mean share of attention removed or opened (see the module), None if not asked for.
        empty_rows: queries left with no key.
        size: of the change, relative to what was there (norms): of the value at the hook, or of
            the layer's attention output; None if not asked for.
    """

    edit: str
    hook: str
    layer: int | None
    asked: int
    open: int | None
    changed: int
    mass: float | None = None
    empty_rows: int = 0
    size: float | None = None


class Receipts(tuple[Receipt, ...]):
    """The receipts of one run; prints as a table, `.table()` is the same as a data frame."""

    def table(self) -> pd.DataFrame:
        """One row a receipt."""
        columns = list(Receipt.__dataclass_fields__)
        return pd.DataFrame([asdict(receipt) for receipt in self], columns=columns)

    def __repr__(self) -> str:
        if not self:
            return "no edits, no receipts"
        table = self.table().dropna(axis=1, how="all")
        if table.hook.str.endswith("hook_mask").all():
            table = table.drop(columns="hook")  # the layer says it
        return table.to_string(index=False, float_format="{:.4f}".format)

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
