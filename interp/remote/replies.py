"""What comes back: a job's results, or the error it ended in, made readable.

Results are `torch.save` bytes, compressed by zstd when the request asked for that. They are
unpickled as nnsight does, so only those of a host that `interp.remote.address` let pass get here.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import torch
import zstandard

from interp import errors
from interp.remote.address import Address, is_loopback
from interp.remote.errors import BadReply, JobFailed, TooLarge, UntrustedHost
from interp.remote.progress import size


@dataclass(frozen=True)
class Reply:
    """What a job gave, and what it took.

    Attributes:
        result: the saved values by name.
        job: its id.
        up, down: bytes of all bodies sent and received, over all attempts: payload, statuses,
            questions about it, result.
        seconds: from the call to the result in hand.
        meta: what the server says about the cost of the run, if it does.
    """

    result: dict[str, Any]
    job: str
    up: int
    down: int
    seconds: float
    meta: dict[str, Any] | None


def unpack(content: bytes, job: str, limit: int) -> dict[str, Any]:
    """The values in a result's bytes, on the CPU.

    Args:
        content: compressed by zstd.
        job: its id, for the messages.
        limit: most bytes after decompression.

    Raises:
        TooLarge: it would be more than that.
        BadReply: bytes that are no result.
    """
    try:
        with zstandard.ZstdDecompressor().stream_reader(content) as reader:
            plain = _bounded(reader, limit)
    except zstandard.ZstdError as error:
        raise BadReply(f"the result of job {job} is damaged ({error})", job=job) from None
    if plain is None:
        raise TooLarge(
            f"the result of job {job} unpacks to more than {size(limit)}: save fewer positions, "
            "layers or heads, or reduce them on the server; Limits(result=...) is the bound",
            job=job,
        )
    try:
        # a result is unpickled only if its host may run code here
        result = torch.load(io.BytesIO(plain), map_location="cpu", weights_only=False)
    except Exception as error:  # an unpickler breaks in any way it likes
        raise BadReply(
            f"the result of job {job} cannot be unpickled here ({type(error).__name__}: {error}); "
            "save only tensors, numbers, text, lists and dicts of them",
            job=job,
        ) from error
    if not isinstance(result, dict):
        raise BadReply(
            f"the result of job {job} is a {type(result).__name__}, not a dict of saved values",
            job=job,
        )
    return result


def result_url(address: Address, url: str, job: str) -> str:
    """Where a result lies, if it may be fetched from there.

    NDIF stores results with a storage service and hands out a URL on *its* host; a server of one's
    own has no reason to, unless `allow_host` names that host too.

    Raises:
        UntrustedHost: another host, or one without encryption.
    """
    full = urljoin(address.url + "/", url)
    here, there = urlsplit(address.url), urlsplit(full)
    host, port = there.hostname or "", there.port
    same = (there.scheme, host, port) == (here.scheme, here.hostname, here.port)
    twin = (  # localhost and 127.0.0.1 are one
        address.loopback and is_loopback(host) and (there.scheme, port) == (here.scheme, here.port)
    )
    named = host in address.allowed or f"{host}:{port}" in address.allowed
    if same or twin or (there.scheme == "https" and (address.ndif or named)):
        return full
    raise UntrustedHost(
        f"{address.host} says that job {job}'s result is at {there.scheme}://{there.netloc}, "
        "which is another host, or is not encrypted. A result is unpickled, so its host can run "
        "code here; to trust this one as well (over https), name it in allow_host, too",
        job=job,
    )


def failure(description: str, job: str, host: str) -> JobFailed:
    """The error of a failed job: the server's traceback, then the user's own line.

    Args:
        description: of the ERROR status, without the key.
        job: its id.
        host: of the server.
    """
    text = description.strip() or "(the server gave no reason)"
    line = own_line(text)
    if "Traceback" in text:
        end = f"\n\nIn your code: {line}" if line else ""
    elif text.startswith("JobRefused"):  # the server says why
        end = ""
    else:
        end = (
            "\n\nThere is no traceback in this, so the job may not be at fault: a worker may have "
            "died, or the server have been started anew. It was not run again by itself, since it "
            "may have been the job that did it. To try once more, run it again."
        )
    return _failed_as(text)(
        f"job {job} failed on {host}:\n{text}{end}",
        job=job,
        remote_traceback=description,
        line=line,
    )


def _failed_as(text: str) -> type[JobFailed]:
    """`JobFailed`, and also the class of the error there, so that `except ValueError` goes on
    working; by the name in the last line that begins with one."""
    names = re.findall(r"^(?:\w+\.)*([A-Z]\w*)(?::|$)", text, re.MULTILINE)
    for name in reversed(names):
        cls = getattr(errors, name, None) or getattr(builtins, name, None)
        if isinstance(cls, type) and issubclass(cls, Exception):
            with contextlib.suppress(TypeError):  # some cannot be had in one object
                return type("JobFailed", (JobFailed, cls), {"__reduce__": _reduced})
            break
    return JobFailed


def _reduced(error: JobFailed) -> tuple[Any, ...]:
    """For pickle, which does not find a class that was made here."""
    return _again, (str(error), error.job, error.remote_traceback, error.line)


def _again(text: str, job: str, traceback: str, line: str) -> JobFailed:
    return _failed_as(traceback)(text, job=job, remote_traceback=traceback, line=line)


FRAME = re.compile(
    r'^ *File "(?P<file>[^"]+)", line (?P<line>\d+)(?:, in (?P<name>\S+))?'
    r"\n?(?P<source> {4,}\S.*)?",
    re.MULTILINE,
)


def own_line(traceback: str) -> str:
    """The last frame of a traceback that is the user's, as "file:line in function: source".

    Not theirs are installed packages, Python's own library, and this one (shipped with the job).
    If nothing is left, "".
    """
    library = Path(__file__).parents[1]
    standard = Path(sysconfig.get_path("stdlib"))
    found = ""
    for frame in FRAME.finditer(traceback):
        # nnsight names shipped functions "[name:line] path"
        path = Path(re.sub(r"^\[[^\]]*\] ", "", frame["file"]))
        installed = {"site-packages", "dist-packages"} & set(path.parts)
        if installed or path.is_relative_to(library) or path.is_relative_to(standard):
            continue
        where = f"{path}:{frame['line']}"
        where += f" in {frame['name']}" if frame["name"] else ""
        found = f"{where}: {frame['source'].strip()}" if frame["source"] else where
    return found


def _bounded(reader: Any, limit: int) -> bytes | None:
    """All that a stream holds, None if it is more than `limit` bytes."""
    parts, n = [], 0
    while part := reader.read(1 << 20):
        n += len(part)
        if n > limit:
            return None
        parts.append(part)
    return b"".join(parts)
