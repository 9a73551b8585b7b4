"""A job from here to a server and its result back, whatever happens on the way.

    reply = Transport(address("http://127.0.0.1:5001"), key).run(model_key, env, blob)

The one rule behind all of it: **a job that may have been received is never sent again.** So a
request is repeated only while the server cannot have taken it: no connection, the body still partly
here when it broke, or an answer that says "not now" (429, 5xx). Once there is a job id, only
questions are repeated:

1. subscribe to a websocket, which gives a session id;
2. POST the request. If its answer is lost, the websocket may tell of the job; if it does not
   within `Limits.grace`, `PerhapsReceived`, and a person decides;
3. follow the websocket. If it drops, or is silent without a sign of life, ask
   `GET /response/ID` until the job has ended;
4. fetch the result, from the websocket's last frame or by URL.

Whoever waits may stop: Ctrl-C and `GaveUp` leave the job alone and name it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from nnsight.schema.response import ResponseModel

from interp.remote.address import Address
from interp.remote.ending import finish
from interp.remote.following import ask, ask_until_done, follow
from interp.remote.keys import Key
from interp.remote.limits import Limits
from interp.remote.progress import Update
from interp.remote.replies import Reply
from interp.remote.sending import send
from interp.remote.trip import FINAL, Trip
from interp.remote.wire import Wire

T = TypeVar("T")


class Transport:
    """Runs jobs on one server.

    Args:
        address: of the server.
        key: for it.
        limits: how long to try and to wait.
        progress: called with every `Update`; `interp.remote.progress.StatusLine` shows them.
    """

    def __init__(
        self,
        address: Address,
        key: Key | None,
        *,
        limits: Limits | None = None,
        progress: Callable[[Update], None] | None = None,
    ) -> None:
        self.address, self.key, self.progress = address, key, progress
        self.limits = limits or Limits()

    def __repr__(self) -> str:
        return f"Transport({self.address.url!r})"

    def run(self, model_key: str, env: dict[str, Any], blob: bytes) -> Reply:
        """Send a job, wait for it, and fetch what it saved.

        Args:
            model_key: of nnsight: "import.path.Class:{json}".
            env: what the server applies to the model before, such as the attention kernel.
            blob: the payload, compressed by zstd.

        Raises:
            Unreachable: no connection, or "not now", as often as `limits` allow.
            PerhapsReceived: the answer to the request was lost, and nothing tells of the job.
            NoKey, WrongKey, NotHosted, VersionsDiffer, TooLarge, Refused: the server's no.
            JobFailed: the job ended in an error.
            GaveUp: it took longer than `limits` allow; the job is left alone.
            Interrupted: Ctrl-C; the job is left alone.
        """

        watch = self.limits.watch
        watching = self.address.loopback if watch is None else watch

        def go(trip: Trip) -> Reply:
            try:
                send(trip, model_key, env, blob, watching=watching)
                final = follow(trip)
            finally:
                trip.hang_up()
            return finish(trip, final, model_key)

        return self._uninterrupted(go)

    def submit(self, model_key: str, env: dict[str, Any], blob: bytes) -> str:
        """Send a job and leave it; its id, for `fetch` and `wait`, from any process. As `run`."""

        def go(trip: Trip) -> str:
            send(trip, model_key, env, blob, watching=False)
            return trip.job

        return self._uninterrupted(go)

    def fetch(self, job: str) -> Reply | None:
        """The result of a job that was left; None if it is not done yet, or not known yet.

        Raises:
            JobFailed, Unreachable, NoKey, WrongKey, UnknownJob: as `run`.
        """

        def go(trip: Trip) -> Reply | None:
            latest = ask(trip, job)
            return finish(trip, latest) if latest and latest.status in FINAL else None

        return self._uninterrupted(go, job)

    def wait(self, job: str) -> Reply:
        """The result of a job that was left, when it is there. Raises as `fetch` and `run`."""
        return self._uninterrupted(lambda trip: finish(trip, ask_until_done(trip)), job)

    def state(self, job: str) -> ResponseModel | None:
        """The latest status of a job, None if the server does not know it (yet).

        Raises:
            Unreachable, NoKey, WrongKey: as `run`.
        """
        return self._uninterrupted(lambda trip: ask(trip, job), job)

    def _uninterrupted(self, go: Callable[[Trip], T], job: str = "") -> T:
        with Wire(self.address, self.key, self.limits) as wire:
            trip = Trip(wire, self.address, self.key, self.limits, self.progress, job)
            try:
                return go(trip)
            except KeyboardInterrupt:
                pass  # raised anew below: its frames are httpx's, whose variables hold the key
        raise trip.interrupted()
