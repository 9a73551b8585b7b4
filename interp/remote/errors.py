"""Every way in which work on another machine can go wrong, by name.

The messages of a remote service are far from the person who reads them, so each class here says
which host is meant, what it answered, and what would do. The first question after such an error is
whether the work may have been done all the same; `PerhapsReceived` and `GaveUp` are those for which
the answer is "perhaps", and both say how to find out.
"""

from __future__ import annotations

from interp.errors import InterpError


class RemoteError(InterpError):
    """Base of what can go wrong with a remote model.

    Attributes:
        job: the id of the job, "" while there is none.
    """

    def __init__(self, text: str, *, job: str = "") -> None:
        super().__init__(text)
        self.job = job


class BadAddress(RemoteError, ValueError):
    """Something that is not the address of a server."""


class UntrustedHost(RemoteError, PermissionError):
    """A host that was not allowed to run code here, which whoever sends results can."""


class NoKey(RemoteError, PermissionError):
    """A server that asks for an API key, and none is set."""


class WrongKey(RemoteError, PermissionError):
    """An API key that the server does not accept."""


class NotHosted(RemoteError, LookupError):
    """A model that the server does not have up."""


class VersionsDiffer(RemoteError, RuntimeError):
    """A server whose Python, nnsight or transformers does not fit those here."""


class TooLarge(RemoteError, ValueError):
    """A request or a result of more bytes than a limit allows."""


class Refused(RemoteError, ValueError):
    """A request that the server refuses for a reason without a class of its own."""


class Unreachable(RemoteError, ConnectionError):
    """A server that could not be reached, or had no room, as often as was tried."""


class PerhapsReceived(RemoteError, ConnectionError):
    """A request whose answer was lost: it may be running, so it was not sent again."""


class GaveUp(RemoteError, TimeoutError):
    """A job that was waited for as long as the limits allow; it is left alone."""


class UnknownJob(RemoteError, LookupError):
    """A job, or the result of one, that the server does not know (any more)."""


class BadReply(RemoteError, ValueError):
    """An answer that is not of nnsight's protocol."""


class JobFailed(RemoteError, RuntimeError):
    """A job that ended in an error on the server.

    Attributes:
        job: its id.
        remote_traceback: what the server said, with nothing added.
        line: the last line of the user's own code in it, as "file:line in function: source", or "".
    """

    def __init__(
        self, text: str, *, job: str = "", remote_traceback: str = "", line: str = ""
    ) -> None:
        super().__init__(text, job=job)
        self.remote_traceback = remote_traceback
        self.line = line


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a job was waited for. The job is left alone; `job` is its id, "" if unknown.

    No `InterpError`, since `except Exception` must not swallow a Ctrl-C.
    """

    def __init__(self, text: str, *, job: str = "") -> None:
        super().__init__(text)
        self.job = job
