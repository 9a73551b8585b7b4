"""The queue, and the worker at its end.

Jobs run one at a time in the order in which they came. The worker is a process that can be lost at
any moment: a job may end it, take too long (it is killed then), or leave the model changed (it is
replaced then, so that the next job finds the model as it was loaded). The job at hand ends with an
ERROR that says what happened; it is never run a second time, because it may have been the cause.
The next worker starts at once, and the queue goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections import Counter, deque
from pathlib import Path
from typing import Any

from .board import Board, Job
from .faults import Faults
from .link import Message, receive, send
from .options import Options

log = logging.getLogger("rehearsal")

TIDYING = 120.0  # seconds a worker has to put the model back after a job
MARGIN = 2**20  # bytes of a message beside the result and its frame
NOT_FOR_JOBS = ("NDIF_API_KEY", "PYTHONPATH")  # a key, and modules that NDIF does not have


class WorkerFailed(Exception):
    """The worker's process ended, or sent what it should not."""


class Worker:
    """A process with the model in it. Use `start`.

    Attributes:
        facts: what it told when it was ready: parameters, packages and the like.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        longest: int,
    ) -> None:
        self.facts: dict[str, Any] = {}
        self._process = process
        self._reader = reader
        self._writer = writer
        self._longest = longest

    @classmethod
    async def start(cls, options: Options) -> Worker:
        """Start a process and wait until it holds the model.

        Raises:
            WorkerFailed: it cannot; its own words are in the message or on stderr.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                str(Path(__file__).with_name("__main__.py")),
                "--worker",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr,  # stdout is for the key
                pass_fds=(theirs.fileno(),),
                env={name: value for name, value in os.environ.items() if name not in NOT_FOR_JOBS},
                start_new_session=True,  # so that it can be killed with all that a job started
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = cls(process, reader, writer, options.max_result + options.inline + 2 * MARGIN)
        try:
            await worker.send(_settings(options))
            head, _ = await worker.receive()
        except BaseException:
            await worker.end()
            raise
        if head.get("say") != "ready":
            await worker.end()
            raise WorkerFailed(str(head.get("text", "it did not say why")))
        worker.facts = head
        return worker

    async def send(self, head: dict[str, Any], body: bytes = b"") -> None:
        """Hand it a message.

        Raises:
            WorkerFailed: it is gone.
        """
        try:
            await send(self._writer, head, body)
        except OSError:
            raise WorkerFailed(await self._death()) from None

    async def receive(self) -> Message:
        """Its next message.

        Raises:
            WorkerFailed: it is gone.
        """
        try:
            return await receive(self._reader, self._longest)
        except EOFError:
            raise WorkerFailed(await self._death()) from None

    async def end(self) -> int:
        """Kill it with all processes it started; its exit status."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._writer.close()
        return await self._process.wait()

    async def _death(self) -> str:
        """How it ended; a process that only closed the connection is killed after a moment."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await self._process.wait()
        status = await self.end()
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exit status {status}"


class Runner:
    """Runs the jobs of a queue, one at a time.

    Args:
        options: of the command line.
        board: told of everything that happens to a job.
        faults: may kill or delay.

    Attributes:
        executed: how many times each job was handed to a worker.
        facts: of the first worker.
        ready: set when they are there.
    """

    def __init__(self, options: Options, board: Board, faults: Faults) -> None:
        self.executed: Counter[str] = Counter()
        self.facts: dict[str, Any] = {}
        self.ready = asyncio.Event()
        self._options = options
        self._board = board
        self._faults = faults
        self._waiting: deque[Job] = deque()
        self._came = asyncio.Event()
        self._next: asyncio.Task[Worker] | None = None

    # -- the queue ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def n_bytes(self) -> int:
        """Bytes of all payloads that wait."""
        return sum(len(job.blob) for job in self._waiting)

    def add(self, job: Job) -> None:
        """Put a job at the end of the queue."""
        self._waiting.append(job)
        self._tell_position(job, len(self._waiting))
        self._came.set()

    def _tell_position(self, job: Job, position: int) -> None:
        text = f"Position {position} of {len(self._waiting)} in the queue."
        self._board.tell(job, "QUEUED", text)

    async def run(self) -> None:
        """Start a worker and run what comes, until cancelled.

        Raises:
            WorkerFailed: the very first worker cannot load the model.
        """
        try:
            self.facts = (await self._worker()).facts
            self.ready.set()
            while True:
                await self._came.wait()
                self._came.clear()
                while self._waiting:
                    job = self._waiting.popleft()
                    for i, other in enumerate(self._waiting):
                        self._tell_position(other, i + 1)
                    await self._one(job)
        finally:
            if self._next is not None:
                self._next.cancel()
                with contextlib.suppress(asyncio.CancelledError, WorkerFailed):
                    await (await self._next).end()

    # -- one job -----------------------------------------------------------------------------------

    async def _one(self, job: Job) -> None:
        log.info("job %s: %d bytes", job.id, len(job.blob))
        if self._next is None or not self._next.done():
            self._board.tell(job, "DEPLOYING", "The model is being loaded anew.")
        try:
            worker = await self._worker()
        except WorkerFailed as error:
            self._next = None  # try anew for the next job
            self._board.tell(job, "ERROR", f"the worker cannot be started: {error}")
            return
        self._board.tell(job, "DISPATCHED", "The job goes to the model.")
        if self._faults.delay:
            await asyncio.sleep(self._faults.delay)
        kill = self._faults.take("kill-worker")
        limit = self._options.job_time
        healthy = False
        try:
            async with asyncio.timeout(limit) as clock:
                await self._watch(worker, job, kill)
            async with asyncio.timeout(TIDYING):
                head, _ = await worker.receive()
            healthy = head == {"say": "idle", "changed": False}
            if not healthy:
                log.info("job %s changed the model's weights; it is loaded anew", job.id)
        except WorkerFailed as error:
            self._fail(
                job,
                f"the worker died while it ran this job ({error}). It was perhaps the job that "
                "ended it (os._exit, too much memory), perhaps not; it has not been run again",
            )
        except TimeoutError:
            if clock.expired():
                self._fail(job, f"the job took longer than {limit:g} s (--job-time) and was ended")
        finally:
            if not healthy:
                await worker.end()
                self._next = None
        if not healthy:
            self._next = asyncio.create_task(Worker.start(self._options))

    async def _watch(self, worker: Worker, job: Job, kill: bool) -> None:
        """Hand a job over and pass on what the worker says of it, until it has ended."""
        self.executed[job.id] += 1
        blob, job.blob = job.blob, b""
        await worker.send({"id": job.id, "compress": job.compress, "env": job.env}, blob)
        while True:
            head, body = await worker.receive()
            match head.get("say"):
                case "running":
                    self._board.tell(job, "RUNNING", "The job is running.")
                    if kill:
                        raise WorkerFailed(f"killed by the fault kill-worker, {await worker.end()}")
                case "log":
                    self._board.tell(job, "LOG", str(head.get("text")))
                case "done":
                    n_frame, meta = int(head["n_frame"]), dict(head["meta"])
                    n_result = len(body) - n_frame
                    self._board.complete(job, body[:n_result], body[n_result:], meta)
                    log.info("job %s: COMPLETED, %d bytes", job.id, n_result)
                    return
                case "error":
                    self._board.tell(job, "ERROR", str(head.get("text")), dict(head["meta"]))
                    log.info("job %s: ERROR", job.id)
                    return
                case other:
                    raise WorkerFailed(f"it said {other!r}")

    def _fail(self, job: Job, text: str) -> None:
        if job.finished is None:  # else it was answered, and the worker died tidying up
            self._board.tell(job, "ERROR", text)
        log.warning("job %s: %s", job.id, text)

    async def _worker(self) -> Worker:
        """The worker at hand, or the one that is being started."""
        if self._next is None:
            self._next = asyncio.create_task(Worker.start(self._options))
        return await asyncio.shield(self._next)


def _settings(options: Options) -> dict[str, Any]:
    wanted = ("model", "name", "task", "revision", "dtype", "device", "inline", "max_result")
    settings = {name: getattr(options, name) for name in wanted}
    return {
        **settings,
        "max_unpacked": options.max_unpacked,
        "max_memory": options.max_memory,
        "pretend": options.pretend_version,
    }
