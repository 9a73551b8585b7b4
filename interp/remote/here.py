"""`remote="local"`: a request packed as for a server, and run in this process.

The cheap rehearsal: nothing is sent, no server is needed, and what would not ship fails here as it
would there. The request is unpickled as on a server, where this library is no module: nothing of
it may be referred to by name (`Unpacked.find_class`), and its classes are made anew from what was
shipped. It runs in a thread of its own, with nnsight's state of a fresh process.
"""

from __future__ import annotations

import io
import linecache
import threading
from typing import Any

import cloudpickle.cloudpickle as cp
import torch
from nnsight.intervention.serialization import CustomCloudUnpickler
from nnsight.schema.request import RequestModel
from nnsight.tracing import tracer as tracing

from interp import errors
from interp.errors import WouldNotShip
from interp.remote.lacking import OWN, SERVER


class Unpacked(CustomCloudUnpickler):
    """Unpickles as a server does that has nothing but what servers have."""

    def find_class(self, module: str, name: str) -> Any:
        """What a request names; refused if a server would not find it."""
        root = module.partition(".")[0]
        if root == OWN or root not in SERVER:
            raise WouldNotShip(f"the request refers to {module}.{name}, which servers lack")
        if (module, name) == ("cloudpickle.cloudpickle", "_make_skeleton_class"):
            return _new_class
        return super().find_class(module, name)


def _new_class(kind: Any, name: str, bases: Any, options: Any, tracker: Any, extra: Any) -> Any:
    """A class by value is made anew: by its id it would be the very class of this process, whose
    methods would then be overwritten by those that were shipped."""
    return cp._make_skeleton_class(kind, name, bases, options, None, extra)


def run_here(
    blob: bytes, filename: str, module: Any, objects: dict[str, Any], attn: str
) -> tuple[dict[str, Any], int]:
    """Run a request here; what it saved, after the same trip as from a server, and its size.

    Args:
        blob: of `pack_block`.
        filename: of the block.
        module: the model.
        objects: what a server knows by id: the model's modules and nnsight's interleaver.
        attn: the kernel that is asked for.
    """
    lines = linecache.cache.get(filename)
    try:
        request = RequestModel.deserialize(blob, objects, compress=True, unpickler=Unpacked)
    finally:  # it writes the block where the file's lines were
        if lines is None:
            linecache.cache.pop(filename, None)
        else:
            linecache.cache[filename] = lines
    came: list[Any] = []

    def job() -> None:
        before = module.config._attn_implementation
        try:
            if attn != before:
                module.set_attn_implementation(attn)
            tracing.inc()
            request.execute(request.info.code)
            saved = tracing._saves()
            found = request.info.frame.f_locals.items()
            with io.BytesIO() as file:
                torch.save({name: v for name, v in found if id(v) in saved}, file)
                came.append(file.getvalue())
        except BaseException as error:
            came.append(error)
        finally:
            tracing.dec()
            if attn != before:
                module.set_attn_implementation(before)

    thread = threading.Thread(target=job, name="interp remote='local'")
    thread.start()
    thread.join()
    if isinstance(came[0], BaseException):
        raise _as_here(came[0])
    return torch.load(io.BytesIO(came[0]), weights_only=False), len(came[0])


def _as_here(error: BaseException) -> BaseException:
    """An error of this library as the class that it is here; there, its class was made anew."""
    cls = getattr(errors, type(error).__name__, None)
    if type(error).__module__ != errors.__name__ or cls is None:
        return error
    made: BaseException = cls(str(error))
    return made.with_traceback(error.__traceback__)
