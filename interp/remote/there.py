"""What runs on the server: the few functions that a request begins and ends with.

They are shipped by source like all else (`interp.shipping` says what that allows). `hooked` makes
the model that the code of this library runs on; `answered` calls a function of it there and gives
back plain data, errors of this library included, so that they are raised here as what they are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from interp.errors import InterpError
from interp.hooked import Hooked


def hooked(nn: Any, family: Any, hooks: Any, cfg: Any, vision_reads: Any, deepstack: Any) -> Hooked:
    """A hosted model, as the code of this library sees it there."""
    model = Hooked()
    model.nn, model.module = nn, nn._module
    model.family, model.hooks, model.cfg = family, hooks, cfg
    model.vision_reads, model.deepstack = vision_reads, deepstack
    model.stock = True
    model.ready()
    return model


def cached(function: Callable[[Any], Any], name: str) -> Any:
    """A cached property, made again."""
    made = functools.cached_property(function)
    made.attrname = name
    return made


def new_class(name: str, qualname: str, module: str, bases: tuple[type, ...]) -> Any:
    """An empty class, which `fill_dataclass` makes a dataclass; its methods may speak of it."""
    return types.new_class(
        name, bases, {}, lambda body: body.update(__qualname__=qualname, __module__=module)
    )


def fill_dataclass(cls: Any, parts: Any) -> None:
    """Make the dataclass that it is elsewhere.

    Args:
        cls: of `new_class`.
        parts: (what was written in it, all its fields, the decorator's arguments). Its bases need
            not be filled yet: classes may speak of one another.
    """
    body, fields, options = parts
    for name, value in body.items():
        setattr(cls, name, value)
    annotations = {}
    for told in fields:
        how = dict(told)
        name = how.pop("name")
        annotations[name] = object  # words would be looked up in a module that is not there
        setattr(cls, name, dataclasses.field(**how))
    cls.__annotations__ = annotations
    dataclasses.dataclass(**options)(cls)


def missing(name: str, library: str) -> Callable[..., Any]:
    """Stands for a function that needs a library which is not on the server."""

    def stub(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} needs {library}, which is not on the server")

    return stub


def answered(
    of: str, function: Callable[..., Any], model: Hooked, args: Any, kwargs: Any, half: bool
) -> dict[str, Any]:
    """What a function returns, ready to travel; or the error of this library that it raised.

    Args:
        of: what was asked, which an answer picked up later is known by.
        function: an `at_model` function, unwrapped.
        model: on this server.
        args, kwargs: the rest of its arguments.
        half: send float32 tensors as float16.

    Returns:
        {"of", "value", "rounding"}, or {"of", "error": (kind, message, notes)}.
    """
    try:
        value = function(model, *args, **kwargs)
    except InterpError as error:
        # by its name: the class here is not the class there
        told = (type(error).__name__, str(error), getattr(error, "__notes__", []))
        return {"of": of, "error": told}
    rounding = [0.0]
    return {"of": of, "value": travelling(value, half, rounding), "rounding": rounding[0]}


def travelling(value: Any, half: bool, rounding: list[float]) -> Any:
    """A value without storage that it does not need, on the CPU.

    Args:
        value: plain data.
        half: cast float32 to float16 where nothing overflows.
        rounding: its first entry becomes the largest relative error (of norms) that this makes.

    Raises:
        TypeError: something else than plain data.
    """
    if isinstance(value, dict):
        return {key: travelling(one, half, rounding) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(travelling(one, half, rounding) for one in value)
    if isinstance(value, Tensor):
        value = value.detach()
        if half and value.dtype == torch.float32 and value.numel() > 1:
            small = value.half()
            size, error = float(value.norm()), float((small.float() - value).norm())
            if math.isfinite(error) and size > 0 and error / size < 1e-2:  # else nothing is left
                rounding[0] = max(rounding[0], error / size)
                value = small
        # a view would take all that it is a view of along
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        return value.cpu() if whole else value.cpu().clone()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} does not travel: tensors, numbers, words and lists do")
