"""Misbehaving on purpose, so that a client can be tested against it.

`--fault KIND=N` makes the server do a wrong thing the first N times it could, and then no more:

    delay=SECONDS    every job waits this long before it runs (not counted down)
    drop-after=K     every websocket is cut after K statuses; K x M cuts only M websockets: 2x1
    http500=N        POST /request answers 500; http429=N, http503=N alike
    lose-answer=N    POST /request takes the job, and cuts the connection instead of answering
    kill-worker=N    the worker is killed while it runs the job
    poll404=N        GET /response/ID says 404

Counted down rather than drawn at random: a test that meets a fault meets it every time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

COUNTED = ("http500", "http429", "http503", "lose-answer", "kill-worker", "poll404")


class Faults:
    """The faults still to come, and those that have been.

    Usage: `Faults(["delay=0.5", "http500=2", "drop-after=2x1"])`

    Attributes:
        delay: seconds each job waits before it runs.
        drop_after: statuses after which a websocket is cut, or None.
        left: how often each kind is still to happen; kinds without an end are not in it.
        fired: how often each kind has happened.

    Raises:
        ValueError: a kind that does not exist, or a number that is none.
    """

    def __init__(self, asked: Iterable[str] = ()) -> None:
        self.delay = 0.0
        self.drop_after: int | None = None
        self.left: Counter[str] = Counter()
        self.fired: Counter[str] = Counter()
        self._endless: set[str] = set()
        for one in asked:
            kind, _, number = one.partition("=")
            try:
                self._plan(kind, number)
            except ValueError as error:
                raise ValueError(f"--fault {one}: {error}") from None

    def _plan(self, kind: str, number: str) -> None:
        if kind == "delay":
            self.delay = float(number)
            if self.delay < 0:
                raise ValueError("seconds cannot be negative")
        elif kind == "drop-after":
            frames, times, count = number.partition("x")
            self.drop_after = int(frames)
            if times:
                self.left[kind] = int(count)
            else:
                self._endless.add(kind)
        elif kind in COUNTED:
            self.left[kind] += int(number)
        else:
            known = ", ".join(("delay", "drop-after", *COUNTED))
            raise ValueError(f"no such fault; there are {known}")

    def take(self, kind: str) -> bool:
        """Whether this fault is to happen now; if so, it is counted as having happened."""
        if kind not in self._endless:
            if self.left[kind] <= 0:
                return False
            self.left[kind] -= 1
        self.fired[kind] += 1
        return True
