"""Edits of the attention mask: `Knockout` cuts edges, `Unmask` opens them, `EditMask` does any.

All act *before* the softmax, on the boolean mask a layer uses, so the attention that remains
renormalises (Geva et al. 2023, 2304.14767). An edit is a frozen dataclass: it prints as the call
that made it, compares, hashes, goes to JSON and comes back.

Layers are a number, several, or None for all. So are heads; or heads differ by layer, as a dict
`{layer: heads}`, which then says the layers too. `tower="vision"` means the vision tower, whose
edges are in its own positions: `x.patches.edges(...)` makes such.

Order is part of the meaning. Edits apply in the order in which they are given to `model.run`, each
on the mask the earlier ones left: `Unmask(e), Knockout(e)` closes `e`, the other way opens it.
`interp.edits.book` turns a run's edits into masks.

>>> from interp.edges import EdgeSet
>>> Knockout(EdgeSet.of([(0, 1, 3)], 1, 8), layers=range(1, 3), heads=[0])
Knockout(EdgeSet(1 edge, 1 query, 1 x 8 positions), layers=[1, 2], heads=[0])
>>> Knockout(EdgeSet.of([(0, 1, 3)], 1, 8), heads={1: 0, 2: [3, 4]}).heads
{1: [0], 2: [3, 4]}
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from interp.edges import EdgeSet
from interp.edits.base import Edit, HeadsByLayer, Indices, indices
from interp.errors import EdgeError, HeadError

if TYPE_CHECKING:
    from interp.hooked import Hooked

TOWERS = {"language": "language model", "vision": "vision tower"}

MaskFunction = Callable[[Tensor, int], Tensor | None]


class MaskEdit(Edit):
    """Base of mask edits; the subclasses are dataclasses with these two among their fields."""

    abstract = True

    layers: Any
    tower: Any

    def _set_place(self) -> None:
        object.__setattr__(self, "layers", indices(self.layers, "layers"))
        if self.tower not in TOWERS:
            raise ValueError(f"tower={self.tower!r}; there are 'language' and 'vision'")

    @property
    def prefix(self) -> str:
        """What its tower's hook names begin with."""
        return "vision." if self.tower == "vision" else ""

    def names(self, model: Hooked) -> list[str]:
        """The hooks it acts at, in execution order; all layers of a tower are those that count."""
        vision = self.tower == "vision"
        n_layers = model.cfg.n_vision_layers if vision else model.cfg.n_layers
        names = [
            f"{self.prefix}blocks.{i}.attn.hook_mask" for i in range(n_layers) if self.applies(i)
        ]
        return [name for name in names if self.layers is not None or not model.off_path(name)]

    def applies(self, layer: int) -> bool:
        """Whether this edit acts in `layer` of its tower."""
        return self.layers is None or layer in self.layers

    def heads_at(self, layer: int) -> tuple[int, ...] | None:
        """The heads in which it acts in `layer`, None for all of them."""
        return None

    def check(self, n_layers: int, n_heads: int, attended: np.ndarray, n_new: int = 0) -> None:
        """Raise unless the tower has this edit's layers and heads, and the run its positions.

        Args:
            n_layers: of the tower.
            n_heads: its query heads.
            attended: `[batch, pos]` bool, False on padding.
            n_new: how many positions are to be generated behind those.
        """
        self._exist("layer", self.layers or (), n_layers)

    def _exist(self, name: str, numbers: Any, n: int) -> None:
        for index in numbers:
            if index >= n:
                raise HeadError(
                    f"{self!r}: the {TOWERS[self.tower]} has no {name} {index}; "
                    f"its {n} {name}s are 0..{n - 1}"
                )


@dataclass(frozen=True, repr=False)
class EdgeEdit(MaskEdit):
    """Common part of `Knockout` and `Unmask`: which edges, in which layers, for which heads.

    Attributes:
        edges: who no longer (or newly) sees whom, in positions of the tower's sequence.
        layers: of the tower, a number or several; None means all of them.
        heads: query heads, a number or several; None means all of them; a dict `{layer: heads}`
            says the layers too.
        tower: "language" or "vision".
    """

    abstract: ClassVar[bool] = True

    edges: EdgeSet
    layers: Indices = None
    heads: Indices | Mapping[int, Indices] = None
    tower: str = "language"

    #: what the edit writes into the mask at its edges
    opens: ClassVar[bool]

    def __post_init__(self) -> None:
        if not isinstance(self.edges, EdgeSet):
            raise EdgeError(
                f"{type(self).__name__} takes an EdgeSet, not {type(self.edges).__name__}; "
                "x.grid.edges(src=..., dst=...) or x.edges(src=..., dst=...) makes one"
            )
        self._set_place()
        if isinstance(self.heads, Mapping):
            heads = HeadsByLayer(self.heads)
            if self.layers not in (None, tuple(heads)):
                raise HeadError(
                    f"heads={heads!r} says the layers already, and layers="
                    f"{list(self.layers)} are others; leave layers out"  # type: ignore[arg-type]
                )
            object.__setattr__(self, "layers", tuple(heads))
            object.__setattr__(self, "heads", heads)
        else:
            object.__setattr__(self, "heads", indices(self.heads, "heads"))

    def heads_at(self, layer: int) -> tuple[int, ...] | None:
        """The heads in which it acts in `layer`, None for all of them."""
        if isinstance(self.heads, HeadsByLayer):
            return self.heads[layer]
        return self.heads  # type: ignore[return-value]

    def check(self, n_layers: int, n_heads: int, attended: np.ndarray, n_new: int = 0) -> None:
        """Raise unless the tower has this edit's layers and heads, and the run its positions."""
        edges, (n_batch, n_pos) = self.edges, attended.shape
        if edges.n_batch != n_batch or not n_pos <= edges.n_pos <= n_pos + n_new:
            where = "the vision tower" if self.tower == "vision" else "this run"
            grown = f" to {n_pos + n_new}" if n_new else ""
            raise EdgeError(
                f"{self!r}: these edges were made for {edges.n_batch} x {edges.n_pos} positions, "
                f"but {where} has {n_batch} x {n_pos}{grown}"
            )
        attended = np.pad(
            attended, ((0, 0), (0, edges.n_pos - n_pos)), constant_values=True
        )  # what is generated is no padding
        for name, position in (("src", edges.src), ("dst", edges.dst)):
            padding = ~attended[edges.row, position]
            if padding.any():
                row, _, _ = edges.table[padding][0]
                raise EdgeError(
                    f"{self!r}: {int(padding.sum())} of these edges have a {name} that is padding, "
                    f"the first in row {row}; there is nothing there to cut or to see"
                )
        MaskEdit.check(self, n_layers, n_heads, attended)
        for layer in self.layers or (0,):  # type: ignore[union-attr]
            self._exist("head", self.heads_at(layer) or (), n_heads)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `edit_from_json` gives an equal edit back."""
        heads: Any = self.heads
        if isinstance(heads, HeadsByLayer):
            heads = {str(layer): list(chosen) for layer, chosen in heads.items()}
        return {
            "edit": type(self).__name__,
            "edges": self.edges.to_json(),
            "layers": self.layers,
            "heads": heads,
            "tower": self.tower,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EdgeEdit:
        """The edit of this kind that `to_json` wrote."""
        heads = data["heads"]
        if isinstance(heads, dict):
            heads = {int(layer): chosen for layer, chosen in heads.items()}
        return cls(EdgeSet.from_json(data["edges"]), data["layers"], heads, data["tower"])


@dataclass(frozen=True, repr=False)
class Knockout(EdgeEdit):
    """Cut attention edges: each `dst` no longer sees its `src`.

    An edge that the mask closes anyway (a later token, padding) is an `EdgeError`: one thought
    that it carried something, and it does not. `edges.causal()` keeps only the open ones.

    Usage: `model.run(x, Knockout(x.grid.edges(src=12, dst=22), layers=range(1, 4), heads=[0, 2]))`
    """

    opens: ClassVar[bool] = False


@dataclass(frozen=True, repr=False)
class Unmask(EdgeEdit):
    """Open attention edges: each `dst` newly sees its `src`, positions and rotations unchanged.

    Edges that were open already stay open and are counted as such in the receipt;
    `Unmask(x.grid.image_block())` makes attention bidirectional inside each image.
    """

    opens: ClassVar[bool] = True


@dataclass(frozen=True, repr=False)
class EditMask(MaskEdit):
    """Any change of the mask, as a function: what no set of edges says well.

    Attributes:
        fn: `fn(mask, layer)`, given the layer's mask as bool `[batch, head, query, key]`, True =
            may attend, a copy of its own; it edits that in place and returns None, or returns
            another of the same shape.
        layers: of the tower, a number or several; None means all of them.
        tower: "language" or "vision".

    It goes to JSON only if `fn` is a function that another process can import by its name: one
    defined with `def` at the top of a module that is not the script itself. Lambdas, inner
    functions and `functools.partial` have no such name, and `to_json` refuses them.

    Usage: `model.run(x, EditMask(lambda mask, layer: mask & near, layers=range(4)))`
    """

    fn: MaskFunction
    layers: Indices = None
    tower: str = "language"

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"EditMask takes a function fn(mask, layer), not {self.fn!r}")
        self._set_place()

    def __repr__(self) -> str:
        """The call, with the function's name."""
        words = [getattr(self.fn, "__qualname__", repr(self.fn))]
        for field in fields(self)[1:]:
            if (value := getattr(self, field.name)) != field.default:
                shown = list(value) if isinstance(value, tuple) else value
                words.append(f"{field.name}={shown!r}")
        return f"EditMask({', '.join(words)})"

    def to_json(self) -> dict[str, Any]:
        """Plain data; `edit_from_json` gives an equal edit back.

        Raises:
            TypeError: a function that no other process could import by its name.
        """
        name = f"{getattr(self.fn, '__module__', '')}:{getattr(self.fn, '__qualname__', '')}"
        try:
            known = "__main__" not in name and _function_at(name) is self.fn
        except (ImportError, AttributeError, ValueError):
            known = False
        if not known:
            raise TypeError(
                f"{self!r} cannot go to JSON: {name!r} is no function that can be imported by its "
                "name; define it with def at the top of a module, or say the edit as edges"
            )
        layers = self.layers
        return {"edit": "EditMask", "fn": name, "layers": layers, "tower": self.tower}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EditMask:
        """The edit that `to_json` wrote; imports the function's module."""
        return cls(_function_at(data["fn"]), data["layers"], data["tower"])


def _function_at(name: str) -> MaskFunction:
    module, qualname = name.split(":")
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found
