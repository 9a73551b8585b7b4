"""One job: unpack, run, pack what was saved, or say in the user's terms what went wrong.

The payload is nnsight's: a pickled tracer, and the source of the traced block with the variables it
uses. nnsight puts the two together again around the model that is here; the block then runs as it
would have run where it was written, and the values it marked with `save` are the result.

Three bounds hold, and each is an error of the job: what a payload may become when decompressed
(nnsight itself would believe a payload that claims a terabyte), the size of a result, and the
length of a traceback.
"""

from __future__ import annotations

import io
import pickle
import traceback
from pathlib import Path
from typing import Any

import nnsight
import torch
import zstandard
from nnsight.intervention.serialization import UnknownPersistentIdError
from nnsight.schema.request import RequestModel
from nnsight.tracing import tracer as tracing

LONGEST_TEXT = 30_000  # characters of a traceback
# frames that say nothing to the author of a script: nnsight's, ours, the import system's
INTERNAL = (
    str(Path(nnsight.__file__).parent),
    str(Path(__file__).parent),
    "<frozen importlib",
)


class JobRefused(Exception):
    """A job that breaks one of the server's bounds, or that is no job."""


def run(model: Any, blob: bytes, *, compress: bool, env: dict[str, Any], max_unpacked: int) -> dict:
    """The saved values of a job, by the names of their variables.

    Args:
        model: nnsight's wrapper around the model.
        blob: the payload.
        compress: whether it is zstd-compressed.
        env: applied to the model first: the attention implementation, an adapter.
        max_unpacked: bytes the payload may have once decompressed.

    Raises:
        JobRefused: it is too large, or no payload.
        BaseException: whatever the job raises.
    """
    data = decompress(blob, max_unpacked) if compress else blob
    model._remoteable_set_env(env)
    try:
        tracer = RequestModel.deserialize(data, model._remoteable_persistent_objects())
        code, frame = tracer.info.code, tracer.info.frame
    except UnknownPersistentIdError as error:
        raise JobRefused(
            f"the job uses {error}, which this server's model does not have: are the model, its "
            "family and its task the same on both sides?"
        ) from None
    except ModuleNotFoundError as error:
        root = (error.name or "").partition(".")[0]
        error.add_note(
            f"This server does not have {root!r}, as NDIF would not. nnsight.register({root!r}) "
            "before the trace sends its source with the job."
        )
        raise
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
        raise JobRefused(
            f"the payload cannot be unpacked: {type(error).__name__}: {error}"
        ) from error
    tracing.inc()
    try:
        tracer.execute(code)
        saved = tracing._saves()
        return {name: value for name, value in frame.f_locals.items() if id(value) in saved}
    finally:
        tracing.dec()


def decompress(blob: bytes, longest: int) -> bytes:
    """The bytes of a zstd frame.

    Raises:
        JobRefused: it is none, it is cut off, or it holds more than `longest` bytes.
    """
    try:
        with zstandard.ZstdDecompressor().stream_reader(blob) as reader:
            data = reader.read(longest + 1)
    except zstandard.ZstdError as error:
        raise JobRefused(f"the payload is no zstd frame: {error}") from None
    if len(data) > longest:
        raise JobRefused(f"the payload holds more than {longest / 2**20:g} MB when decompressed")
    return data


class _Bounded(io.BytesIO):
    """Takes no more than `longest` bytes, and says afterwards that there were more.

    It does not raise: torch's writer calls it from C++ and from destructors.
    """

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest
        self.n_bytes = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.n_bytes += size
        if self.n_bytes <= self.longest:
            super().write(data)
        return size


def pack(result: dict[str, Any], *, compress: bool, longest: int) -> bytes:
    """A result as the client reads it: torch.save's bytes, compressed if its payload was.

    Raises:
        JobRefused: it has more than `longest` bytes, or holds what cannot be pickled.
    """
    buffer = _Bounded(longest)
    try:
        torch.save(result, buffer)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise JobRefused(
            f"the saved values cannot be sent: {error}. Save tensors, numbers, strings, and lists "
            "and dicts of them; not instances of your own classes"
        ) from None
    if buffer.n_bytes > longest:
        raise JobRefused(
            f"the saved values have {buffer.n_bytes / 2**20:.1f} MB; this server sends "
            f"{longest / 2**20:g} MB (--max-result). Reduce them inside the trace; note that a "
            "slice is sent with all of the tensor it was cut from unless it is cloned"
        )
    data = buffer.getvalue()
    return zstandard.ZstdCompressor().compress(data) if compress else data


def explain(error: BaseException) -> str:
    """The traceback of an error as the author of the script should see it."""
    if isinstance(error, JobRefused):
        text = f"{type(error).__name__}: {error}"
    else:
        told = traceback.TracebackException.from_exception(error, compact=True)
        _strip(told)
        text = "".join(told.format())
    if len(text) > LONGEST_TEXT:
        text = f"{text[: LONGEST_TEXT // 4]}\n  ...\n{text[-3 * LONGEST_TEXT // 4 :]}"
    return text.rstrip("\n")


def _strip(told: traceback.TracebackException | None) -> None:
    if told is None:
        return
    kept = [frame for frame in told.stack if not frame.filename.startswith(INTERNAL)]
    told.stack = traceback.StackSummary.from_list(kept)
    for other in (told.__cause__, told.__context__, *(told.exceptions or ())):
        _strip(other)
