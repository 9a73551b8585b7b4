"""Edits of values where a hook stands: `Ablate`, `Patch`, `Steer`, `Scale`.

Where a mask edit says who may look at whom, a value edit overwrites or moves what is there: the
output of a head, the residual stream at some positions, the image tokens that leave the adapter.

* `Ablate` takes a part out. By what it is replaced decides what one learns: zeros are a value the
  model may never have seen ("zero"); the mean keeps what is common and takes out what differs
  ("mean", Wang et al. 2022, 2211.00593); another row's value stays on the distribution ("resample",
  Chan et al. 2022, causal scrubbing).
* `Patch` puts in what another run had at the same place (activation patching, Meng et al. 2022,
  2202.05262): the clean run's into a corrupted one, or the other way round.
* `Steer` adds a direction, `Scale` multiplies.

**Where.** `hook` is a hook name or a glob. With `layers=` (or `heads` by layer) it is the name
inside a block instead: `Ablate("attn.hook_z", layers=window(10, 5), heads=3)`, in the vision tower
"vision.attn.hook_z". `heads` are those of the hook: query heads at `hook_z`, key-value heads at
`hook_k` and `hook_v`. `positions` are counted in the tensor at the hook (`interp.edits.positions`);
left out, they are all that is no padding. A place of the prompt may be named: "image", "last".

**Order.** Edits at one hook apply in the order in which they are given to `model.run`, each on what
the earlier ones left, before the reads there. `Ablate` and `Patch` *set*: given after another edit
of the same entries they would silently undo it, so that is refused (`check_together`). `Steer` and
`Scale` may follow anything. Mask edits act elsewhere and contradict nothing.

>>> Ablate("attn.hook_z", heads={8: [3, 0], 10: 1}, with_="mean")
Ablate('attn.hook_z', with_='mean', heads={8: [0, 3], 10: [1]})
>>> Ablate("blocks.1.hook_mlp_out", positions=[4, 5]).to_json()["positions"]
[4, 5]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from interp.edits.tensors import Frozen, Source
from interp.edits.where import ValueEdit
from interp.errors import EditHadNoEffect, NotRead, PositionError, UnknownHook

__all__ = ["Ablate", "Patch", "Scale", "Steer", "ValueEdit", "check_together"]

if TYPE_CHECKING:
    from interp.hooked import Hooked
    from interp.inputs import Inputs


@dataclass(frozen=True, repr=False)
class Ablate(ValueEdit):
    """Take a part out and put something in its place.

    Attributes:
        with_: what is put there:

            * "zero";
            * "mean": one vector (a head), the mean over all positions that the edit selects, in
              all rows. With `positions=x.grid` that is the mean image token;
            * "resample": the values of another row, the same other row at every hook: the k-th
              selected position takes that row's k-th. It needs as many in each row, and two rows;
            * a tensor, `[d]` or `[head, d]`: a mean over some reference data, for instance.
        seed: of "resample": which row takes from which; none takes from itself.

    Usage: `model.run(x, Ablate("attn.hook_z", layers=[2, 3], heads=5, positions=x.grid))`
    """

    with_: Any = "zero"
    seed: int = field(default=0, kw_only=True)

    sets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ValueEdit.__post_init__(self)
        if isinstance(self.with_, Tensor):
            object.__setattr__(self, "with_", _vector(self.with_, "with_", n_axes=(1, 2)))
        elif not isinstance(self.with_, Frozen) and self.with_ not in ("zero", "mean", "resample"):
            hint = "; what another run had there is put in by Patch(hook, from_=run)"
            raise ValueError(
                f'Ablate(with_={self.with_!r}): "zero", "mean", "resample" or a tensor would do'
                f"{hint if hasattr(self.with_, 'states') else ''}"
            )
        if self.seed and self.with_ != "resample":
            raise ValueError(f"Ablate(seed={self.seed}): only with_='resample' draws anything")

    def check(self, model: Hooked, x: Inputs) -> None:
        """Raise unless the model has this edit's hooks, heads and positions, and they matter."""
        ValueEdit.check(self, model, x)
        for name in self.names(model):
            if self.with_ != "zero":
                _no_keys(self, model, name)
            if self.with_ == "resample":
                self._donors(self.rows(model, x, name), name)

    def _new(self, value: Tensor, mask: Tensor, name: str) -> Tensor:
        if isinstance(self.with_, Frozen):
            vector = self.with_.tensor.to(value.device)
            fits = [value.shape[-1:]] + [value.shape[2:]] * (value.ndim == 4)
            if vector.shape not in fits:
                raise ValueError(
                    f"{self!r}: a tensor {list(vector.shape)} for values {list(value.shape)} at "
                    f"{name}; {' or '.join(str(list(shape)) for shape in fits)} would do"
                )
            return vector
        if self.with_ == "zero":
            return value.new_zeros(())
        if self.with_ == "mean":
            kept = torch.where(mask, value.float(), 0.0)
            n = mask.expand(*value.shape[:-1], 1).sum((0, 1), keepdim=True)
            return kept.sum((0, 1), keepdim=True) / n.clamp(min=1)
        rows = mask.flatten(2).any(-1)
        new = value.clone()
        for row, donor in self._donors(rows, name).items():
            new[row, rows[row]] = value[donor, rows[donor]]
        return new

    def _donors(self, rows: Tensor, name: str) -> dict[int, int]:
        """From which row each row takes, given which positions `[batch, pos]` are selected."""
        counts = rows.sum(1).tolist()
        there = [row for row, n in enumerate(counts) if n]
        if len(there) < 2:
            raise EditHadNoEffect(
                f"{self!r} resamples from another row, but at {name} it selects in {len(there)} of "
                f"{len(counts)}; give a batch, and positions in several of its rows"
            )
        if len({counts[row] for row in there}) > 1:
            raise PositionError(
                f"{self!r} resamples position by position, but at {name} it selects {counts} in "
                "the rows of the batch (padding never); choose as many in each, as x.grid does"
            )
        order = np.random.default_rng(self.seed).permutation(there).tolist()
        return dict(zip(order, order[1:] + order[:1], strict=True))


@dataclass(frozen=True, repr=False)
class Patch(ValueEdit):
    """Put in what another run had at the same hook (activation patching).

    The other run must have read the hooks, on a batch of the same shape. It is shared, not copied.
    To JSON goes what tells it apart, not its tensors: `Patch.from_json(data, from_=run)` takes it
    again, and refuses another one.

    Attributes:
        from_: a `Run`, a cache, or tensors by hook name.

    Usage: `model.run(x, Patch("blocks.2.attn.hook_z", from_=run, heads=5))`
    """

    from_: Any

    sets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ValueEdit.__post_init__(self)
        object.__setattr__(self, "from_", Source.given(self.from_, self.pattern))

    def check(self, model: Hooked, x: Inputs) -> None:
        """Raise unless the model has this edit's hooks, heads and positions, and they matter."""
        ValueEdit.check(self, model, x)
        for name in self.names(model):
            if name not in self.from_.tensors:
                raise NotRead(
                    f"{self!r} acts at {name}, which the run it patches from did not read; pass "
                    f"read={self.pattern!r} to that run"
                )

    def _new(self, value: Tensor, mask: Tensor, name: str) -> Tensor:
        other: Tensor = self.from_.tensors[name].tensor
        if other.shape != value.shape or other.dtype != value.dtype:
            raise ValueError(
                f"{self!r}: the run it patches from has {other.dtype} {list(other.shape)} at "
                f"{name}, this one {value.dtype} {list(value.shape)}; both must be alike"
            )
        return other.to(value.device)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], from_: Any = None) -> Patch:
        """The patch that `to_json` wrote, given the run it was from.

        Raises:
            ValueError: no run, or another one than that which was patched from.
        """
        given = data["from_"]
        if from_ is None:
            raise ValueError(
                f"this Patch is from a run whose tensors JSON does not hold (it read "
                f"{', '.join(given['read'])}); run that again and pass it: "
                "Patch.from_json(data, from_=run)"
            )
        made = super().from_json({**data, "from_": from_})
        assert isinstance(made, Patch)
        if made.from_.digest != given["sha256"]:
            raise ValueError(
                f"{made!r}: this is not the run that was patched from, whose states had the digest "
                f"{given['sha256'][:8]}"
            )
        return made


@dataclass(frozen=True, repr=False)
class Steer(ValueEdit):
    """Add a direction: `value + scale * direction`.

    Attributes:
        direction: `[d]`, of the width of the last axis at the hook.
        scale: factor on it.
        relative: take the direction at unit length times the norm of the vector it is added to, so
            that `scale` says the same in every layer: 0.5 adds half of what is there.

    Usage: `model.run(x, Steer("blocks.2.hook_resid_post", direction, 4.0, positions=x.grid))`
    """

    direction: Any
    scale: float = 1.0
    relative: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        ValueEdit.__post_init__(self)
        if not isinstance(self.direction, Frozen):
            object.__setattr__(self, "direction", _vector(self.direction, "direction"))
        object.__setattr__(self, "scale", _number(self.scale, "scale"))
        if self.relative and not self.direction.tensor.any():
            raise EditHadNoEffect("a direction of zeros has no unit length, and steers nothing")

    def check(self, model: Hooked, x: Inputs) -> None:
        """Raise unless the model has this edit's hooks, heads and positions, and they matter."""
        ValueEdit.check(self, model, x)
        for name in self.names(model):
            _no_keys(self, model, name)

    def _new(self, value: Tensor, mask: Tensor, name: str) -> Tensor:
        direction = self.direction.tensor.to(value.device)
        if direction.shape != value.shape[-1:]:
            raise ValueError(
                f"{self!r}: a direction of {direction.shape[0]} for vectors of {value.shape[-1]} "
                f"at {name}"
            )
        if self.relative:
            unit = direction.float() / direction.float().norm()
            return value.float() + self.scale * value.float().norm(dim=-1, keepdim=True) * unit
        return value + (self.scale * direction).to(value.dtype)


@dataclass(frozen=True, repr=False)
class Scale(ValueEdit):
    """Multiply: `factor * value`.

    Attributes:
        factor: 0 takes out, 1 does nothing (and raises), 2 doubles, -1 turns round.

    Usage: `model.run(x, Scale("blocks.2.attn.hook_z", 0.5, heads=[0, 3]))`
    """

    factor: float

    def __post_init__(self) -> None:
        ValueEdit.__post_init__(self)
        object.__setattr__(self, "factor", _number(self.factor, "factor"))

    def _new(self, value: Tensor, mask: Tensor, name: str) -> Tensor:
        return value * self.factor


def check_together(edits: Sequence[ValueEdit], model: Hooked, x: Inputs) -> None:
    """Raise for an edit that overwrites what an earlier one of the same run wrote.

    Raises:
        ValueError: an `Ablate` or `Patch` after another edit of the same entries of one hook.
    """
    at: dict[str, list[ValueEdit]] = {}
    for edit in edits:
        for name in edit.names(model):
            for earlier in at.get(name, []) if edit.sets else []:
                if _overlap(earlier, edit, model, x, name):
                    raise ValueError(
                        f"{edit!r} overwrites what {earlier!r} writes at {name}, in the same heads "
                        "and positions; give the one that sets first, or keep them apart"
                    )
            at.setdefault(name, []).append(edit)


def _overlap(a: ValueEdit, b: ValueEdit, model: Hooked, x: Inputs, name: str) -> bool:
    heads_a, heads_b = a.heads_at(name), b.heads_at(name)
    if heads_a is not None and heads_b is not None and not set(heads_a) & set(heads_b):
        return False
    return bool((a.rows(model, x, name) & b.rows(model, x, name)).any())


def _no_keys(edit: ValueEdit, model: Hooked, name: str) -> None:
    """Rows of attention are no vectors: entry k is about key k, in this row only."""
    if model.hooks.shape(name).endswith("key"):
        raise UnknownHook(
            f"{edit!r}: {name} holds scores or weights by key, which have no mean, direction or "
            'counterpart in another row; Ablate(with_="zero"), Scale and Patch work there'
        )


def _vector(value: Any, name: str, n_axes: tuple[int, ...] = (1,)) -> Frozen:
    tensor = torch.as_tensor(value)
    if tensor.ndim not in n_axes or not tensor.is_floating_point() or not tensor.isfinite().all():
        raise ValueError(
            f"{name} is a tensor of {' or '.join(map(str, n_axes))} axes of finite numbers, not "
            f"{tensor.dtype} {list(tensor.shape)}"
        )
    return Frozen(tensor)


def _number(value: Any, name: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name}={value!r} is no finite number")
    return number
