"""`MaskBook`: the masks of one run, each built once.

A mask is built once for all layers in which the same edits do the same, is `[batch, 1, query, key]`
unless heads differ, and always a new tensor: transformers shares one mask between all layers, and
an edit of one layer must not leak into the next.

It comes back as it came: bool where the kernel takes bool (SDPA, ours), zeros and the lowest number
of its type where the kernel adds it to the scores (eager).

While a model generates with a KV cache, a mask has the queries of this step only, and its keys may
begin behind the start of the sequence (a sliding cache forgets). `query0` and `key0` say where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.attention import as_bool
from interp.edits.masks import EdgeEdit, EditMask, MaskEdit
from interp.errors import EdgeError, EditHadNoEffect, EmptyRow


@dataclass
class Effect:
    """What one edit does to the mask of one set of layers."""

    edit: MaskEdit
    heads: tuple[int, ...] | None  # that it names, None for all
    asked: int  # edges it holds; of a function, the (row, dst, src) it changed
    open: int  # of these, those that were open in all its heads
    changed: int  # mask entries (row, dst, src) that it flips in any of its heads
    edges: Tensor  # [3, changed]: row, dst, src of those entries in this mask, sorted
    before: Tensor  # the mask as the edit found it, bool
    after: Tensor  # the mask as it left it, bool
    empty_rows: int  # queries that newly see no key, in some head
    reached: Tensor  # [edge] bool: which of its edges have their query in this mask
    open_before: Tensor  # [edge] bool: which of them were open in all its heads
    flips: Tensor  # [edge] bool: which of them changed in any head; all three empty of a function

    @cached_property
    def queries(self) -> list[tuple[int, Tensor]]:
        """The rows of the batch in which it changed something, and which queries there."""
        row, dst, _ = self.edges
        return [(b, dst[row == b].unique_consecutive()) for b in row.unique_consecutive().tolist()]


@dataclass
class _Built:
    """One mask: what transformers gave, where it lies, and what became of it."""

    raw: Tensor
    place: tuple[int, int]
    mask: Tensor
    effects: list[Effect]

    def of(self, raw: Tensor, place: tuple[int, int]) -> bool:
        if self.raw is raw and self.place == place:
            return True
        kinds = [(t.dtype, t.device, t.shape) for t in (self.raw, raw)]
        return self.place == place and kinds[0] == kinds[1] and torch.equal(self.raw, raw)


class MaskBook:
    """The masks of one tower in one run.

    Args:
        edits: in the order in which they apply, all of one tower.
        n_layers: of the tower.
        n_heads: its query heads.
        attended: `[batch, pos]` bool of the run's batch, False on padding.
        strict: raise `EditHadNoEffect` for an edit that flips nothing.
        allow_empty_rows: let an edit leave queries with no key.
        n_new: how many positions are to be generated behind those.
    """

    def __init__(
        self,
        edits: Sequence[MaskEdit],
        n_layers: int,
        n_heads: int,
        attended: np.ndarray,
        *,
        strict: bool = True,
        allow_empty_rows: bool = False,
        n_new: int = 0,
    ) -> None:
        for edit in edits:
            edit.check(n_layers, n_heads, attended, n_new)
        self.edits = edits
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_batch, self.n_pos = attended.shape
        self.strict = strict
        self.allow_empty_rows = allow_empty_rows
        # the last layer in which the same edits do the same
        self._last = {self._key(layer): layer for layer in range(n_layers)}
        # by the edits and what they do there: a mask of transformers' (Gemma3 has two), what
        # became of it
        self._built: dict[tuple[Any, ...], list[_Built]] = {}
        # by the edit's number: which of its edges some layer reached, had open, flipped
        self._felt: dict[int, tuple[Tensor, Tensor, bool]] = {}
        self._tables: dict[int, Tensor] = {}
        self._made: dict[Any, Tensor] = {}

    def at(self, layer: int) -> tuple[int, ...]:
        """Numbers of the edits that act in `layer`, in order."""
        return tuple(i for i, edit in enumerate(self.edits) if edit.applies(layer))

    def _key(self, layer: int) -> tuple[Any, ...]:
        """Equal for layers in which the same edits do the same to the same mask."""
        return tuple(
            (i, layer if isinstance(self.edits[i], EditMask) else self.edits[i].heads_at(layer))
            for i in self.at(layer)
        )

    # -- masks that transformers leaves out ------------------------------------------------------

    def causal(self, device: torch.device) -> Tensor:
        """The mask that "no mask" stands for in a causal model, `[1, 1, n_pos, n_pos]`."""
        return self.between(self.n_pos, self.n_pos, 0, device)

    def between(
        self,
        n_queries: int,
        n_keys: int,
        ahead: int | None,
        device: torch.device,
        dtype: torch.dtype = torch.bool,
    ) -> Tensor:
        """Query i sees the keys up to i + `ahead`, or all keys; made once.

        Of a float type it is what eager attention adds to its scores, which would take a bool for
        zeros and ones.
        """
        name = (n_queries, n_keys, ahead, device, dtype)
        if name not in self._made:
            mask = torch.ones(1, 1, n_queries, n_keys, dtype=torch.bool, device=device)
            self._made = {name: _as_type(mask if ahead is None else mask.tril(ahead), dtype)}
        return self._made[name]

    def blocks(self, borders: Tensor) -> Tensor:
        """The mask of a packed row: who lies in one chunk, `[1, 1, n_pos, n_pos]`; made once."""
        name = tuple(borders.tolist())
        if name not in self._made:
            lengths = borders.diff()
            chunk = torch.arange(len(lengths), device=borders.device).repeat_interleave(lengths)
            self._made[name] = (chunk[:, None] == chunk)[None, None]
        return self._made[name]

    # -- edited masks ------------------------------------------------------------------------------

    def mask(
        self, raw: Tensor, layer: int, *, query0: int = 0, key0: int = 0
    ) -> tuple[Tensor, list[Effect]]:
        """The mask of `layer` and what each of its edits did, given the unedited one.

        Args:
            raw: `[batch or 1, 1 or head, query, key]`, bool, or float to be added to the scores.
            layer: of the tower.
            query0: position of the mask's first query.
            key0: position of the mask's first key.

        Returns:
            `[batch, 1 or head, query, key]` of the type of `raw`, and one `Effect` an edit in
            `at(layer)`.

        Raises:
            EmptyRow, EdgeError: see `interp.errors`.
        """
        key = self._key(layer)
        built = self._built.pop(key, [])
        if self._last[key] > layer:
            self._built[key] = built  # masks are large, and held no longer than they are of use
        for known in built:
            if known.of(raw, (query0, key0)):
                return known.mask, known.effects
        base = as_bool(raw)
        mask, effects = base, []
        for number in self.at(layer):
            edit = self.edits[number]
            if isinstance(edit, EdgeEdit):
                effect = self._edges(number, edit, base, mask, layer, query0, key0)
            else:
                effect = self._function(edit, mask, layer)  # type: ignore[arg-type]
            mask = effect.after
            effects.append(effect)
            # layers may lie on different devices
            reached, open_before = effect.reached.cpu(), effect.open_before.cpu()
            felt = self._felt.get(number, (reached, open_before, False))
            flipped = felt[2] or effect.changed > 0
            self._felt[number] = (felt[0] | reached, felt[1] | open_before, flipped)
        if raw.dtype != torch.bool:
            if any(effect.empty_rows for effect in effects):
                raise EmptyRow(
                    "a query with no key attends to everything alike in eager attention, not to "
                    "nothing; keep an edge (say, to itself), or load the model with attn='interp'"
                )
            mask = _as_type(mask, raw.dtype)
        built.append(_Built(raw, (query0, key0), mask, effects))
        return mask, effects

    def _table(self, number: int, edit: EdgeEdit, device: torch.device) -> Tensor:
        """`[3, edge]`: row, dst and src of an edit's edges."""
        if number not in self._tables or self._tables[number].device != device:
            table = torch.from_numpy(edit.edges.table.astype(np.int64)).T.contiguous()
            self._tables[number] = table.to(device)
        return self._tables[number]

    def _edges(
        self,
        number: int,
        edit: EdgeEdit,
        base: Tensor,
        mask: Tensor,
        layer: int,
        query0: int,
        key0: int,
    ) -> Effect:
        names = edit.heads_at(layer)
        n_heads = self.n_heads if names is not None and mask.shape[1] == 1 else mask.shape[1]
        chosen = torch.tensor(range(n_heads) if names is None else names, device=mask.device)
        n_queries, n_keys = mask.shape[-2:]
        row, dst, src = self._table(number, edit, mask.device)
        dst, src = dst - query0, src - key0
        reached = (dst >= 0) & (dst < n_queries)
        inside = reached & (src >= 0) & (src < n_keys)
        if edit.opens and (reached & ~inside).any():
            at = int((reached & ~inside).nonzero()[0])
            raise EdgeError(
                f"{edit!r}: src={int(src[at]) + key0} cannot be opened to "
                f"dst={int(dst[at]) + query0}: while that query is computed this key is "
                "not there (not generated yet, or dropped by a sliding cache)"
            )
        if not inside.all():
            row, dst, src = row[inside], dst[inside], src[inside]
        if edit.tower == "vision":
            self._in_one_picture(edit, base, row, dst, src)
        full = mask.expand(self.n_batch, n_heads, -1, -1)
        after = full.clone()
        # numbers of the edges' entries in the flat mask, [edge, chosen head]: few beside the mask
        entry = (row[:, None] * n_heads + chosen) * (n_queries * n_keys)
        entry += (dst * n_keys + src)[:, None]
        flat = after.view(-1)
        open_now = flat[entry]
        flat[entry] = edit.opens
        flipped = (open_now != edit.opens).any(1)
        # only an edited query can have lost its last key
        queries = (row * n_queries + dst).unique_consecutive()  # edges are sorted
        at_row, at_dst = (queries // n_queries)[:, None], (queries % n_queries)[:, None]
        had_key, has_key = (m[at_row, chosen, at_dst].any(-1) for m in (full, after))
        empty = (had_key & ~has_key).any(1)
        self._refuse_empty(edit, empty, at_row[:, 0], at_dst[:, 0] + query0)
        open_before, flips = torch.zeros_like(reached), torch.zeros_like(reached)
        open_before[inside], flips[inside] = open_now.all(1), flipped
        return Effect(
            edit,
            names,
            len(edit.edges),
            int(open_now.all(1).sum()),
            int(flipped.sum()),
            torch.stack([row, dst, src])[:, flipped],
            mask,
            after,
            int(empty.sum()),
            reached,
            open_before,
            flips,
        )

    def _function(self, edit: EditMask, mask: Tensor, layer: int) -> Effect:
        full = mask.expand(self.n_batch, self.n_heads, -1, -1)
        given = full.clone()
        after: Any = edit.fn(given, layer)
        after = given if after is None else after
        if not isinstance(after, Tensor) or after.dtype != torch.bool or after.shape != full.shape:
            came = (
                f"{after.dtype} {list(after.shape)}"
                if isinstance(after, Tensor)
                else type(after).__name__
            )
            raise TypeError(
                f"{edit!r} returned {came} in layer {layer}; a mask is bool {list(full.shape)}, "
                "True = may attend"
            )
        after = after.to(mask.device)
        changed = (after != full).any(1)
        edges = changed.nonzero().T
        empty = (full.any(-1) & ~after.any(-1)).any(1)
        self._refuse_empty(edit, empty.flatten(), *empty.new_ones(empty.shape).nonzero().T)
        if mask.shape[1] == 1 and bool((after == after[:, :1]).all()):
            after = after[:, :1].contiguous()
        n, n_open = edges.shape[1], int(full.all(1)[changed].sum())
        none = torch.zeros(0, dtype=torch.bool, device=mask.device)
        n_empty = int(empty.sum())
        return Effect(edit, None, n, n_open, n, edges, mask, after, n_empty, none, none, none)

    def _refuse_empty(self, edit: MaskEdit, empty: Tensor, row: Tensor, dst: Tensor) -> None:
        if empty.any() and not self.allow_empty_rows:
            first = int(empty.nonzero()[0])
            raise EmptyRow(
                f"{edit!r} leaves {int(empty.sum())} queries with no key to attend to, the first "
                f"is position {int(dst[first])} of row {int(row[first])}; keep an edge (say, "
                "to itself), or pass allow_empty_rows=True, and their attention output is zero"
            )

    def _in_one_picture(
        self, edit: EdgeEdit, base: Tensor, row: Tensor, dst: Tensor, src: Tensor
    ) -> None:
        """Patches that nobody sees are padding; a packed row's chunks cannot be joined."""
        if edit.opens:
            closed = ~base.expand(self.n_batch, -1, -1, -1)[row, :, dst, src].all(1)
            if closed.any():
                at = int(closed.nonzero()[0])
                raise EdgeError(
                    f"{edit!r}: {int(closed.sum())} of these edges lead to another picture or "
                    f"window, or to padding, the first src={int(src[at])} -> dst={int(dst[at])}; "
                    "in the vision tower edges can be cut, not added"
                )
        seen = base.any(2).any(1).expand(self.n_batch, -1)
        padding = ~seen[row, dst] | ~seen[row, src]
        if padding.any():
            at = int(padding.nonzero()[0])
            raise EdgeError(
                f"{edit!r}: {int(padding.sum())} of these edges begin or end in padding, the first "
                f"is src={int(src[at])} -> dst={int(dst[at])} of row {int(row[at])}"
            )

    def require_effects(self) -> None:
        """Raise for an edit that no layer of the run has felt, or felt only in part.

        Layers may differ in what they see (Gemma3's sliding windows), so this is known at the end.

        Raises:
            EdgeError: edges to cut that were closed already in every layer.
            EditHadNoEffect: an edit that changed nothing anywhere, unless `strict` is off.
        """
        for number, edit in enumerate(self.edits):
            if number not in self._felt:
                continue  # the run ended before its first layer
            reached, open_somewhere, flipped = self._felt[number]
            n_edges = len(edit.edges) if isinstance(edit, EdgeEdit) else -1
            if isinstance(edit, EdgeEdit) and not edit.opens:
                self._refuse_closed(edit, (reached & ~open_somewhere).numpy())
            if self.strict and not flipped:
                if n_edges < 0:
                    why = "the function gave the masks back as they were"
                elif n_edges == 0:
                    why = "it holds no edges"
                elif not reached.any():
                    why = "the run ended before any dst of its edges was computed"
                else:
                    why = "every edge was open already"
                raise EditHadNoEffect(
                    f"{edit!r} changes nothing: {why}; pass strict=False to let that pass"
                )

    @staticmethod
    def _refuse_closed(edit: EdgeEdit, closed: np.ndarray) -> None:
        if not closed.any():
            return
        row, dst, src = edit.edges.table[closed][0]
        if edit.tower == "vision":
            why = "an earlier edit closes it, or the two lie in different pictures or windows"
        elif src > dst:
            why = "src comes after dst, and edges.causal() drops such edges"
        else:
            why = "an earlier edit of this run, or the layers' own mask, closes it in some head"
        raise EdgeError(
            f"{edit!r}: {int(closed.sum())} of these edges are closed already, so cutting them "
            f"would change nothing; the first is src={src} -> dst={dst} in row {row}: {why}"
        )


def _as_type(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as it is, or as zeros and the lowest number of a float type."""
    if dtype == torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
