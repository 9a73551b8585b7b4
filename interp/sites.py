"""A hook as an object: `.output` reads the value there, assigning writes it.

`model.hook("blocks.2.attn.hook_z")` inside a trace gives a `Site`. Behind it is one side of one
nnsight envoy and a way of seeing the tensor there: the first element of a tuple, one third of a
fused projection, the last axis split by head, a batch axis put in front of packed patches. All of
these are *views*, so an edit in place counts just as an assigned one does.

>>> # with model.trace(x):
>>> #     model.hook("blocks.2.attn.hook_z").output[:, :, 3] = 0       # in place
>>> #     site = model.hook("blocks.4.hook_resid_post")
>>> #     site.output = site.output * 0.5                              # assigned
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.errors import EditHadNoEffect
from interp.families.base import Place


class Site:
    """One hook inside a running trace.

    Args:
        name: the hook's name.
        envoy: the nnsight envoy of the module that carries it.
        place: its side and view (see `interp.families.base.Place`).
        off_path: whether the adapter reads an earlier stage, so that an edit would do nothing.
        shared: whether the tensor here also goes somewhere past this hook (to the adapter, which
            reads what enters a block as well as what leaves the last); then `output` is a copy that
            the block alone gets, lest an edit in place reach further than an assigned one.
    """

    # a misspelt attribute must not pass
    __slots__ = ("_envoy", "_off_path", "_place", "_shared", "name")

    def __init__(
        self, name: str, envoy: Any, place: Place, *, off_path: bool = False, shared: bool = False
    ) -> None:
        self.name = name
        self._off_path = off_path
        self._shared = shared
        self._envoy = envoy
        self._place = place

    def __repr__(self) -> str:
        return f"Site({self.name!r} at {self._envoy.path}.{self._place.side})"

    @property
    def output(self) -> Tensor:
        """The value here: waits until the forward pass reaches it. Only inside a trace."""
        if self._shared:
            setattr(self._envoy, self._place.side, self._raw().clone())
            self._shared = False
        raw = self._raw()
        value = see(raw, self._place)
        if torch.is_grad_enabled() and value.requires_grad and self._place.viewed:
            # the graph must run through what the caller holds, or its gradient stays None
            setattr(self._envoy, self._place.side, put(raw, value, self._place))
        return value

    @output.setter
    def output(self, value: Tensor) -> None:
        if self._off_path:
            raise EditHadNoEffect(
                f"an edit at {self.name!r} cannot reach the logits: the adapter reads an earlier "
                "stage of the vision tower (model.adapter_reads)"
            )
        raw = self._raw()
        fits(self.name, value, see(raw, self._place))
        setattr(self._envoy, self._place.side, put(raw, value, self._place))

    def _raw(self) -> Any:
        return self._envoy.input if self._place.side == "input" else self._envoy.output


def fits(name: str, edited: Any, value: Tensor) -> None:
    """Raise for an edit of another shape, which may broadcast into wrong numbers, or precision.

    Args:
        name: of the hook.
        edited: what came.
        value: what is there.
    """
    if not isinstance(edited, Tensor):
        raise ValueError(f"{name!r} was given {type(edited).__name__}, no tensor; or return None")
    if edited.shape != value.shape or edited.dtype != value.dtype:
        raise ValueError(
            f"{name!r} was given {edited.dtype} {list(edited.shape)}, but the tensor there is "
            f"{value.dtype} {list(value.shape)}; give one like that (.to(value.dtype)), or None"
        )


def see(raw: Any, place: Place) -> Tensor:
    """The hook's tensor, as a view into what the module holds."""
    tensor: Tensor = raw[0] if isinstance(raw, tuple) else raw
    if place.part is not None:
        tensor = tensor.unflatten(-1, (3, -1)).select(-2, place.part)
    if place.d_head:
        tensor = tensor.unflatten(-1, (-1, place.d_head))
    return tensor.unsqueeze(0) if place.packed else tensor


def put(raw: Any, value: Tensor, place: Place) -> Any:
    """What the module must hold for the hook's tensor to be `value`.

    Args:
        raw: what the module holds now.
        value: in the hook's shape.
        place: how the hook's tensor is seen.
    """
    if place.packed:
        value = value.squeeze(0)
    if place.d_head:
        value = value.flatten(-2)
    if place.part is not None:
        fused = raw.clone()
        fused.unflatten(-1, (3, -1)).select(-2, place.part).copy_(value)
        return fused
    if isinstance(raw, tuple):
        return (_laid_out_as(raw[0], value), *raw[1:])
    return _laid_out_as(raw, value)


def _laid_out_as(raw: Tensor, value: Tensor) -> Tensor:
    """`value` with the strides of `raw`: matrix kernels round differently by layout, and an edit
    that changes no number must change no bit."""
    if value.stride() == raw.stride() or value.shape != raw.shape or 0 in raw.stride():
        return value
    alike = torch.empty_strided(raw.shape, raw.stride(), dtype=value.dtype, device=value.device)
    return alike.copy_(value)


def envoy_at(root: Any, path: str) -> Any:
    """The nnsight envoy at a dotted path below `root`; numbers index lists of modules."""
    for part in path.split("."):
        root = root[int(part)] if part.isdigit() else getattr(root, part)
    return root
