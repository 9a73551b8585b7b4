"""What was asked, in a few letters, so that a job is picked up by the call it answers only.

The digest covers a function's name and what it was given: tensors and arrays by their bytes,
dataclasses and other objects by what they hold, functions by their code and what they close over.
The model is left out. Processes agree on it, as pickles of the same things do not.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from interp.hooked import Hooked


def what_was_asked(function: Any, args: Any, kwargs: Any) -> str:
    """A function's name and a digest of its arguments."""
    digest = hashlib.sha256()
    for part in _parts([args, kwargs], set()):
        digest.update(part)
    return f"{function.__module__}.{function.__qualname__} {digest.hexdigest()[:16]}"


def _parts(value: Any, seen: set[int]) -> Iterator[bytes]:
    """Bytes that tell a value apart; `seen` are the objects on the way to it."""
    yield type(value).__name__.encode()
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
        yield repr(value).encode()
        return
    if isinstance(value, Hooked) or id(value) in seen:
        return
    seen = seen | {id(value)}
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {list(value.shape)}".encode()
        flat = value.detach().cpu().contiguous().flatten()
        yield flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _parts(key, seen)
            yield from _parts(one, seen)
    elif isinstance(value, (list, tuple, range)):
        for one in value:
            yield from _parts(one, seen)
    elif isinstance(value, (set, frozenset)):
        yield from sorted(b"".join(_parts(one, seen)) for one in value)
    elif isinstance(value, types.FunctionType):
        yield from _code(value.__code__)
        closed = [cell.cell_contents for cell in value.__closure__ or () if _bound(cell)]
        yield from _parts([value.__defaults__, value.__kwdefaults__, closed], seen)
    elif isinstance(value, types.MethodType):
        yield from _parts([value.__func__, value.__self__], seen)
    elif isinstance(value, type):
        yield value.__qualname__.encode()
    elif hasattr(value, "__dict__"):
        yield from _parts({k: v for k, v in vars(value).items() if _held(value, k)}, seen)


def _held(value: Any, name: str) -> bool:
    """Whether an attribute is what an object was made of, and not worked out since."""
    of_class = inspect.getattr_static(type(value), name, None)
    return name != "_version" and not isinstance(of_class, functools.cached_property)


def _code(code: types.CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _code(const)
        else:
            yield repr(const).encode()


def _bound(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
