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

What servers have, and which source a function has, is decided in `lacking` and `sources`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import re
import types
from typing import Any

import cloudpickle.cloudpickle as cp
import nnsight
import zstandard
from nnsight.intervention.serialization import CustomCloudPickler, reduce_block

from interp.cells import CellGrid
from interp.errors import WouldNotShip
from interp.hooked import Hooked
from interp.remote.lacking import (
    OWN,
    SERVER,
    SUPER,
    foreign_base,
    installed,
    is_users,
    name_of,
    needs_of,
    root_of,
)
from interp.remote.sources import as_imported, by_source, generated, source_of
from interp.remote.there import cached, fill_dataclass, hooked, missing, new_class
from interp.shipping import at_model
from interp.tokens import TokenGrid

#: what a function becomes by the two decorators that ship
MANAGER = contextlib.contextmanager(lambda: iter(())).__code__
SHIPPED = at_model(lambda model: None).__code__
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
        if isinstance(obj, types.ModuleType) and root_of(obj) not in SERVER:
            if installed(root_of(obj)):
                raise WouldNotShip(
                    f"the library {obj.__name__}, which servers lack: do here what needs it, with "
                    "what comes back"
                )
            raise WouldNotShip(
                f"the module {obj.__name__} as a value, which servers lack: import by name what "
                "is used of it, and that is sent"
            )
        mine = isinstance(obj, type) and (is_users(obj) or root_of(obj) == "__main__")
        if mine and "__dataclass_fields__" in vars(obj):
            return _dataclass(obj)
        if isinstance(obj, (types.FunctionType, type)) and is_users(obj):
            if isinstance(obj, type):
                return cp._dynamic_class_reduce(obj)
            return self._dynamic_function_reduce(obj)
        if isinstance(obj, type) and root_of(obj) == OWN:
            if base := foreign_base(obj):
                raise WouldNotShip(f"class {name_of(obj)} is a {base}, which servers lack")
            if "__dataclass_fields__" in vars(obj):
                return _dataclass(obj)
        return CustomCloudPickler.reducer_override(self, obj)

    def _dynamic_function_reduce(self, func: Any) -> Any:
        if (inner := getattr(func, "__wrapped__", None)) is not None and source_of(inner):
            # only the source of what is inside would go, and the decorator be lost
            if func.__code__ is MANAGER:
                return contextlib.contextmanager, (inner,)
            if func.__code__ is not SHIPPED:
                raise WouldNotShip(
                    f"{name_of(func)} is decorated, and what ships is the source below the "
                    "decorator: do inside it what the decorator does"
                )
            func = inner
        if not as_imported(func):
            raise WouldNotShip(
                f"{func.__code__.co_filename} was edited since it was imported, and what ships is "
                "its text: start anew"
            )
        if root_of(func) == OWN and not source_of(func):
            raise WouldNotShip(f"{name_of(func)} has no source: bytecode fits one Python only")
        if root_of(func) not in SERVER:
            if found := re.search(rf"^\s+(from|import) {OWN}\b.*$", source_of(func), re.MULTILINE):
                raise WouldNotShip(
                    f"{name_of(func)} imports inside itself, {found[0].strip()!r}: there it is no "
                    "module; import at the top of the file"
                )
            if needs := needs_of(func):
                if root_of(func) == OWN or needs == SUPER:  # it may be one of many, and not called
                    return missing, (name_of(func), needs)
                raise WouldNotShip(
                    f"{name_of(func)} needs {needs}, which servers lack: do here what needs it, "
                    "with what comes back"
                )
        if func.__name__ == "<lambda>" or not source_of(func):
            return CustomCloudPickler._dynamic_function_reduce(self, func)
        return by_source(func)


def _model_parts(model: Hooked) -> tuple[Any, ...]:
    """What `hooked` makes a model of on the server."""
    # where tokens lie was settled here, by code that needs this side's libraries
    family = dataclasses.replace(model.family, layout=None)  # type: ignore[arg-type]
    return model.nn, family, model.hooks, model.cfg, model.vision_reads, model.deepstack


def _dataclass(cls: Any) -> tuple[Any, ...]:
    bare = (cls.__name__, cls.__qualname__, cls.__module__, cls.__bases__)
    return new_class, bare, _dataclass_parts(cls), None, None, fill_dataclass


def _dataclass_parts(cls: Any) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, bool]]:
    """What `fill_dataclass` makes a dataclass of: what was written in it, its fields with those of
    its bases, and the decorator's arguments."""
    made = {"__dataclass_fields__", "__dataclass_params__", "__match_args__", "__annotations__"}
    made |= {"__dict__", "__weakref__", "__replace__"}
    fields = dataclasses.fields(cls)
    body = {
        name: value
        for name, value in vars(cls).items()
        if name not in made | {field.name for field in fields} and not generated(value)
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
