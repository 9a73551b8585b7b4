"""`@at_model`: a function that runs where its model is, in this process or on a server.

Everything that opens a trace does so inside such a function. Its first argument is the model. If
that is here, the function is simply called. If a server hosts it, function and arguments are sent
there by their source (`interp.remote`), run there on the hosted model, and what it returns comes
back. So both ways run the same lines; and a function that opens many traces, a study of all heads,
say, is one request.

What such a function may do is what a server can: it, and all it calls, uses torch, numpy,
transformers, nnsight and this library, no `super()`, and no imports of this library inside
functions. It returns plain data: tensors, numbers, words, and dicts, lists and tuples of these.
What it changes in its arguments stays there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def at_model(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run where the model is that it is given first.

    The keyword `attn`, where it has one, is the kernel that a hosted model is to attend through.
    """

    @functools.wraps(function)
    def where_the_model_is(*args: Any, **kwargs: Any) -> Any:
        if not args:
            raise TypeError(f"{function.__qualname__}: the model comes first, and by position")
        model, *rest = args
        if model.host is None:
            return function(*args, **kwargs)
        return model.host.call(function, model, rest, kwargs)

    return where_the_model_is
