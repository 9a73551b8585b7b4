"""What each job came to, for as long as it is kept.

Every job has an entry, those of a websocket's session too, so that a client whose connection drops
finds by the job's id what it missed. An entry holds the latest status; a result lies beside it
until it is dropped, and is fetched at a URL of its own that cannot be guessed. Two bounds hold:

* a finished job is forgotten after a while, its result with it (GET /response/ID is then a 404);
* all results together have at most so many bytes; the oldest are dropped first, and their jobs'
  status becomes an ERROR that says so.
"""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .sessions import Session

MOST_ENTRIES = 20_000  # statuses are small, but not nothing


@dataclass(eq=False)
class Job:
    """One request from its arrival on.

    Attributes:
        blob: the request's payload, until it has been handed to the worker.
        compress: whether payload and result are zstd-compressed.
        env: what the client wants applied to the model before the run.
        session: whom to tell, or None for a client that polls.
        status: the latest, as the client reads it, without the result's URL.
        result: torch.save's bytes, once there and until dropped.
        ticket: names the result in its URL.
    """

    blob: bytes
    compress: bool
    env: dict[str, Any]
    session: Session | None
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    status: dict[str, Any] = field(default_factory=dict)
    result: bytes | None = None
    ticket: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    finished: float | None = None

    def answer(self, base: str) -> dict[str, Any]:
        """The latest status for a client that spells the server's address `base`."""
        if self.status["status"] == "COMPLETED":
            return {**self.status, "data": f"{base}/results/{self.ticket}"}
        return self.status


class Board:
    """All jobs the server knows of, oldest first.

    Args:
        keep: seconds a finished job is kept.
        keep_bytes: bytes all results together may have.
        clock: seconds.
    """

    def __init__(
        self, keep: float, keep_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.keep = keep
        self.keep_bytes = keep_bytes
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._results: dict[str, Job] = {}  # by ticket, oldest first

    def add(self, job: Job) -> None:
        """Take a new job up."""
        self._jobs[job.id] = job
        self.tell(job, "RECEIVED", "The job has been received.")

    def get(self, job_id: str) -> Job | None:
        """The job of that id, unless it is unknown or forgotten."""
        self._forget()
        return self._jobs.get(job_id)

    def result(self, ticket: str) -> bytes | None:
        """The result that a URL names, unless it is gone."""
        self._forget()
        job = self._results.get(ticket)
        return job.result if job else None

    def tell(self, job: Job, status: str, text: str, meta: dict[str, Any] | None = None) -> None:
        """Set a job's status and send it to its session. LOG is sent, and not kept."""
        told: dict[str, Any] = {"id": job.id, "status": status, "description": text}
        if meta is not None:
            told["meta"] = meta
        if status != "LOG":
            job.status = told
        if status == "ERROR":
            self._finish(job)
        if job.session is not None:
            job.session.put(json.dumps(told))

    def complete(self, job: Job, result: bytes, frame: bytes, meta: dict[str, Any]) -> None:
        """Set a job's result.

        Args:
            job: which.
            result: torch.save's bytes.
            frame: the status with the result in it, for a websocket; empty if it is too large.
            meta: what the run took.
        """
        job.result = result
        job.status = {
            "id": job.id,
            "status": "COMPLETED",
            "description": "The job has been completed.",
            "meta": meta,
        }
        self._results[job.ticket] = job
        self._finish(job)
        if job.session is not None:
            job.session.put(frame or json.dumps(job.answer(job.session.base)))

    def _finish(self, job: Job) -> None:
        job.finished = self._clock()
        job.blob = b""
        self._forget()

    def _forget(self) -> None:
        """Hold both bounds."""
        now = self._clock()
        finished = [job for job in self._jobs.values() if job.finished is not None]
        extra = len(self._jobs) - MOST_ENTRIES
        for i, job in enumerate(finished):
            assert job.finished is not None
            if now - job.finished > self.keep or i < extra:
                del self._jobs[job.id]
                self._results.pop(job.ticket, None)
        size = sum(len(job.result or b"") for job in self._results.values())
        for job in list(self._results.values()):
            if size <= self.keep_bytes:
                break
            size -= len(job.result or b"")
            job.result = None
            del self._results[job.ticket]
            job.status = {
                "id": job.id,
                "status": "ERROR",
                "description": "result dropped: the server keeps "
                f"{self.keep_bytes / 2**20:g} MB of results (--keep-size), and newer ones took "
                "the place of this one. Run the job again",
            }
