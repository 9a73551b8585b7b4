"""Step 4: from a job's last status to its result, or to the error it ended in."""

from __future__ import annotations

from nnsight.schema.response import ResponseModel, Status

from interp.remote.errors import BadReply, TooLarge, UnknownJob
from interp.remote.limits import Backoff
from interp.remote.progress import size
from interp.remote.ready import hosted_names, not_hosted
from interp.remote.refusals import repo_of, words
from interp.remote.replies import Reply, failure, result_url, unpack
from interp.remote.trip import Trip
from interp.remote.wire import Answer, Over


def finish(trip: Trip, final: ResponseModel, model_key: str = "") -> Reply:
    """The reply of a job that has ended."""
    trip.job = final.id
    if final.status is Status.ERROR:
        description = final.description
        repo_id = repo_of(model_key)
        if repo_id and "Traceback" not in description:
            names = hosted_names(trip.wire)
            if names is not None and repo_id.casefold() not in [n.casefold() for n in names]:
                raise not_hosted(f"{trip.host} ({description.strip()})", repo_id, names)
        raise failure(description, trip.job, trip.host)
    if isinstance(final.data, bytes | bytearray):
        content: bytes = bytes(final.data)
    elif isinstance(final.data, str) and final.data:
        content = _download(trip, result_url(trip.address, final.data, trip.job))
    else:
        raise BadReply(f"job {trip.job} is done, and {trip.host} sent no result", job=trip.job)
    result = unpack(content, trip.job, trip.limits.result)
    seconds = trip.limits.clock() - trip.began
    return Reply(result, trip.job, trip.wire.up, trip.down(), seconds, final.meta)


def _download(trip: Trip, url: str) -> bytes:
    tries = Backoff(trip.limits)
    trip.show("DOWNLOADING", "")
    while True:
        answer = trip.wire.download(url)
        if isinstance(answer, Over):
            raise TooLarge(
                f"the result of job {trip.job} is more than {size(answer.limit)}: save fewer "
                "positions, layers or heads; Limits(result=...) is the bound",
                job=trip.job,
            )
        if isinstance(answer, Answer) and answer.status == 200:
            return answer.body
        if isinstance(answer, Answer) and not answer.busy:
            raise UnknownJob(
                f"job {trip.job} is done, but its result cannot be had any more (HTTP "
                f"{answer.status}: {words(answer, trip.key)[:200]}): servers keep "
                "results for a while only. Run it again",
                job=trip.job,
            )
        why, after = trip.why(answer)
        trip.show("RECONNECTING", why)
        if not tries.again(after):
            raise trip.unreachable(why, tries)
