"""A hook as an object: `.output` reads the value there, assigning writes it.

`model.hook("blocks.2.attn.hook_z")` inside a trace gives a `Site`. Behind it is one side of one
nnsight envoy and a way of seeing the tensor there: as it is, as the first element of a tuple, or
with the last axis split by head. All of these are *views*, so an edit in place counts just as an
assigned one does.

>>> # with model.trace(x):
>>> #     model.hook("blocks.2.attn.hook_z").output[:, :, 3] = 0       # in place
>>> #     site = model.hook("blocks.4.hook_resid_post")
>>> #     site.output = site.output * 0.5                              # assigned
"""

from __future__ import annotations

from typing import Any

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
    """

    __slots__ = ("_envoy", "_off_path", "_place", "name")  # a misspelt attribute must not pass

    def __init__(self, name: str, envoy: Any, place: Place, *, off_path: bool = False) -> None:
        self.name = name
        self._off_path = off_path
        self._envoy = envoy
        self._place = place

    def __repr__(self) -> str:
        return f"Site({self.name!r} at {self._envoy.path}.{self._place.side})"

    @property
    def output(self) -> Tensor:
        """The value here: waits until the forward pass reaches it. Only inside a trace."""
        raw = self._raw()
        if self._place.view == "first" and isinstance(raw, tuple):
            raw = raw[0]
        if self._place.view == "heads":
            return raw.unflatten(-1, (-1, self._place.d_head))
        return raw

    @output.setter
    def output(self, value: Tensor) -> None:
        if self._off_path:
            raise EditHadNoEffect(
                f"an edit at {self.name!r} cannot reach the logits: the adapter reads an earlier "
                "stage of the vision tower (model.adapter_reads)"
            )
        if self._place.view == "heads":
            value = value.flatten(-2)
        if self._place.view == "first" and isinstance(raw := self._raw(), tuple):
            value = (value, *raw[1:])  # type: ignore[assignment]
        setattr(self._envoy, self._place.side, value)

    def _raw(self) -> Any:
        return self._envoy.input if self._place.side == "input" else self._envoy.output


def envoy_at(root: Any, path: str) -> Any:
    """The nnsight envoy at a dotted path below `root`; numbers index lists of modules."""
    for part in path.split("."):
        root = root[int(part)] if part.isdigit() else getattr(root, part)
    return root
