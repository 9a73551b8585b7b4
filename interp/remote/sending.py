"""Steps 1 and 2: subscribe to a websocket, and send a request, once.

A request is sent again only while no server can have taken it. What is not known is left to a
person (`PerhapsReceived`).
"""

from __future__ import annotations

from typing import Any

from nnsight.schema.request import RequestModel

from interp.remote.errors import PerhapsReceived
from interp.remote.limits import Backoff
from interp.remote.progress import size
from interp.remote.refusals import refusal
from interp.remote.trip import Trip
from interp.remote.watching import Watch, open_watch
from interp.remote.wire import Answer, Lost


def send(trip: Trip, model_key: str, env: dict[str, Any], blob: bytes, *, watching: bool) -> None:
    """Get a job id, or raise."""
    tries = Backoff(trip.limits)
    while True:
        if watching and (trip.watch is None or trip.watch.closed):
            _subscribe(trip)
        session = trip.watch.session if trip.watch else ""
        request = RequestModel(model_key=model_key, session_id=session, compress=True, env=env)
        trip.show("SENDING", size(len(blob)))
        trip.sending = True
        answer = trip.wire.post(request.metadata(), blob)
        if isinstance(answer, Answer) and 200 <= answer.status < 300:
            received = trip.status_in(answer)
            if received is not None:
                trip.take(received)
                return
            answer = Lost("its answer is no status", sent=True)
        if isinstance(answer, Lost) and answer.sent:
            if trip.told(trip.limits.grace):
                return
            raise _perhaps(trip, answer.why)
        if isinstance(answer, Answer) and not answer.busy:
            raise refusal(trip.wire, answer, model_key=model_key, n_bytes=len(blob))
        # a gateway's answer does not say that the server behind it has nothing
        gateway = isinstance(answer, Answer) and answer.status in (502, 504)
        if gateway and trip.told(trip.limits.grace):
            return
        why, after = trip.why(answer)
        trip.sending = False
        trip.show("RECONNECTING", why)
        if not tries.again(after):
            if isinstance(answer, Lost) and trip.wire.up:
                why += f" (while {size(len(blob))} were being sent: perhaps more than it takes)"
            raise trip.unreachable(why, tries)
        if trip.told(0.001):
            return


def _subscribe(trip: Trip) -> None:
    tries = Backoff(trip.limits)
    trip.hang_up()
    while True:
        watch = open_watch(trip.address, trip.key, trip.limits)
        if isinstance(watch, Watch):
            trip.watch = watch
            return
        if isinstance(watch, Answer) and not watch.busy:
            if watch.status in (401, 403):
                raise refusal(trip.wire, watch)
            error = refusal(trip.wire, watch)
            raise type(error)(
                f"{error}. That was /subscribe, the websocket: a server for nnsight 0.8 has "
                "it; where a network cuts websockets, use Limits(watch=False)"
            )
        why, after = trip.why(watch)
        trip.show("RECONNECTING", why)
        if not tries.again(after):
            raise trip.unreachable(why, tries)


def _perhaps(trip: Trip, why: str) -> PerhapsReceived:
    return PerhapsReceived(
        f"the request was sent to {trip.host}, its answer was lost ({why}), and nothing told "
        "of the job since. It may be running, so it was not sent again. If running it twice "
        "does no harm (a run that only reads never does), just run it again"
    )
