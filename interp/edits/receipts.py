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

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pandas as pd
import torch
from torch import Tensor

from interp.attention import softmax

#: scores that are weighed at a time: what stays near a CPU, or fills a GPU
BLOCK, BLOCK_ELSEWHERE = 2**19, 2**24


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
        mass: mean share of attention removed or opened (see the module), None if not asked for, and
            on stock kernels, which do not show their queries and keys.
        empty_rows: queries left with no key.
        size: of the change, relative to what was there (norms): of the value at the hook, or for
            mask edits of `hook_z`, computed with and without the edit from the same queries, keys
            and values; None if not asked for.
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
        if table.hook.str.fullmatch(r"blocks\.\d+\.attn\.hook_mask").all():
            table = table.drop(columns="hook")  # the layer says it
        return table.to_string(index=False, float_format="{:.4f}".format)

    __str__ = __repr__


def attention_mass(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    before: Tensor,
    after: Tensor,
    queries: Sequence[tuple[int, Tensor]],
    heads: tuple[int, ...] | None,
) -> float:
    """Mean share of attention that an edit removes or opens, over edited queries and heads.

    What it closes is weighed under the mask it found, what it opens under the mask it left. Only
    the edited queries are computed, a block of them at a time.

    Args:
        query: `[batch, head, query, d_head]` after rotation.
        key: `[batch, kv_head, key, d_head]` after rotation.
        scaling: factor on the scores.
        softcap: bound of the scores (Gemma 2), if any.
        before, after: the mask as the edit found and left it, `[batch or 1, 1 or head, query, key]`
            bool.
        queries: the edited ones: rows of the batch, and positions in each.
        heads: the edited heads, None for all.
    """
    n_heads, n_keys = query.shape[1], key.shape[2]
    chosen = torch.tensor(range(n_heads) if heads is None else heads, device=query.device)
    n_scores = BLOCK if query.device.type == "cpu" else BLOCK_ELSEWHERE
    n_rows = max(1, n_scores // (len(chosen) * n_keys))
    total, count = 0.0, 0
    for b, every in queries:
        keys = key[b, chosen // (n_heads // key.shape[1])].float().transpose(-1, -2)
        own = query[b, chosen].float() * scaling
        for at in every.split(n_rows):
            was, now = (_rows(mask, b, chosen, at) for mask in (before, after))
            for mask, on in ((was, was & ~now), (now, now & ~was)):
                if on.any():
                    total += _share(own[:, at], keys, mask, on, softcap)
            count += len(chosen) * len(at)
    return total / count if count else 0.0


def _rows(mask: Tensor, b: int, heads: Tensor, at: Tensor) -> Tensor:
    """`[1 or head, n, key]`: the rows of some queries."""
    mask = mask[b if mask.shape[0] > 1 else 0]
    return mask[:, at] if mask.shape[0] == 1 else mask[heads[:, None], at]


def _share(query: Tensor, key: Tensor, mask: Tensor, on: Tensor, softcap: float | None) -> float:
    """How much attention lies on `on`, summed over heads and queries.

    Few passes over the scores: the mask is what their product is added to, and heads are summed
    before edges are picked, where all heads have the same.
    """
    bias = torch.zeros(mask.shape, device=query.device).masked_fill_(~mask, -torch.inf)
    if softcap is None:
        scores = torch.baddbmm(bias.expand(len(query), -1, -1), query, key)
    else:
        scores = torch.tanh(query @ key / softcap) * softcap + bias
    pattern = softmax(scores)
    if len(on) == 1:
        pattern = pattern.sum(0, keepdim=True)
    return float((pattern * on).sum(-1).double().sum())


def relative_change(before: Tensor, after: Tensor) -> float:
    """Norm of a change, relative to the norm of what was there; 0 where nothing was."""
    before, after = before.float(), after.float()
    return float((after - before).norm() / before.norm().clamp_min(1e-30))
