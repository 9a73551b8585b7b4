"""Where a value edit acts: which hooks, heads and positions (`ValueEdit`, base of the four kinds).

A hook's tensor has its axes named in the vocabulary: rows first, positions second (or, of scores
and weights, queries third), heads where there are any. From these names and the edit's `heads` and
`positions` comes one bool mask that broadcasts to the value, and an edit is `where(mask, new,
value)`: what it does not select keeps every bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from interp.edits.base import Edit, HeadsByLayer, Indices, indices
from interp.edits.positions import Positions
from interp.edits.tensors import Frozen
from interp.errors import EditHadNoEffect, HeadError, PositionError, UnknownHook
from interp.hooks import canonical

if TYPE_CHECKING:
    from interp.hooked import Hooked
    from interp.inputs import Inputs

#: suffixes in a block whose values other positions read
CARRIED_ON = ("hook_resid_pre", "ln1.", "attn.hook_k", "attn.hook_v", "attn.hook_rot_k")

#: heads in every layer, or by layer
Heads = Indices | Mapping[int, Indices]


@dataclass(frozen=True, repr=False)
class ValueEdit(Edit):
    """Common part of value edits: where they act.

    Attributes:
        hook: a hook name or a glob; with `layers`, or heads by layer, the name inside a block.
        layers: block numbers, for such a hook.
        heads: of the hook: a number, several, or {layer: heads}; None means all of them.
        positions: a place by name, as in `x.places` ("image", "text", "last"); whole numbers (in
            every row), (row, position) pairs, a bool mask `[batch, pos]`, or a grid; None means all
            that is no padding.

    Raises:
        HeadError, PositionError: what no model has.
    """

    hook: str
    layers: Indices = field(default=None, kw_only=True)
    heads: Heads = field(default=None, kw_only=True)
    positions: Any = field(default=None, kw_only=True)

    abstract: ClassVar[bool] = True
    #: whether it replaces what is there, so that earlier edits of the same entries would be lost
    sets: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.hook, str):
            raise UnknownHook(
                f"{type(self).__name__} takes a hook name or a glob, not {self.hook!r}; for "
                "several hooks write {q,k} or [4-12] in one, or give several edits"
            )
        object.__setattr__(self, "hook", canonical(self.hook))
        object.__setattr__(self, "layers", indices(self.layers, "layers"))
        heads: Any = self.heads
        heads = HeadsByLayer(heads) if isinstance(heads, Mapping) else indices(heads, "heads")
        object.__setattr__(self, "heads", heads)
        if not isinstance(self.positions, str):
            object.__setattr__(self, "positions", Positions.of(self.positions))
        if "blocks." in self.hook and self.layers is not None:
            raise UnknownHook(
                f"{self!r} names its layers twice; with layers= the hook is the name inside a "
                'block, as in "attn.hook_z", or "vision.attn.hook_z" in the vision tower'
            )

    def __repr__(self) -> str:
        """The call that makes this edit; what is at its default is left out."""
        words = [repr(self.hook)]
        for one in sorted(fields(self)[1:], key=lambda one: bool(one.kw_only)):
            value = getattr(self, one.name)
            if value != one.default:
                shown = list(value) if isinstance(value, tuple) else value
                words.append(f"{one.name}={shown!r}")
        return f"{type(self).__name__}({', '.join(words)})"

    # -- where ------------------------------------------------------------------------------------

    def names(self, model: Hooked) -> list[str]:
        """The hooks it acts at, in execution order.

        Raises:
            UnknownHook: the model has no such hook.
            HeadError: heads of a layer that is not among the hooks.
        """
        names = model.hooks.expand(self.pattern)
        if isinstance(self.heads, HeadsByLayer):
            there = {_layer(name) for name in names}
            if missing := [layer for layer in self.heads if layer not in there]:
                raise HeadError(
                    f"{self!r} has heads of layer {missing[0]}, but acts in {sorted(there)}"
                )
            names = [name for name in names if _layer(name) in self.heads]
        return names

    @property
    def pattern(self) -> str:
        """The glob over whole hook names that `hook` and `layers` stand for."""
        layers: Any = self.layers
        if layers is None and isinstance(self.heads, HeadsByLayer) and "blocks." not in self.hook:
            layers = self.heads
        if layers is None:
            return self.hook
        suffix = self.hook.removeprefix("vision.")
        numbers = ",".join(str(layer) for layer in layers)
        return f"{self.hook.removesuffix(suffix)}blocks.[{numbers}].{suffix}"

    def check(self, model: Hooked, x: Inputs) -> None:
        """Raise unless the model has this edit's hooks, heads and positions, and they matter."""
        for name in self.names(model):
            axes = model.hooks.shape(name).split()
            if name.endswith("hook_mask"):
                raise UnknownHook(
                    f"{self!r}: {name} is a mask, no value; Knockout and Unmask edit it"
                )
            if model.off_path(name):
                raise EditHadNoEffect(
                    f"{self!r} cannot reach the logits: the adapter reads "
                    f"{model.adapter_reads!r}, and {name} lies behind it"
                )
            self._check_heads(model, name, axes)
            try:
                if self.positions is not None and name == "vision.hook_embed":
                    model.grid_of(name, x)  # raises where the tower reorders its patches
                rows = self.rows(model, x, name)
            except PositionError as error:
                raise PositionError(f"{self!r} at {name}: {error}") from None
            if not (rows & _reaches_adapter(model, x, name)).any():
                raise EditHadNoEffect(
                    f"{self!r} cannot reach the logits: in the last block that the adapter reads, "
                    f"{name} at these positions (CLS) is dropped"
                )

    def _check_heads(self, model: Hooked, name: str, axes: Sequence[str]) -> None:
        heads = self.heads_at(name)
        if heads is None:
            return
        if "head" not in axes and "kv_head" not in axes:
            raise HeadError(
                f"{self!r}: {name} is [{' '.join(axes)}], without an axis of heads; a head's "
                "output is at attn.hook_z (before W_O) and attn.hook_result (behind it)"
            )
        vision = name.startswith("vision.")
        n_heads = model.cfg.n_vision_heads if vision else model.cfg.n_heads
        grouped = "kv_head" in axes and not vision
        n = model.cfg.n_key_value_heads if grouped else n_heads
        for head in heads:
            if head >= n and grouped and n < n_heads:
                hint = f"; query head {head} reads key-value head {head * n // n_heads}"
                raise HeadError(
                    f"{self!r}: {name} has {n} key-value heads, 0..{n - 1}, for {n_heads} query "
                    f"heads, so no head {head}{hint if head < n_heads else ''}"
                )
            if head >= n:
                raise HeadError(f"{self!r}: {name} has no head {head}; its {n} are 0..{n - 1}")

    def heads_at(self, name: str) -> tuple[int, ...] | None:
        """The heads it edits at a hook, None for all of them."""
        if isinstance(self.heads, HeadsByLayer):
            return self.heads[_layer(name)]
        return self.heads  # type: ignore[return-value]

    def rows(self, model: Hooked, x: Inputs, name: str) -> Tensor:
        """`[batch, pos]` bool of the tensor at a hook: the selected positions."""
        if name.startswith(("adapter.", "deepstack.")):
            grid = model.grid_of(name, x)
        else:
            grid = x.patches if name.startswith("vision.") else x.grid
        attended = np.ones((grid.n_batch, grid.n_pos), dtype=bool)
        if grid is x.grid:
            attended = x.tensors["attention_mask"].cpu().numpy().astype(bool)
        if self.positions is None or self.positions == "all":
            return torch.from_numpy(attended)
        if self.positions == "image":
            return torch.from_numpy(grid.is_image)
        if isinstance(self.positions, str):
            if grid is not x.grid:
                raise PositionError(
                    f"the tensor here has no place {self.positions!r}; 'image' and 'all' would do"
                )
            return torch.from_numpy(x.places(self.positions))
        mask: Tensor = self.positions.mask(attended)
        return mask

    def selected(self, value: Tensor, name: str, model: Hooked, x: Inputs) -> Tensor:
        """Which entries it edits: bool, of the value's rank and broadcastable to it."""
        axes = model.hooks.shape(name).split()
        at = next(i for i, axis in enumerate(axes) if axis in ("pos", "token", "query"))
        rows = self.rows(model, x, name).to(value.device)
        if rows.shape != (value.shape[0], value.shape[at]):
            raise PositionError(
                f"{self!r}: the tensor at {name} is {list(value.shape)}, where {list(rows.shape)} "
                "rows and positions were expected"
            )
        mask = rows.view([n if i in (0, at) else 1 for i, n in enumerate(value.shape)])
        heads = self.heads_at(name)
        if heads is None:
            return mask
        axis = next(i for i, word in enumerate(axes) if word in ("head", "kv_head"))
        chosen = torch.zeros(value.shape[axis], dtype=torch.bool, device=value.device)
        chosen[list(heads)] = True
        return mask & chosen.view([-1 if i == axis else 1 for i in range(value.ndim)])

    def n_selected(self, value: Tensor, name: str, model: Hooked, x: Inputs) -> int:
        """How many vectors (entries of all axes but the last) it selects at a hook."""
        mask = self.selected(value, name, model, x)
        return int(mask.expand(*value.shape[:-1], 1).sum())

    # -- what -------------------------------------------------------------------------------------

    def change(self, value: Tensor, name: str, model: Hooked, x: Inputs) -> Tensor:
        """The value after the edit, a new tensor of the same shape; `value` is left alone.

        Scores that the mask closed (minus infinity) stay closed: opening is for `Unmask`.
        """
        mask = self.selected(value, name, model, x)
        new = self._new(value, mask, name)
        if name.endswith("hook_attn_scores"):
            mask = mask & (value != -torch.inf)
        return torch.where(mask, new.to(value.dtype), value)

    def _new(self, value: Tensor, mask: Tensor, name: str) -> Tensor:
        """What is written at the selected entries, broadcastable to `value`."""
        raise NotImplementedError

    # -- as plain data ----------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain data; `edit_from_json` gives an equal edit back."""
        data: dict[str, Any] = {"edit": type(self).__name__}
        for one in fields(self):
            value = getattr(self, one.name)
            data[one.name] = value.to_json() if hasattr(value, "to_json") else value
        if isinstance(self.heads, HeadsByLayer):
            data["heads"] = {str(layer): list(own) for layer, own in self.heads.items()}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ValueEdit:
        """The edit of this kind that `to_json` wrote."""
        given = {name: value for name, value in data.items() if name != "edit"}
        if not isinstance(given["positions"], str):
            given["positions"] = Positions.from_json(given["positions"])
        if isinstance(given["heads"], dict):
            given["heads"] = {int(layer): own for layer, own in given["heads"].items()}
        for name in ("with_", "direction"):
            if isinstance(given.get(name), dict):
                given[name] = Frozen.from_json(given[name])
        return cls(**given)


def _reaches_adapter(model: Hooked, x: Inputs, name: str) -> Tensor:
    """`[pos]` bool, or True: which positions of a hook's tensor go anywhere.

    What no key or value carries on any more, in the last block that the adapter reads, is lost
    unless the adapter takes its position.
    """
    block = model.adapter_reads.removesuffix("hook_resid_post")
    suffix = name.removeprefix(block)
    if suffix == name or suffix.startswith(CARRIED_ON) or not x.adapter.is_image.any(0).all():
        return torch.tensor(True)
    return torch.from_numpy(x.patches.is_image.any(0))


def _layer(name: str) -> int:
    """The block's number in a hook's name, -1 outside of blocks."""
    parts = name.removeprefix("vision.").split(".")
    return int(parts[1]) if parts[0] == "blocks" else -1
