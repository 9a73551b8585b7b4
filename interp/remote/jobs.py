"""A job that runs on a server while nobody waits, and can be picked up from another process.

    job = Job("5f0c...", address("http://127.0.0.1:5001"))
    job.done()        # has it ended?
    job.status()      # the server's last word on it
    job.result()      # wait for it, then what it saved

Only the id has to be kept. Where results are kept, and for how long, is the server's affair.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from interp.remote.address import Address
from interp.remote.keys import Key, find_key
from interp.remote.limits import Limits
from interp.remote.replies import Reply
from interp.remote.transport import Transport
from interp.remote.trip import FINAL


@dataclass(frozen=True)
class Job:
    """A job by its id. Each question finds the key again, so a `Job` can be pickled and printed.

    Attributes:
        id: as the server gave it.
        address: of the server.
        limits: how long to try and to wait.
    """

    id: str
    address: Address
    limits: Limits = field(default_factory=Limits, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.id or not all(c.isalnum() or c in "-_." for c in self.id) or ".." in self.id:
            raise ValueError(f"{self.id[:80]!r} is no job id: letters, digits, '-', '_' and '.'")

    def done(self, key: Key | None = None) -> bool:
        """Whether it has ended, well or not. Raises `Unreachable`, `NoKey`, `WrongKey`."""
        latest = self._transport(key).state(self.id)
        return latest is not None and latest.status in FINAL

    def status(self, key: Key | None = None) -> str:
        """The server's last word, such as "QUEUED: Position 2 of 3 in the queue."

        "UNKNOWN" if the server does not know the job, or not yet. Raises as `done`.
        """
        latest = self._transport(key).state(self.id)
        if latest is None:
            return "UNKNOWN"
        return latest.status.value + (f": {latest.description}" if latest.description else "")

    def result(self, key: Key | None = None) -> Reply:
        """Wait for it and fetch what it saved. Raises as `Transport.wait`."""
        return self._transport(key).wait(self.id)

    def _transport(self, key: Key | None) -> Transport:
        return Transport(self.address, key or find_key(self.address), limits=self.limits)
