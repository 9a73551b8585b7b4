"""What one call of a transport knows: its clock, its bytes, the job, the way to the server.

`interp.remote.sending` gets a job id, `interp.remote.following` the job's last status and
`interp.remote.ending` its result; all three work on a `Trip`, which asks single questions, keeps
count, tells of progress, and words what went wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote

from nnsight.schema.response import ResponseModel, Status
from pydantic import ValidationError

from interp.remote.address import Address
from interp.remote.errors import BadReply, GaveUp, Interrupted, Unreachable
from interp.remote.keys import Key
from interp.remote.limits import Backoff, Limits
from interp.remote.progress import Update
from interp.remote.refusals import refusal, words
from interp.remote.watching import Watch, cleaned
from interp.remote.wire import Answer, Lost, Wire

FINAL = (Status.COMPLETED, Status.ERROR)


@dataclass
class Trip:
    """One job on its way.

    Attributes:
        wire: HTTP to the server.
        address, key, limits, progress: of the transport.
        job: its id, "" while there is none.
        sending: a request has left, or is leaving, whose answer is not here yet.
        watch: the websocket, None without.
        pending: statuses that came before the job was followed.
        began, heard: when the call began, when there was news last; by `limits.clock`.
    """

    wire: Wire
    address: Address
    key: Key | None
    limits: Limits
    progress: Callable[[Update], None] | None
    job: str = ""
    sending: bool = False
    watch: Watch | None = None
    pending: list[ResponseModel] = field(default_factory=list)
    closed_down: int = 0  # bytes that came on websockets that are closed

    def __post_init__(self) -> None:
        self.host = self.address.host
        self.began = self.heard = self.limits.clock()

    def take(self, status: ResponseModel) -> None:
        """Note a status by which a job is known, for `follow` to begin with."""
        self.job = status.id
        self.pending.append(status)

    def told(self, seconds: float) -> bool:
        """Has the websocket told of a job? Then that is ours: the session has no other."""
        told = self.watch.next(seconds) if self.watch else None
        if told is not None:
            self.take(told)
        return told is not None

    def question(self, job: str) -> ResponseModel | Answer | Lost | None:
        """One GET /response: a status, None for an unknown job, or what to try again after.

        A 404 is no error yet: a server may write down a job a while after it took it.
        """
        answer = self.wire.get(f"/response/{quote(job, safe='')}")
        if isinstance(answer, Lost) or answer.busy:
            return answer
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise refusal(self.wire, answer)
        status = self.status_in(answer)
        if status is None:
            raise BadReply(
                f"{self.host} answers the question about job {job} with what is no status of "
                f"nnsight 0.8: {words(answer, self.key)[:200]}",
                job=job,
            )
        return status

    def status_in(self, answer: Answer) -> ResponseModel | None:
        """The status in a body, None if it is none."""
        try:
            return cleaned(ResponseModel.model_validate_json(answer.body), self.key)
        except ValidationError:
            return None

    def note(self, status: ResponseModel) -> bool:
        """Take note of a status; whether it is the last."""
        self.heard = self.limits.clock()
        text = "" if status.status is Status.ERROR else status.description
        self.show(status.status.value, text)
        return status.status in FINAL

    def show(self, status: str, description: str) -> None:
        """Tell of progress."""
        if self.progress is not None:
            seconds = self.limits.clock() - self.began
            self.progress(Update(self.job, status, description, seconds, self.wire.up, self.down()))

    def down(self) -> int:
        """Bytes received so far."""
        return self.wire.down + self.closed_down + (self.watch.down if self.watch else 0)

    def hang_up(self) -> None:
        """Close the websocket."""
        if self.watch is not None:
            self.closed_down += self.watch.down
            self.watch.close()
            self.watch = None

    def left(self) -> float:
        """Seconds until one of the bounds is reached."""
        now, longest = self.limits.clock(), self.limits.longest
        left = self.heard + self.limits.patience - now
        return left if longest is None else min(left, self.began + longest - now)

    def check_patience(self, why: str = "") -> None:
        """Raise `GaveUp` when a bound is reached."""
        if self.left() > 0:
            return
        waited = self.limits.clock() - self.began
        silent = self.limits.clock() - self.heard
        last = f"; the last trouble: {why}" if why else ""
        raise GaveUp(
            f"job {self.job} at {self.host} is not done after {waited:.0f} s, {silent:.0f} s of "
            f"them without news{last}. It was left alone. To have its result later: "
            f'interp.remote.pick_up("{self.job}", model.run, ...); to wait longer: '
            "Limits(patience=..., longest=...)",
            job=self.job,
        )

    def why(self, answer: Answer | Lost) -> tuple[str, float | None]:
        """What went wrong, in words, and the seconds that the server asks to wait."""
        if isinstance(answer, Lost):
            return answer.why, None
        said = words(answer, self.key)[:300]
        return f"HTTP {answer.status}: {said}", answer.retry_after

    def unreachable(self, why: str, tries: Backoff) -> Unreachable:
        """The error when no try is left."""
        times = "once" if tries.failures == 0 else f"{tries.failures + 1} times"
        if self.job:
            end = f"job {self.job} was left alone: "
            end += f'interp.remote.pick_up("{self.job}", model.run, ...)'
        else:
            end = "`interp status` tells what is up"
        return Unreachable(
            f"{self.host} could not do it, tried {times} in {tries.waited:.0f} s; the last time: "
            f"{why}. No job is running twice; {end}",
            job=self.job,
        )

    def interrupted(self) -> Interrupted:
        """What a Ctrl-C becomes."""
        if self.job:
            return Interrupted(
                f"stopped waiting; job {self.job} goes on at {self.host} and was left alone. To "
                f'have its result: interp.remote.pick_up("{self.job}", model.run, ...)',
                job=self.job,
            )
        if self.sending:
            return Interrupted(
                f"stopped while the request was being sent to {self.host}: the server may have "
                "received it, but its id is not known here"
            )
        return Interrupted(f"stopped; nothing was sent to {self.host}")
