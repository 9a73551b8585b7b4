"""Step 3: what becomes of a job, from the websocket while it lasts, then by asking.

Only questions are repeated here, so nothing can be run twice.
"""

from __future__ import annotations

from nnsight.schema.response import ResponseModel

from interp.remote.errors import UnknownJob
from interp.remote.limits import Backoff, poll_wait
from interp.remote.trip import Trip
from interp.remote.wire import Answer, Lost


def follow(trip: Trip) -> ResponseModel:
    """The final status of the job, from the websocket as long as it lasts."""
    for status in trip.pending:
        if trip.note(status):
            return status
    watch = trip.watch
    while watch is not None and watch.closed is None:
        status = watch.next(min(trip.limits.quiet, max(0.001, trip.left())))
        if status is not None and status.id == trip.job:
            if trip.note(status):
                return status
        elif status is None and watch.closed is None and trip.left() > 0:
            found = trip.question(trip.job)  # a last frame may have been lost
            if isinstance(found, ResponseModel) and trip.note(found):
                return found
            if watch.lives():
                trip.heard = trip.limits.clock()
        trip.check_patience()
    if watch is not None:
        trip.show("RECONNECTING", f"the websocket dropped ({watch.closed})")
    return ask_until_done(trip)


def ask_until_done(trip: Trip) -> ResponseModel:
    """The final status of the job, by asking for it."""
    tries, unknown_since, why = Backoff(trip.limits), None, ""
    asked_since = trip.limits.clock()
    while True:
        found = trip.question(trip.job)
        now = trip.limits.clock()
        if isinstance(found, ResponseModel):
            tries, unknown_since = Backoff(trip.limits), None
            if trip.note(found):
                return found
            pause = poll_wait(trip.limits, now - asked_since)
        elif found is None:
            unknown_since = now if unknown_since is None else unknown_since
            if now - unknown_since > trip.limits.unknown:
                raise _unknown(trip)
            pause = poll_wait(trip.limits, now - asked_since)
        else:
            why, after = trip.why(found)
            trip.show("RECONNECTING", why)
            pause = tries.next_wait(after)
        trip.check_patience(why)
        trip.limits.sleep(max(0.0, min(pause, trip.left())))


def ask(trip: Trip, job: str) -> ResponseModel | None:
    """One question about a job, repeated only if it got no answer."""
    tries = Backoff(trip.limits)
    while True:
        latest = trip.question(job)
        if not isinstance(latest, Answer | Lost):
            return latest
        why, after = trip.why(latest)
        if not tries.again(after):
            raise trip.unreachable(why, tries)


def _unknown(trip: Trip) -> UnknownJob:
    return UnknownJob(
        f"{trip.host} does not know job {trip.job}. Either the id is wrong, the server was "
        "started anew, or it keeps no answers of jobs that were watched by a websocket which "
        "dropped; Limits(watch=False) sends jobs that can always be asked for. Run it again",
        job=trip.job,
    )
