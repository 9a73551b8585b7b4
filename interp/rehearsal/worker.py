"""The worker's process: loads the model, then runs the jobs it is handed, one after the other.

What it says of a job: `running`; `log` for what the job prints; then `done` with the result (and,
if it is small, the finished status frame for the client's websocket behind it), or `error` with a
traceback; and at last `idle`, once the model has been put back as it was.

It ends when the server does, and it is the first that the system ends when memory runs out.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from nnsight.ndif import get_local_env
from nnsight.schema.response import ResponseModel, Status

from .execution import explain, pack, run
from .link import Link, Message
from .loading import load
from .pristine import Pristine

MOST_LOGS = 200  # messages a job
LONGEST_LOG = 64 * 1024  # characters a job


def main(descriptor: int) -> int:
    """Serve the server at the other end of a socket; the exit status.

    Args:
        descriptor: of the socket, inherited.
    """
    os.set_inheritable(descriptor, False)  # not for what a job starts
    link = Link(socket.socket(fileno=descriptor))
    settings, _ = link.receive()
    inbox: SimpleQueue[Message] = SimpleQueue()
    threading.Thread(target=_listen, args=(link, inbox), daemon=True).start()
    with contextlib.suppress(OSError):  # not everywhere Linux
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        model = load(settings)
        pristine = Pristine(model)
        _limit_memory(settings["max_memory"])
    except Exception as error:
        link.send(say="failed", text=f"{type(error).__name__}: {error}")
        return 1
    module = model._module
    link.send(
        say="ready",
        kind=type(module).__name__,
        n_parameters=sum(parameter.numel() for parameter in module.parameters()),
        env=_environment(settings["pretend"]),
    )
    while True:
        head, blob = inbox.get()
        link.send(say="running")
        _job(link, model, settings, head, blob)
        del blob
        link.send(say="idle", changed=pristine.put_back())


def _job(
    link: Link, model: Any, settings: dict[str, Any], head: dict[str, Any], blob: bytes
) -> None:
    began = time.monotonic()
    compress = head["compress"]
    meta: dict[str, Any] = {}
    try:
        with contextlib.redirect_stdout(_Log(link)) as log:
            result = run(
                model,
                blob,
                compress=compress,
                env=head["env"],
                max_unpacked=settings["max_unpacked"],
            )
            log.flush()
        packed = pack(result, compress=compress, longest=settings["max_result"])
    except BaseException as error:  # a job may raise SystemExit as well as anything
        meta["seconds"] = time.monotonic() - began
        link.send(say="error", text=explain(error), meta=meta)
        return
    meta = {"seconds": time.monotonic() - began, "result_bytes": len(packed)}
    frame = b""
    if len(packed) <= settings["inline"]:
        frame = ResponseModel(
            id=head["id"],
            status=Status.COMPLETED,
            description="The job has been completed.",
            data=packed,
            meta=meta,
        ).pickle()
    link.send(packed + frame, say="done", n_frame=len(frame), meta=meta)


class _Log(io.TextIOBase):
    """A stdout whose lines are sent to the client, up to a bound."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._line = ""
        self._n_messages = 0
        self._n_characters = 0

    def write(self, text: str) -> int:
        self._line += text
        if "\n" in self._line:
            self.flush()
        elif len(self._line) > LONGEST_LOG:
            self._line = self._line[: LONGEST_LOG + 1]
        return len(text)

    def flush(self) -> None:
        text, self._line = self._line.rstrip("\n"), ""
        if not text or self._n_messages > MOST_LOGS:
            return
        self._n_messages += 1
        self._n_characters += len(text)
        if self._n_messages > MOST_LOGS or self._n_characters > LONGEST_LOG:
            self._n_messages = MOST_LOGS + 1
            text = "... the job prints more than is passed on"
        self._link.send(say="log", text=text)


def _listen(link: Link, inbox: SimpleQueue[Message]) -> None:
    try:
        while True:
            inbox.put(link.receive())
    except (EOFError, OSError):
        os._exit(0)  # the server is gone, and a job may be in the way of anything gentler


def _limit_memory(n_bytes: int) -> None:
    """Let the process take so many bytes more than it has now."""
    if not n_bytes:
        return
    import resource  # not on Windows

    status = Path("/proc/self/status").read_text()
    now = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (now * 1024 + n_bytes, resource.RLIM_INFINITY))


def _environment(pretend: str | None) -> dict[str, Any]:
    """Python's version and the packages', as nnsight reports them; `interp` cannot be had here."""
    env = get_local_env()
    packages = {
        name: v for name, v in env["packages"].items() if name not in ("interp", "rehearsal")
    }
    if pretend:
        packages["nnsight"] = pretend
    return {**env, "packages": packages}
