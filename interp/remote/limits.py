"""How long to try, and how long to wait between tries.

Waits double and are jittered: many clients that a server's restart threw out at the same moment
should not come back at the same moment. What counts as a reason to wait is decided elsewhere
(`interp.remote.transport`); here is only how.

>>> limits = Limits(attempts=3, random=random.Random(0), sleep=lambda seconds: None)
>>> tries = Backoff(limits)
>>> [tries.again() for _ in range(3)]
[True, True, False]
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """Bounds of a remote run; all times in seconds, all sizes in bytes.

    Attributes:
        attempts: tries of one step (subscribe, send, download), the first included.
        patience: time without any news of a job before it is left alone. News is a status, an
            answer that finds the job, or a sign of life from the open websocket.
        longest: time in all before a job is left alone; None for no bound.
        first_wait: wait after the first failure; it doubles with each further one.
        max_wait: longest of those waits. A server's own Retry-After may ask for more.
        answer: time to wait for one HTTP answer.
        grace: when the answer to a request was lost: time in which the websocket may tell of the
            job all the same.
        quiet: silence of the websocket after which it is asked whether it is still there.
        unknown: time during which a server may answer that it does not know a job yet.
        result: most bytes of one result, unpacked.
        watch: hold a websocket open while a job runs, as nnsight does. False asks for the status
            by HTTP instead, as NDIF keeps it of jobs that nobody watches: these can be asked for
            again after a lost connection, and be picked up. None watches on this machine only.
        random: source of the jitter.
        clock: seconds, never going back.
        sleep: waits so many seconds.
    """

    attempts: int = 6
    patience: float = 600.0
    longest: float | None = None
    first_wait: float = 0.5
    max_wait: float = 30.0
    answer: float = 60.0
    grace: float = 10.0
    quiet: float = 20.0
    unknown: float = 60.0
    result: int = 8 * 10**9
    watch: bool | None = None
    random: random.Random = field(default_factory=random.Random, repr=False)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts={self.attempts}: at least one try is needed")
        for name in ("patience", "first_wait", "max_wait", "answer", "grace", "quiet", "unknown"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: a time in seconds above 0")


class Backoff:
    """Counts the failures of one step and waits after each."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.failures = 0
        self.waited = 0.0

    def again(self, after: float | None = None) -> bool:
        """Wait, then True; False at once when no try is left, or none within `patience`.

        Args:
            after: seconds that the server asked to be left alone (Retry-After).
        """
        if self.failures + 1 >= self.limits.attempts:
            return False
        seconds = self.next_wait(after)
        if self.waited + seconds > self.limits.patience:
            return False
        self.waited += seconds
        self.limits.sleep(seconds)
        return True

    def next_wait(self, after: float | None = None) -> float:
        """Seconds to wait after one more failure: between half and all of the doubled wait."""
        most = min(self.limits.max_wait, self.limits.first_wait * 2.0**self.failures)
        self.failures += 1
        return max(most * self.limits.random.uniform(0.5, 1.0), after or 0.0)


def poll_wait(limits: Limits, elapsed: float) -> float:
    """Seconds to the next question about a running job: a quarter of the time it took so far.

    So a job of 50 ms is not made to last a second, and one of an hour is asked after every 5 s.
    """
    return min(5.0, max(0.02, elapsed / 4)) * limits.random.uniform(0.75, 1.0)
