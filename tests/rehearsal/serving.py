"""Starting rehearsal servers for tests, each a process of its own.

    from tests.rehearsal.serving import serve

    with serve(folder, "--fault", "http500=1") as server:
        server.url, server.key, server.log        # "http://127.0.0.1:...", str, what it printed

The model is loaded when `serve` enters (about five seconds for the bundled one, most of them for
importing torch and transformers); on leaving, the server must stop by SIGTERM with status 0.
`starting` begins without waiting, so that several start side by side.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "interp" / "rehearsal" / "__main__.py"
TINY = str(ROOT / "interp" / "assets" / "tiny")
PATIENCE = 180.0  # seconds; a bound for a server that hangs, never waited for otherwise


@dataclass
class Server:
    """A server that takes jobs.

    Attributes:
        url: "http://127.0.0.1:PORT".
        key: to be sent as `ndif-api-key`.
        pid: of the process that listens; the worker is another.
        log: all it printed, stdout and stderr.
    """

    url: str
    key: str = field(repr=False)
    pid: int
    log: Path
    process: subprocess.Popen[bytes]
    #: sends no key, and is quicker than `httpx.get`, which reads certificates each time
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60), repr=False)

    @property
    def headers(self) -> dict[str, str]:
        return {"ndif-api-key": self.key}

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        """GET with the key."""
        return self.client.get(self.url + path, headers=self.headers, **kwargs)

    @property
    def executed(self) -> dict[str, int]:
        """How often each job was run, by its id."""
        return self.get("/faults").json()["executed"]

    @property
    def fired(self) -> dict[str, int]:
        """How often each fault happened."""
        return self.get("/faults").json()["fired"]


class Starting:
    """A server on its way; `ready()` waits for it, `stop()` ends it."""

    def __init__(
        self,
        model: str,
        *options: str,
        key: str | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self._ready = Path(self.folder.name) / "ready.json"
        self.log = Path(self.folder.name) / "log"
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NDIF_API_KEY")}
        env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        if key is not None:
            env["INTERP_SERVE_KEY"] = key
        env |= environment or {}
        command = [sys.executable, str(PROGRAM), str(model), "--port", "0"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--ready-file", str(self._ready), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder.name,
                env=env,
            )

    def ready(self) -> Server:
        """Wait until it takes jobs.

        Raises:
            RuntimeError: it ended instead, or hangs; with what it printed.
        """
        deadline = time.monotonic() + PATIENCE
        while not self._ready.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()}")
            time.sleep(0.02)
        return Server(**json.loads(self._ready.read_text()), log=self.log, process=self.process)

    def stop(self) -> int:
        """End it by SIGTERM; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.folder.cleanup()


def alive(pid: int) -> bool:
    """Whether a process still runs; one that has ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_for_end(pid: int) -> None:
    """Return when a process has ended."""
    deadline = time.monotonic() + 60
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.01)


@contextlib.contextmanager
def serve(
    model: str | os.PathLike[str] = TINY,
    *options: str,
    key: str | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """A server for the `with` block.

    Args:
        model: a folder; the bundled model by default.
        options: of the command line, beside MODEL, --port and --ready-file.
        key: the API key; made by the server if not given.
        environment: variables beside this process's own.
    """
    starting = Starting(str(model), *options, key=key, environment=environment)
    try:
        yield starting.ready()
    finally:
        status = starting.stop()
    assert status == 0, f"the server ended with status {status}"
