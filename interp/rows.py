"""A model cut down to some rows of its batch: how edits of one variant see a batch of many.

`interp.many` runs many variants of one input together, one behind the other along the batch
dimension. Each variant's edits were written for the input alone: their edges count its rows, their
patches have its shape, their receipts its numbers. So each of them is handed `Rows`, a model that
is the real one but for two things: a hook's value is the variant's share of the tensor there, and
the mask among a module's arguments is that of its rows. What it writes goes into its share only.

All variants of a batch write into one tensor, a copy that is made when the first of them writes: a
value read further up, which may be the very same tensor, stays what it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.hooked import Hooked
from interp.sites import Site, fits


class Batch:
    """What the variants of one forward pass share: the model, and what they have written.

    Args:
        model: the real one.
        n: how many variants there are.
    """

    def __init__(self, model: Hooked, n: int) -> None:
        self.model, self.n = model, n
        self._sites: dict[str, Site] = {}
        self._written: set[str] = set()
        self._calls: dict[str, Call] = {}

    def site(self, name: str) -> Site:
        """A hook of the whole batch; one object for all variants."""
        if name not in self._sites:
            self._sites[name] = self.model.hook(name)
        return self._sites[name]

    def call(self, path: str) -> Call:
        """A module's arguments, of the whole batch; one object for all variants."""
        if path not in self._calls:
            self._calls[path] = Call(self, path)
        return self._calls[path]

    def share(self, value: Tensor, number: int, axis: int = 0) -> Tensor:
        """Variant `number`'s part of a tensor, a view; all of what is the same for all rows."""
        if value.shape[axis] == 1:
            return value
        size = value.shape[axis] // self.n
        return value.narrow(axis, number * size, size)

    def read(self, name: str, number: int) -> Tensor:
        """A variant's part of the tensor at a hook, a view."""
        return self.share(self.site(name).output, number)

    def write(self, name: str, number: int, value: Tensor) -> None:
        """Put a value into a variant's part of the tensor at a hook."""
        site = self.site(name)
        fits(name, value, self.read(name, number))
        if name not in self._written:
            self._written.add(name)
            site.output = site.output.clone()
        self.read(name, number).copy_(value)


class Call:
    """A module's arguments in the whole batch, with the mask that its variants have written."""

    def __init__(self, batch: Batch, path: str) -> None:
        self.batch, self.envoy = batch, batch.model.envoy(path)
        self.args, self.kwargs = self.envoy.inputs
        self.mask: Tensor | None = None

    def read(self, number: int) -> tuple[Any, dict[str, Any]]:
        """The arguments before anybody wrote, with a variant's rows of states and mask."""
        own = dict(self.kwargs)
        for name in ("hidden_states", "attention_mask"):
            if isinstance(own.get(name), Tensor):
                own[name] = self.batch.share(own[name], number)
        return self.args, own

    def write(self, number: int, kwargs: dict[str, Any]) -> None:
        """Put a variant's mask, `[row, 1 or head, query, key]`, into that of the batch."""
        if self.batch.n == 1:  # whatever it is called
            self.envoy.inputs = (self.args, kwargs)
            return
        mask = kwargs["attention_mask"]
        n_heads = mask.shape[1]
        if self.mask is None:
            whole = self.kwargs.get("attention_mask")
            if whole is None:
                full = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device)
                causal = getattr(self.envoy._module, "is_causal", True)
                whole = (full.tril() if causal else full)[None, None]
                if mask.dtype != torch.bool:
                    lowest = torch.finfo(mask.dtype).min
                    whole = torch.zeros_like(whole, dtype=mask.dtype).masked_fill(~whole, lowest)
            n_rows = self.batch.n * mask.shape[0]
            self.mask = whole.expand(n_rows, max(n_heads, whole.shape[1]), -1, -1).clone()
        elif n_heads > self.mask.shape[1]:
            self.mask = self.mask.expand(-1, n_heads, -1, -1).clone()
        self.batch.share(self.mask, number).copy_(mask)
        self.envoy.inputs = (self.args, {**self.kwargs, "attention_mask": self.mask})


class Rows:
    """The model as one variant sees it; what is not about rows is the real model's.

    It is bound to its batch when that is put together. Values and calls of a module that the batch
    does not run, since its outcome is worked out beforehand, may be given instead.
    """

    def __init__(self, model: Hooked) -> None:
        self._model = model
        self._batch: Batch | None = None
        self._number = 0
        self.values: dict[str, Tensor] = {}
        self.calls: dict[str, GivenCall] = {}

    def bind(self, batch: Batch, number: int) -> None:
        """Say which variant of which batch this is."""
        self._batch, self._number = batch, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def hook(self, name: str) -> Any:
        """The variant's part of a hook, with `output` as `Site` has it."""
        if name in self.values:
            return GivenValue(self.values[name])
        return Share(self._batch, self._number, name)

    def envoy(self, path: str) -> Any:
        """A module with the variant's part of its `inputs`."""
        return self.calls[path] if path in self.calls else ShareOfCall(self, path)

    def call(self, path: str) -> Call:
        """Of the whole batch."""
        assert self._batch is not None, "bind comes before the pass"
        return self._batch.call(path)

    @property
    def number(self) -> int:
        """Of the variant in its batch."""
        return self._number


class GivenValue:
    """A hook's value that is known before the pass."""

    __slots__ = ("output",)

    def __init__(self, output: Tensor) -> None:
        self.output = output


class GivenCall:
    """A module's arguments that are known before the pass, to be overwritten by one variant."""

    __slots__ = ("inputs",)

    def __init__(self, inputs: tuple[Any, dict[str, Any]]) -> None:
        self.inputs = inputs


class Share:
    """What `Site` is for a whole batch."""

    __slots__ = ("_batch", "_number", "name")

    def __init__(self, batch: Batch | None, number: int, name: str) -> None:
        assert batch is not None, "bind comes before the pass"
        self._batch, self._number, self.name = batch, number, name

    @property
    def output(self) -> Tensor:
        """The variant's part of the value here, a view."""
        return self._batch.read(self.name, self._number)

    @output.setter
    def output(self, value: Tensor) -> None:
        self._batch.write(self.name, self._number, value)


class ShareOfCall:
    """A module's arguments as one variant sees them."""

    __slots__ = ("_path", "_rows")

    def __init__(self, rows: Rows, path: str) -> None:
        self._rows, self._path = rows, path

    @property
    def inputs(self) -> tuple[Any, dict[str, Any]]:
        """(args, kwargs), with the mask of the variant's rows."""
        return self._rows.call(self._path).read(self._rows.number)

    @inputs.setter
    def inputs(self, value: tuple[Any, dict[str, Any]]) -> None:
        self._rows.call(self._path).write(self._rows.number, value[1])
