"""Tensors inside edits: compared by content, printed short, and never changed behind one's back.

An edit is data, so two edits with equal tensors are equal and hash alike. The digest that this
takes covers type, shape and bytes; its first letters stand where the edit prints, so that two
directions of one width can be told apart in a table of receipts. The tensor itself is shared, not
copied: patches from one run all hold that run's memory. Should somebody edit it in place
afterwards, using the edit raises.

>>> a, b = Frozen(torch.ones(3)), Frozen(torch.ones(3))
>>> a == b, hash(a) == hash(b), a == Frozen(torch.ones(4))
(True, True, False)
>>> a
tensor([3] 15958e8b)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from interp.errors import NotRead, UnknownHook, nearest
from interp.hooks import Vocabulary


class Frozen:
    """A tensor that compares and hashes by content (see the module docstring)."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()  # shares the version counter that torch keeps of edits
        self._version = self._tensor._version

    @property
    def tensor(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was edited in place since the edit was made.
        """
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"a tensor {list(self._tensor.shape)} that an edit holds was changed in place "
                "after the edit was made; make the edit of tensor.clone()"
            )
        return self._tensor

    @cached_property
    def digest(self) -> str:
        """SHA-256 over type, shape and bytes."""
        tensor = self.tensor.cpu().contiguous()
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __reduce__(self) -> Any:
        return Frozen, (self.tensor,)  # what travels is another tensor, with a count of its own

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Frozen):
            return NotImplemented
        return self is other or self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"tensor({list(self._tensor.shape)} {self.digest[:8]})"

    def to_json(self) -> dict[str, Any]:
        """Type and numbers, exact."""
        tensor = self.tensor
        return {"dtype": str(tensor.dtype).removeprefix("torch."), "values": tensor.tolist()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Frozen:
        """What `to_json` wrote."""
        return cls(torch.tensor(data["values"], dtype=getattr(torch, data["dtype"])))


class Source:
    """States by hook name to patch from: those of a run that an edit's hooks name.

    Args:
        states: of the run.
        pattern: a hook name or glob; what it does not match is not held.

    Raises:
        NotRead: the run holds no state that it matches.
    """

    def __init__(self, states: Mapping[str, Tensor], pattern: str) -> None:
        try:
            names = _Read(states).expand(pattern)
        except UnknownHook:
            raise NotRead(
                f"{pattern!r} is to be patched from a run that did not read it; "
                f"{nearest(pattern, states)} Pass read={pattern!r} to the run that is patched from"
            ) from None
        self.tensors = {name: Frozen(states[name]) for name in names}

    @classmethod
    def given(cls, from_: Any, pattern: str) -> Source:
        """From a `Run`, a TransformerLens cache, or tensors by hook name."""
        if isinstance(from_, Source):
            return from_
        states = getattr(from_, "states", getattr(from_, "cache_dict", from_))
        if not isinstance(states, Mapping) or not all(
            isinstance(t, Tensor) for t in states.values()
        ):
            raise TypeError(
                f"from_={type(from_).__name__}: a run (or a cache) is patched from, "
                "run = model.run(x, read=hook)"
            )
        return cls(states, pattern)

    @property
    def digest(self) -> str:
        """SHA-256 over the names and their tensors."""
        digest = hashlib.sha256()
        for name, frozen in sorted(self.tensors.items()):
            digest.update(f"{name} {frozen.digest};".encode())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Source):
            return NotImplemented
        return self.tensors == other.tensors

    def __hash__(self) -> int:
        return hash(tuple(sorted((n, hash(f)) for n, f in self.tensors.items())))

    def to_json(self) -> dict[str, Any]:
        """What tells the states apart from others, not the states."""
        return {"read": list(self.tensors), "sha256": self.digest}

    def __repr__(self) -> str:
        n = len(self.tensors)
        return f"Run({n} state{'s' * (n != 1)} {self.digest[:8]})"


class _Read(Vocabulary):
    """The hooks that a run has read, so that patterns mean on them what they mean on a model."""

    def __init__(self, states: Mapping[str, Tensor]) -> None:
        self.shapes, self.lacks = dict.fromkeys(states, ""), {}
