"""What servers have, and what a function or a class of this side needs that they lack.

They have nnsight's own list of packages and what these bring (`SERVER`). They have neither this
library nor a user's own files, which are shipped; nor other libraries, which are not.
"""

from __future__ import annotations

import functools
import sys
import textwrap
import types
from typing import Any

from nnsight.intervention.serialization import _function_referenced_names

from interp.remote.sources import source_of

#: packages that are on a server: nnsight's list, and what they are made of
SERVER = {
    "torch", "numpy", "transformers", "accelerate", "diffusers", "einops", "peft", "nnsight",
    "tokenizers", "safetensors", "huggingface_hub", "PIL", "cloudpickle", "pydantic", "tqdm",
    *sys.stdlib_module_names,
}  # fmt: skip
OWN = "interp"
SUPER = "super(), and with it the class it was written in"


@functools.cache
def needs_of(func: Any) -> str:
    """What a function needs that it will not have there, or nothing."""
    if "__class__" in func.__code__.co_freevars:
        return SUPER
    source = textwrap.dedent(source_of(func))
    if func.__name__ == "<lambda>":  # whose source is that of the statement around it
        names = set(func.__code__.co_names)
    else:
        names = _function_referenced_names(source) if source else set()
    for name in sorted(names & set(func.__globals__)):
        value = func.__globals__[name]
        if isinstance(value, (types.ModuleType, types.FunctionType, type)):
            root = root_of(value)
            if root == OWN and isinstance(value, type) and foreign_base(value):
                return f"{foreign_base(value)}"
            if root not in SERVER and root not in (OWN, "__main__") and installed(root):
                return root
            if isinstance(value, type) and root in SERVER and not _found(value):
                return value.__qualname__
    return ""


def foreign_base(cls: type) -> str:
    """A base of a class of this library that servers lack, or nothing."""
    for base in cls.__mro__:
        if root_of(base) not in SERVER | {OWN, "__main__"}:
            return f"{base.__module__}.{base.__qualname__}"
    return ""


def root_of(value: Any) -> str:
    """The package that a module, function or class is of."""
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0]
    return str(getattr(value, "__module__", "") or "").partition(".")[0]


def installed(root: str) -> bool:
    """Whether a module is an installed library; others are a user's own, and are shipped."""
    module = sys.modules.get(root)
    return "site-packages" in (getattr(module, "__file__", None) or "")


def is_users(value: Any) -> bool:
    """Whether a function or class is of a user's own files, which servers lack."""
    root = root_of(value)
    return root not in SERVER | {OWN, "__main__", ""} and not installed(root)


def _found(cls: type) -> bool:
    """Whether a class is where it says it is; some of compiled libraries are not."""
    return getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls


def name_of(value: Any) -> str:
    """A function's or class's full name."""
    return f"{value.__module__}.{value.__qualname__}"
