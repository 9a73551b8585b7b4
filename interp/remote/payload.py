"""What goes up: a traced block with all the code it needs, by source.

nnsight ships a block as its source and the names it uses, pickled; functions and classes of
registered modules go by source, too, since a server does not have them. `Payload` does that for
this library, and finds what a server would choke on *here*, before anything is sent:

* a model goes as what it is on the server, without weights (`interp.remote.there.hooked`);
* grids go as their arrays (`CellGrid`), without the label and edge arithmetic of this side;
* a function that needs a library which servers lack (pandas, scikit-learn, plotly), or `super()`,
  whose class is not known there, goes as a stub that says so if it is called;
* dataclasses go as what was written in them, and are made again there: the methods that Python
  generates have no source, and bytecode would fit one version of Python only;
* decorators do not go with a function's source: those of `contextlib.contextmanager` and
  `at_model` are seen to, others raise `WouldNotShip`;
* functions and classes of a user's own files go by source, too, whichever file they are in;
* an import of this library inside a function, and as values modules that servers lack, raise
  `WouldNotShip`, naming them.

What servers have is nnsight's own list and what these packages bring (`SERVER`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import re
import sys
import textwrap
import time
import types
from pathlib import Path
from typing import Any

import cloudpickle.cloudpickle as cp
import nnsight
import zstandard
from nnsight.intervention.serialization import (
    CustomCloudPickler,
    _fill,
    _function_referenced_names,
    _load_function,
    code_reduce,
    reduce_block,
)
from nnsight.ndif import pull_env

from interp.cells import CellGrid
from interp.errors import WouldNotShip
from interp.hooked import Hooked
from interp.remote.there import cached, fill_dataclass, hooked, missing, new_class
from interp.shipping import at_model
from interp.tokens import TokenGrid

#: packages that are on a server: nnsight's list, and what they are made of
SERVER = {
    "torch", "numpy", "transformers", "accelerate", "diffusers", "einops", "peft", "nnsight",
    "tokenizers", "safetensors", "huggingface_hub", "PIL", "cloudpickle", "pydantic", "tqdm",
    *sys.stdlib_module_names,
}  # fmt: skip
OWN = "interp"
#: what a function becomes by the two decorators that ship
MANAGER = contextlib.contextmanager(lambda: iter(())).__code__
SHIPPED = at_model(lambda model: None).__code__
SUPER = "super(), and with it the class it was written in"
#: zstd's; nnsight's client takes the same
LEVEL = 6


def pack_block(tracer: Any, model: Hooked) -> bytes:
    """A captured tracer as the body of a request, compressed.

    What nnsight's `RequestModel.serialize` does, with this library's pickler, and one line more at
    the end of the block: a value that can only be read must not have been edited in place.

    Raises:
        WouldNotShip: something that a server cannot run.
    """
    nnsight.register(OWN)
    pull_env()  # modules beside the user's script
    frame = tracer.info.frame
    local = dict(frame.f_locals)
    source, used_globals, used_locals = reduce_block(tracer.node, frame.f_globals, local)
    if INSIDE.search(source):  # nnsight must know before the pass; on the line of the `with`
        body = source.lstrip("\n")
        blank = len(source) - len(body)
        every = [name for name in model.hooks.names if INSIDE.search(name)]
        used_locals = {**used_locals, NAMES: every}
        source = "\n" * (blank - 1) + f"{CHECK}.require({NAMES})\n" + body
    block = (f"{source}\n{CHECK}.untouched()", used_globals, {**used_locals, CHECK: model})
    return zstandard.ZstdCompressor(level=LEVEL).compress(dumps((tracer, block)))


CHECK, NAMES = "_interp_model", "_interp_names"
#: hooks that are inside a forward
INSIDE = re.compile(r"hook_(rot_q|rot_k|mask)\b")


def dumps(value: Any) -> bytes:
    """Pickled for a server."""
    buffer = io.BytesIO()
    Payload(buffer, protocol=4).dump(value)
    return buffer.getvalue()


class Payload(CustomCloudPickler):
    """nnsight's pickler with this library's rules (see the module docstring)."""

    def reducer_override(self, obj: Any) -> Any:
        """What goes in a way of its own."""
        if isinstance(obj, Hooked):
            return hooked, _model_parts(obj)
        if type(obj) is TokenGrid:
            return CellGrid, tuple(getattr(obj, f.name) for f in dataclasses.fields(CellGrid))
        if isinstance(obj, functools.cached_property):  # holds a lock
            return cached, (obj.func, obj.attrname)
        if isinstance(obj, types.ModuleType) and _root(obj) not in SERVER:
            if _installed(_root(obj)):
                raise WouldNotShip(
                    f"the library {obj.__name__}, which servers lack: do here what needs it, with "
                    "what comes back"
                )
            raise WouldNotShip(
                f"the module {obj.__name__} as a value, which servers lack: import by name what "
                "is used of it, and that is sent"
            )
        if isinstance(obj, (types.FunctionType, type)) and _users(obj):
            if isinstance(obj, type):
                return cp._dynamic_class_reduce(obj)
            return self._dynamic_function_reduce(obj)
        if isinstance(obj, type) and _root(obj) == OWN:
            if base := _foreign_base(obj):
                raise WouldNotShip(f"class {_name(obj)} is a {base}, which servers lack")
            if dataclasses.is_dataclass(obj) and "__dataclass_fields__" in vars(obj):
                bare = (obj.__name__, obj.__qualname__, obj.__module__, obj.__bases__)
                return new_class, bare, _dataclass_parts(obj), None, None, fill_dataclass
        return CustomCloudPickler.reducer_override(self, obj)

    def _dynamic_function_reduce(self, func: Any) -> Any:
        if (inner := getattr(func, "__wrapped__", None)) is not None and _source(inner):
            # only the source of what is inside would go, and the decorator be lost
            if func.__code__ is MANAGER:
                return contextlib.contextmanager, (inner,)
            if func.__code__ is not SHIPPED:
                raise WouldNotShip(
                    f"{_name(func)} is decorated, and what ships is the source below the "
                    "decorator: do inside it what the decorator does"
                )
            func = inner
        if not _as_imported(func):
            raise WouldNotShip(
                f"{func.__code__.co_filename} was edited since it was imported, and what ships is "
                "its text: start anew"
            )
        if _root(func) == OWN and not _source(func):
            raise WouldNotShip(f"{_name(func)} has no source: bytecode fits one Python only")
        if _root(func) not in SERVER:
            if found := re.search(rf"^\s+(from|import) {OWN}\b.*$", _source(func), re.MULTILINE):
                raise WouldNotShip(
                    f"{_name(func)} imports inside itself, {found[0].strip()!r}: there it is no "
                    "module; import at the top of the file"
                )
            if needs := _needs(func):
                if _root(func) == OWN or needs == SUPER:  # it may be one of many, and not called
                    return missing, (_name(func), needs)
                raise WouldNotShip(
                    f"{_name(func)} needs {needs}, which servers lack: do here what needs it, with "
                    "what comes back"
                )
        if func.__name__ == "<lambda>" or not _source(func):
            return CustomCloudPickler._dynamic_function_reduce(self, func)
        return _by_source(func)


def _by_source(func: Any) -> tuple[Any, ...]:
    """What nnsight's pickler makes of a function with a source, which is looked up only once:
    finding hundreds of them anew would take longer than most jobs."""
    source, line = _written(func.__code__.co_filename, func.__code__)
    closure = {}
    for name, cell in zip(func.__code__.co_freevars, func.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not bound yet
            closure[name] = cell.cell_contents
    source, used, enclosed = code_reduce(
        textwrap.dedent(source), func.__globals__, closure, function=True
    )
    made = (source, func.__name__, func.__defaults__, func.__kwdefaults__, func.__annotations__)
    return (
        _load_function,
        (*made, func.__code__.co_filename, line),
        {**used, **enclosed},
        None,
        None,
        _fill,
    )


def _model_parts(model: Hooked) -> tuple[Any, ...]:
    """What `hooked` makes a model of on the server."""
    # where tokens lie was settled here, by code that needs this side's libraries
    family = dataclasses.replace(model.family, layout=None)  # type: ignore[arg-type]
    return model.nn, family, model.hooks, model.cfg, model.vision_reads, model.deepstack


#: files that were written after this are not what was imported from them, perhaps
BEGAN = time.time()


def _as_imported(func: Any) -> bool:
    """Whether a function stands in its file as it was imported from there."""
    path = Path(func.__code__.co_filename)
    try:
        written = path.stat().st_mtime
        if written < BEGAN:
            return True
        return _shape(func.__code__) in _shapes(path, written)
    except (OSError, SyntaxError):  # no file, as in a notebook; or one in the midst of an edit
        return not path.is_file()


@functools.lru_cache(maxsize=64)
def _shapes(path: Path, written: float) -> set[tuple[Any, ...]]:
    """Of all functions in a file."""
    codes = [compile(path.read_text(), str(path), "exec", dont_inherit=True)]
    for code in codes:
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(map(_shape, codes))


def _shape(code: types.CodeType) -> tuple[Any, ...]:
    """What a function's code does, and where it stands."""
    consts = (_shape(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts)
    return code.co_firstlineno, code.co_code, code.co_names, *consts


def _dataclass_parts(cls: Any) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, bool]]:
    """What `fill_dataclass` makes a dataclass of: what was written in it, its fields with those of
    its bases, and the decorator's arguments."""
    made = {"__dataclass_fields__", "__dataclass_params__", "__match_args__", "__annotations__"}
    made |= {"__dict__", "__weakref__", "__replace__"}
    fields = dataclasses.fields(cls)
    body = {
        name: value
        for name, value in vars(cls).items()
        if name not in made | {field.name for field in fields} and not _generated(value)
    }
    # `MISSING` is one object a process, and is left out
    keys = ("default", "default_factory", "init", "repr", "hash", "compare", "kw_only")
    told = [
        {"name": field.name}
        | {k: v for k in keys if (v := getattr(field, k)) is not dataclasses.MISSING}
        for field in fields
    ]
    options = {
        name: getattr(cls.__dataclass_params__, name)
        for name in ("init", "repr", "eq", "order", "unsafe_hash", "frozen")
    }
    return body, told, options


def _generated(value: Any) -> bool:
    """Whether a method is one that `dataclass` wrote."""
    inner = getattr(value, "__wrapped__", value)
    return isinstance(inner, types.FunctionType) and not _source(inner)


@functools.cache
def _needs(func: Any) -> str:
    """What a function needs that it will not have there, or nothing."""
    if "__class__" in func.__code__.co_freevars:
        return SUPER
    source = textwrap.dedent(_source(func))
    if func.__name__ == "<lambda>":  # whose source is that of the statement around it
        names = set(func.__code__.co_names)
    else:
        names = _function_referenced_names(source) if source else set()
    for name in sorted(names & set(func.__globals__)):
        value = func.__globals__[name]
        if isinstance(value, (types.ModuleType, types.FunctionType, type)):
            root = _root(value)
            if root == OWN and isinstance(value, type) and _foreign_base(value):
                return f"{_foreign_base(value)}"
            if root not in SERVER and root not in (OWN, "__main__") and _installed(root):
                return root
            if isinstance(value, type) and root in SERVER and not _found(value):
                return value.__qualname__
    return ""


def _foreign_base(cls: type) -> str:
    """A base of a class of this library that servers lack, or nothing."""
    for base in cls.__mro__:
        if _root(base) not in SERVER | {OWN, "__main__"}:
            return f"{base.__module__}.{base.__qualname__}"
    return ""


def _root(value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0]
    return str(getattr(value, "__module__", "") or "").partition(".")[0]


def _installed(root: str) -> bool:
    """Whether a module is an installed library; others are a user's own, and are shipped."""
    module = sys.modules.get(root)
    return "site-packages" in (getattr(module, "__file__", None) or "")


def _users(value: Any) -> bool:
    """Whether a function or class is of a user's own files, which servers lack."""
    root = _root(value)
    return root not in SERVER | {OWN, "__main__", ""} and not _installed(root)


def _found(cls: type) -> bool:
    """Whether a class is where it says it is; some of compiled libraries are not."""
    return getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _source(func: Any) -> str:
    """As it stands in its file; nothing where it stands in none, as methods of dataclasses."""
    code = getattr(func, "__code__", None)
    return "" if code is None else _written(code.co_filename, code)[0]


@functools.cache
def _written(filename: str, code: types.CodeType) -> tuple[str, int]:
    """The source of a function and the line where it begins; ("", 0) if there is none."""
    try:
        lines, line = inspect.getsourcelines(code)
    except (OSError, TypeError):
        return "", 0
    return "".join(lines), line
