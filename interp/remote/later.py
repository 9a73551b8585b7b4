"""Calls whose answer is fetched later, by this process or another.

    from interp.remote import pick_up, submit

    job = submit(model.run, x, Knockout(edges), read="blocks.*.hook_resid_post")
    print(job.id)                                  # keep this
    run = job.result()                             # wait for it, or in another process:
    run = pick_up(job.id, model.run, x, Knockout(edges), read="blocks.*.hook_resid_post")

A call prepares a request, sends it, and makes something of what comes back. `submit` stops behind
the sending. `pick_up` makes the same call, with the answer of a job in place of a request; so it
needs the same call again, and is refused with another (`interp.remote.asked`). That is for calls
that are one request: `model.run`, `model.run_many`, `run_with_cache`, `run_with_hooks`, or a
function of one's own with one trace in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from interp.remote.errors import RemoteError

T = TypeVar("T")


class Sent(BaseException):
    """Ends a call behind its request; no `Exception`, so that nobody on the way takes it for one.

    Attributes:
        job: the id.
    """

    def __init__(self, job: str) -> None:
        self.job = job


@dataclass
class Mode:
    """What a call is to do instead of sending a request and waiting.

    Attributes:
        job: whose answer is taken; None to send a request and leave it.
        used: whether an answer was taken.
    """

    job: str | None = None
    used: bool = False

    def take(self) -> str:
        """The job whose answer is taken now.

        Raises:
            RemoteError: the call asks for more than one.
        """
        assert self.job is not None
        if self.used:
            raise RemoteError(
                f"this call makes several requests, and job {self.job} is one: submit and pick up "
                "what is one request, such as model.run",
                job=self.job,
            )
        self.used = True
        return self.job


MODE: ContextVar[Mode | None] = ContextVar("interp_remote_mode", default=None)


@contextmanager
def _mode(mode: Mode) -> Iterator[None]:
    token = MODE.set(mode)
    try:
        yield
    finally:
        MODE.reset(token)


@dataclass(frozen=True)
class Pending(Generic[T]):
    """A call that was sent.

    Attributes:
        id: of its job.
    """

    id: str
    _call: Callable[[], T]

    def __repr__(self) -> str:
        return f"Pending({self.id!r})"

    def result(self) -> T:
        """Wait for it; what the call returns. Raises what the call would."""
        return pick_up(self.id, self._call)


def submit(call: Callable[..., T], *args: Any, **kwargs: Any) -> Pending[T]:
    """Send a call's request and do not wait.

    Args:
        call: for instance `model.run` of a model on a server.
        args, kwargs: its arguments.

    Raises:
        RemoteError: the call made no request: its model is here.
        Whatever the call raises before it sends anything.
    """
    try:
        with _mode(Mode()):
            call(*args, **kwargs)
    except Sent as sent:
        return Pending(sent.job, lambda: call(*args, **kwargs))
    raise RemoteError(
        f"{getattr(call, '__qualname__', call)} made no request: its model runs here, so call it"
    )


def pick_up(job: str, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What a call returns, with the answer of a job that was sent before; waits for it.

    Args:
        job: its id, of `submit` or of an interrupted call.
        call, args, kwargs: the same call.

    Raises:
        RemoteError: the job is of another call.
        JobFailed, UnknownJob, Unreachable: see `interp.remote.errors`.
    """
    mode = Mode(job)
    with _mode(mode):
        made = call(*args, **kwargs)
    if not mode.used:
        raise RemoteError(f"this call made no request, so job {job} is not of it", job=job)
    return made
