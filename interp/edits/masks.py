"""Edits of the attention mask: edges cut (`Knockout`) and edges opened (`Unmask`).

Both act *before* the softmax, on the boolean mask a layer uses, so the attention that remains
renormalises (Geva et al. 2023, 2304.14767). An edit is a frozen dataclass: it prints as the call
that made it, compares, hashes, goes to JSON and comes back.

Order is part of the meaning. Edits apply in the order in which they are given to `model.run`, each
on the mask the earlier ones left: `Unmask(e), Knockout(e)` closes `e`, the other way opens it.

`MaskBook` turns a run's edits into masks. A mask is built once for all layers in which the same
edits apply, is `[batch, 1, query, key]` unless heads differ, and always a new tensor: transformers
shares one mask between all layers, and an edit of one layer must not leak into the next.

>>> from interp.edges import EdgeSet
>>> Knockout(EdgeSet.of([(0, 1, 3)], 1, 8), layers=range(1, 3), heads=[0])
Knockout(EdgeSet(1 edge, 1 query, 1 x 8 positions), layers=[1, 2], heads=[0])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from interp.edges import EdgeSet
from interp.edits.base import Edit, Indices, indices
from interp.errors import EdgeError, EditHadNoEffect, EmptyRow, HeadError


@dataclass(frozen=True, repr=False)
class MaskEdit(Edit, kind=False):
    """Common part of mask edits: which edges, in which layers, for which heads.

    Attributes:
        edges: who no longer (or newly) sees whom, in positions of the sequence.
        layers: language-model layers, a number or several; None means all of them.
        heads: query heads, a number or several; None means all of them.
    """

    edges: EdgeSet
    layers: Indices = None
    heads: Indices = None

    #: what the edit writes into the mask at its edges
    opens: ClassVar[bool]

    def __post_init__(self) -> None:
        if not isinstance(self.edges, EdgeSet):
            raise EdgeError(
                f"{type(self).__name__} takes an EdgeSet, not {type(self.edges).__name__}; "
                "x.grid.edges(src=..., dst=...) makes one"
            )
        for name in ("layers", "heads"):
            object.__setattr__(self, name, indices(getattr(self, name), name))

    def check(self, n_layers: int, n_heads: int, attended: np.ndarray) -> None:
        """Raise unless the model has this edit's layers and heads, and the run its positions.

        Args:
            n_layers: of the language model.
            n_heads: its query heads.
            attended: `[batch, pos]` bool, False on padding.
        """
        edges = self.edges
        if (edges.n_batch, edges.n_pos) != attended.shape:
            raise EdgeError(
                f"{self!r}: these edges were made for {edges.n_batch} x {edges.n_pos} positions, "
                f"but this run has {attended.shape[0]} x {attended.shape[1]}"
            )
        for name, position in (("src", edges.src), ("dst", edges.dst)):
            padding = ~attended[edges.row, position]
            if padding.any():
                row, _, _ = edges.table[padding][0]
                raise EdgeError(
                    f"{self!r}: {int(padding.sum())} of these edges have a {name} that is padding, "
                    f"the first in row {row}; there is nothing there to cut or to see"
                )
        for name, value, n in (("layer", self.layers, n_layers), ("head", self.heads, n_heads)):
            for index in value or ():  # type: ignore[union-attr]
                if index >= n:
                    raise HeadError(
                        f"{self!r}: the language model has no {name} {index}; "
                        f"its {n} {name}s are 0..{n - 1}"
                    )

    def applies(self, layer: int) -> bool:
        """Whether this edit acts in `layer`."""
        return self.layers is None or layer in self.layers  # type: ignore[operator]

    def to_json(self) -> dict[str, Any]:
        """Plain data; `edit_from_json` gives an equal edit back."""
        return {
            "edit": type(self).__name__,
            "edges": self.edges.to_json(),
            "layers": self.layers,
            "heads": self.heads,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MaskEdit:
        """The edit of this kind that `to_json` wrote."""
        return cls(EdgeSet.from_json(data["edges"]), data["layers"], data["heads"])


@dataclass(frozen=True, repr=False)
class Knockout(MaskEdit):
    """Cut attention edges: each `dst` no longer sees its `src`.

    An edge that the mask closes anyway (a later token, padding) is an `EdgeError`: one thought
    that it carried something, and it does not. `edges.causal()` keeps only the open ones.

    Usage: `model.run(x, Knockout(x.grid.edges(src=12, dst=22), layers=range(1, 4), heads=[0, 2]))`
    """

    opens: ClassVar[bool] = False


@dataclass(frozen=True, repr=False)
class Unmask(MaskEdit):
    """Open attention edges: each `dst` newly sees its `src`, positions and rotations unchanged.

    Edges that were open already stay open and are counted as such in the receipt;
    `Unmask(x.grid.image_block())` makes attention bidirectional inside each image.
    """

    opens: ClassVar[bool] = True


@dataclass
class Effect:
    """What one edit does to the mask of one set of layers."""

    edit: MaskEdit
    changed: int  # mask entries (row, dst, src) that the edit flips in the heads it names
    edges: Tensor  # [3, changed]: row, dst and src of those entries
    before: Tensor  # the mask as the edit found it
    after: Tensor  # the mask as it left it
    empty_rows: int  # queries that newly see no key, in some head
    open_before: Tensor  # [edge] bool: which of the edit's edges were open in all its heads


class MaskBook:
    """The masks of one run, each built once.

    Args:
        edits: in the order in which they apply.
        n_layers: of the language model.
        n_heads: its query heads.
        attended: `[batch, pos]` bool of the run's batch, False on padding.
        strict: raise `EditHadNoEffect` for an edit that flips nothing.
        allow_empty_rows: let an edit leave queries with no key.
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
    ) -> None:
        for edit in edits:
            edit.check(n_layers, n_heads, attended)
        self.edits = edits
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_pos = attended.shape[1]
        self.strict = strict
        self.allow_empty_rows = allow_empty_rows
        # by the edits' numbers: a base mask of transformers' (Gemma3 has two), what became of it
        self._built: dict[tuple[int, ...], list[tuple[Tensor, Tensor, list[Effect]]]] = {}
        # by the edit's number: which of its edges some layer had open, and whether any flipped
        self._felt: dict[int, tuple[Tensor, bool]] = {}
        self._causal: Tensor | None = None

    def at(self, layer: int) -> tuple[int, ...]:
        """Numbers of the edits that act in `layer`, in order."""
        return tuple(i for i, edit in enumerate(self.edits) if edit.applies(layer))

    def causal(self, device: torch.device) -> Tensor:
        """The mask that "no mask" stands for in a causal model, `[1, 1, n_pos, n_pos]`."""
        if self._causal is None:
            full = torch.ones(self.n_pos, self.n_pos, dtype=torch.bool, device=device)
            self._causal = full.tril()[None, None]
        return self._causal.to(device)

    def mask(self, base: Tensor, layer: int) -> tuple[Tensor, list[Effect]]:
        """The mask of `layer` and what each of its edits did, given the unedited `base`.

        Args:
            base: `[batch or 1, 1 or head, query, key]` bool.
            layer: of the language model.

        Returns:
            `[batch, 1 or head, query, key]` bool, and one `Effect` an edit in `at(layer)`.
        """
        key = self.at(layer)
        built = self._built.pop(key, [])
        if any(self.at(later) == key for later in range(layer + 1, self.n_layers)):
            self._built[key] = built  # masks are large, and held no longer than they are of use
        for known, mask, effects in built:
            if known is base or (known.shape == base.shape and torch.equal(known, base)):
                return mask, effects
        mask, effects = base, []
        for number in key:
            effect = self._apply(self.edits[number], mask)
            mask = effect.after
            effects.append(effect)
            open_before, flipped = self._felt.get(number, (effect.open_before, False))
            felt = (open_before | effect.open_before, flipped or effect.changed > 0)
            self._felt[number] = felt
        built.append((base, mask, effects))
        return mask, effects

    def _apply(self, edit: MaskEdit, mask: Tensor) -> Effect:
        edges, n_pos = edit.edges, self.n_pos
        heads = self.n_heads if edit.heads is not None and mask.shape[1] == 1 else mask.shape[1]
        chosen = torch.tensor(range(heads) if edit.heads is None else edit.heads)
        chosen = chosen.to(mask.device)
        full = mask.expand(edges.n_batch, heads, -1, -1)
        after = full.clone()
        # numbers of the edges' entries in the flat mask, [edge, chosen head]: few beside the mask
        row, dst, src = torch.from_numpy(edges.table.astype(np.int64)).to(mask.device).unbind(1)
        entry = (row[:, None] * heads + chosen) * n_pos**2 + (dst * n_pos + src)[:, None]
        flat = after.view(-1)
        open_now = flat[entry]
        flat[entry] = edit.opens
        flips = (open_now != edit.opens).any(1)
        # only an edited query can have lost its last key
        at_row, at_dst = (
            torch.from_numpy(i).to(mask.device)[:, None] for i in divmod(edges.queries[0], n_pos)
        )
        had_key, has_key = (m[at_row, chosen, at_dst].any(-1) for m in (full, after))
        empty = (had_key & ~has_key).any(1)
        if empty.any() and not self.allow_empty_rows:
            first = int(empty.nonzero()[0])
            raise EmptyRow(
                f"{edit!r} leaves {int(empty.sum())} queries with no key to attend to, the first "
                f"is position {int(at_dst[first])} of row {int(at_row[first])}; keep an edge (say, "
                "to itself), or pass allow_empty_rows=True, and their attention output is zero"
            )
        flipped = torch.stack([row, dst, src])[:, flips]
        return Effect(
            edit, int(flips.sum()), flipped, mask, after, int(empty.sum()), open_now.all(1)
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
            open_somewhere, flipped = self._felt[number]
            if not edit.opens and not open_somewhere.all():
                closed = edit.edges.table[~open_somewhere.cpu().numpy()]
                row, dst, src = closed[0]
                why = (
                    "src comes after dst, and edges.causal() drops such edges"
                    if src > dst
                    else "an earlier edit of this run, or the layers' own mask, closes it in some "
                    "head"
                )
                raise EdgeError(
                    f"{edit!r}: {len(closed)} of these edges are closed already, so cutting them "
                    f"would change nothing; the first is src={src} -> dst={dst} in row {row}: {why}"
                )
            if self.strict and not flipped:
                why = "every edge was open already" if len(edit.edges) else "it holds no edges"
                raise EditHadNoEffect(
                    f"{edit!r} changes nothing: {why}; pass strict=False to let that pass"
                )
