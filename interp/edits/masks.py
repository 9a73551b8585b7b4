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

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from interp.edges import EdgeSet
from interp.errors import EdgeError, EditHadNoEffect, EmptyRow, HeadError

Indices = int | Iterable[int] | None


@dataclass(frozen=True, repr=False)
class MaskEdit:
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
            object.__setattr__(self, name, _indices(getattr(self, name), name))

    def __repr__(self) -> str:
        where = [
            f", {name}={list(value)}"
            for name in ("layers", "heads")
            if (value := getattr(self, name)) is not None
        ]
        return f"{type(self).__name__}({self.edges!r}{''.join(where)})"

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


def edit_from_json(data: dict[str, Any]) -> MaskEdit:
    """The edit that `to_json` wrote."""
    kinds = {kind.__name__: kind for kind in (Knockout, Unmask)}
    if data.get("edit") not in kinds:
        raise ValueError(f"no edit {data.get('edit')!r}; there are {sorted(kinds)}")
    return kinds[data["edit"]](EdgeSet.from_json(data["edges"]), data["layers"], data["heads"])


def _indices(value: Indices, name: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    given = list(value) if isinstance(value, Iterable) else [value]
    if not given:
        raise HeadError(f"{name}=[] edits nothing; leave {name} out to mean all of them")
    return tuple(sorted({_index(one, name) for one in given}))


def _index(value: Any, name: str) -> int:
    try:
        index = operator.index(value)  # takes NumPy's and torch's whole numbers too
    except TypeError:
        index = -1
    if index < 0 or isinstance(value, (bool, np.bool_)):
        raise HeadError(f"{name} are whole numbers from 0, not {value!r}")
    return index


@dataclass
class Effect:
    """What one edit does to the mask of one set of layers."""

    edit: MaskEdit
    changed: int  # mask entries (row, dst, src) that the edit flips in the heads it names
    edges: Tensor  # [batch, query, key] bool: those entries
    before: Tensor  # the mask as the edit found it
    after: Tensor  # the mask as it left it
    empty_rows: int  # queries that newly see no key, in some head


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
        self.n_heads = n_heads
        self.n_pos = attended.shape[1]
        self.strict = strict
        self.allow_empty_rows = allow_empty_rows
        # by the edits' numbers: a base mask of transformers' (Gemma3 has two), what became of it
        self._built: dict[tuple[int, ...], list[tuple[Tensor, Tensor, list[Effect]]]] = {}
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
        for known, mask, effects in self._built.setdefault(key, []):
            if known is base or (known.shape == base.shape and torch.equal(known, base)):
                return mask, effects
        mask, effects = base, []
        for number in key:
            effect = self._apply(self.edits[number], mask)
            mask = effect.after
            effects.append(effect)
        self._built[key].append((base, mask, effects))
        return mask, effects

    def _apply(self, edit: MaskEdit, mask: Tensor) -> Effect:
        edges = edit.edges
        at = edges.to_mask(mask.device)  # [batch, query, key]
        heads = self.n_heads if edit.heads is not None and mask.shape[1] == 1 else mask.shape[1]
        after = mask.expand(edges.n_batch, heads, -1, -1).clone()
        chosen = list(range(heads)) if edit.heads is None else list(edit.heads)  # type: ignore[arg-type]
        open_now = after[:, chosen] & at[:, None]
        if not edit.opens:
            closed = at & ~open_now.all(1)
            if closed.any():
                row, dst, src = (int(i) for i in closed.nonzero()[0])
                why = (
                    "src comes after dst, and edges.causal() drops such edges"
                    if src > dst
                    else "an earlier edit of this run, or the layer's own mask, closes it in some "
                    "head"
                )
                raise EdgeError(
                    f"{edit!r}: {int(closed.sum())} of these edges are closed already, so cutting "
                    f"them would change nothing; the first is src={src} -> dst={dst} in row {row}: "
                    f"{why}"
                )
        if edit.opens:
            after[:, chosen] |= at[:, None]
        else:
            after[:, chosen] &= ~at[:, None]
        flipped = (after != mask).any(1)
        if self.strict and not flipped.any():
            why = "every edge was open already" if len(edges) else "it holds no edges"
            raise EditHadNoEffect(
                f"{edit!r} changes nothing: {why}; pass strict=False to let that pass"
            )
        had_key = mask.any(-1).expand(edges.n_batch, heads, -1)
        empty = (had_key & ~after.any(-1)).any(1)
        if empty.any() and not self.allow_empty_rows:
            row, dst = (int(i) for i in empty.nonzero()[0])
            raise EmptyRow(
                f"{edit!r} leaves {int(empty.sum())} queries with no key to attend to, the first "
                f"is position {dst} of row {row}; keep an edge (say, to itself), or pass "
                "allow_empty_rows=True, and their attention output is zero"
            )
        return Effect(edit, int(flipped.sum()), flipped, mask, after, int(empty.sum()))
