"""Every error a user of `interp` can meet, in one place.

An intervention that silently does nothing is the field's commonest failure, so this library
raises where others warn. Each class names *one* way to go wrong, its message says what was given
and what would do, and each also inherits from the Python exception a caller would expect
(`KeyError`, `ValueError`, ...), so `except KeyError` around a hook name keeps working.

>>> from interp.errors import UnknownHook
>>> issubclass(UnknownHook, KeyError)
True
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InterpError(Exception):
    """Base of all errors raised on purpose by `interp`."""

    def __str__(self) -> str:  # KeyError would print the message quoted and escaped
        return str(self.args[0]) if self.args else ""


class UnknownHook(InterpError, KeyError):
    """A hook name or pattern that matches nothing on this model."""


class NotRead(InterpError, KeyError):
    """A state was asked from a `Run` that did not read it."""


class ModelNotFound(InterpError, FileNotFoundError):
    """A model folder or file that is not there."""


class NotMultimodal(InterpError, ValueError):
    """A model that is not an MLLM, or of a family that has no table yet."""


class ImageError(InterpError, TypeError):
    """Something that is not an image where an image is due."""


class EdgeError(InterpError, ValueError):
    """An attention edge that does not exist, or that the mask already closes."""


class HeadError(InterpError, IndexError):
    """A head or a layer that the model does not have."""


class PositionError(InterpError, IndexError):
    """Positions that the tensor at a hook does not have, or that are padding."""


class EmptyRow(InterpError, ValueError):
    """A query that an edit leaves with no key to attend to."""


class EditHadNoEffect(InterpError, RuntimeError):
    """An edit that changed nothing: nearly always a mistake, so it is not let through."""


class AlreadyRunning(InterpError, RuntimeError):
    """A model that is run from within its own run."""


class SumMismatch(InterpError, ArithmeticError):
    """Parts that do not add up to the whole: the decomposition does not hold on this model."""


class UnreadableWeight(InterpError, TypeError):
    """A weight that is no plain matrix: quantised, or not loaded."""


class MissingLibrary(InterpError, ImportError):
    """A library that this way of working needs, and that is not installed."""


class NoBridge(InterpError, NotImplementedError):
    """A model that TransformerLens has no bridge for, or whose weights cannot be shared."""


class Untestable(InterpError, ValueError):
    """A claim on which this model and these images give nothing to test."""


class FolderInUse(InterpError, FileExistsError):
    """An output folder that holds something this run did not write."""


class RunNotFound(InterpError, FileNotFoundError):
    """A folder that is no finished run, or a file that the run did not write."""


class RunDamaged(InterpError, ValueError):
    """A run folder whose files are not those that its manifest names."""


class TableError(InterpError, ValueError):
    """A table that lacks what is to be computed or drawn from it, or holds what it must not."""


class DataWrong(InterpError, ValueError):
    """A dataset whose folders, files or numbers are not what its layout says, or not there."""


class WouldNotShip(InterpError, TypeError):
    """Code or a value that a server could not run or take, found before it is sent."""


class NotHere(InterpError, NotImplementedError):
    """Something that needs the model's weights here, asked of a model that a server hosts."""


#: what is said to whoever asks a text-only model for more than words
NO_VISION = (
    "this model has no vision tower: it is text-only. Its hooks are the language model's, and "
    'model.prepare(None, "The Eiffel Tower is in") makes its inputs'
)


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """The `n` known names closest to `name`, as words for an error message.

    >>> nearest("hook_patern", ["hook_pattern", "ln_final"])
    'did you mean hook_pattern?'
    """
    close = difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else ""
