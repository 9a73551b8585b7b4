"""Functions by their source: as they stand in their files, and as they were imported from there.

nnsight ships a function as the text that its file has at that moment. Here that text is looked up
once, and must be the one that was imported: after an edit the lines would be others.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import textwrap
import time
import types
from pathlib import Path
from typing import Any

from nnsight.intervention.serialization import _fill, _load_function, code_reduce

#: files that were written after this are not what was imported from them, perhaps
BEGAN = time.time()


def as_imported(func: Any) -> bool:
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


def by_source(func: Any) -> tuple[Any, ...]:
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


def generated(value: Any) -> bool:
    """Whether a method is one that `dataclass` wrote."""
    inner = getattr(value, "__wrapped__", value)
    return isinstance(inner, types.FunctionType) and not source_of(inner)


def source_of(func: Any) -> str:
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
