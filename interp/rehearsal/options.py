"""What can be asked of the rehearsal server: the options of its command line.

Sizes are given in MB (2**20 bytes) and held in bytes; times are in seconds, `--keep` in minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields

from .faults import Faults

LOOPBACK = {"127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1", "::1": "::1"}
UNPACKED_PER_BODY = 16  # a body may hold this many times its greatest size when decompressed


@dataclass(frozen=True)
class Options:
    """The parsed command line; see `parse` for what each means. Bytes and seconds."""

    model: str
    name: str
    task: str
    revision: str | None
    dtype: str
    device: str | None
    host: str
    port: int
    max_body: int
    max_queue: int
    max_result: int
    inline: int
    job_time: float
    keep: float
    keep_bytes: int
    max_websockets: int
    max_memory: int
    require_versions: bool
    pretend_version: str | None
    fault: list[str]
    ready_file: str | None

    @property
    def max_unpacked(self) -> int:
        """Bytes a body may have once decompressed."""
        return self.max_body * UNPACKED_PER_BODY


def parse(arguments: Sequence[str]) -> Options:
    """Read a command line.

    Raises:
        SystemExit: it cannot be read, or asks for what is refused; the reason is on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="rehearsal",
        description="Serve one model on this machine through NDIF's wire protocol, to try scripts "
        "on before they go there. It runs what it is sent: for your own scripts, not a service.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", help="a folder with a transformers model, or a hub id")
    add("--name", help="the repo id by which clients ask for it (default: MODEL)")
    add("--task", default="image-text-to-text", help="text-generation for a text-only model")
    add("--revision", help="of the hub id")
    add("--dtype", default="auto", help="for instance bfloat16 (default: as saved)")
    add("--device", help="for instance cuda (default: cpu)")
    add("--host", default="127.0.0.1", help="127.0.0.1, localhost or ::1; nothing else")
    add("--port", type=int, default=5001, help="0 takes a free one")
    add("--max-body", type=_megabytes, default=_megabytes("64"), help="MB of a request")
    add("--max-queue", type=int, default=128, help="jobs waiting")
    add("--max-result", type=_megabytes, default=_megabytes("512"), help="MB of a result")
    add(
        "--inline",
        type=_megabytes,
        default=_megabytes("1"),
        help="MB up to which a result comes in the websocket, not by URL",
    )
    add("--job-time", type=float, default=600.0, help="seconds a job may run")
    add("--keep", type=float, default=60.0, help="minutes that what a job came to is kept")
    add("--keep-size", type=_megabytes, default=_megabytes("2048"), help="MB of results kept")
    add("--max-websockets", type=int, default=64, help="open at a time")
    add("--max-memory", type=_megabytes, default=0, help="MB a job may take; 0 for no limit")
    add(
        "--require-versions",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="refuse a client whose nnsight differs in its first two numbers",
    )
    add("--pretend-version", help="say that this nnsight runs here (for tests)")
    add("--fault", action="append", default=[], help="KIND=N: misbehave (for tests)")
    add("--ready-file", help="write url, key and pid there once jobs are taken")
    found = vars(parser.parse_args(arguments))
    if found["host"] not in LOOPBACK:
        parser.error(
            f"--host {found['host']}: the server runs whatever it is sent, so it listens on this "
            f"machine only, at {', '.join(LOOPBACK)}. From another machine, go through ssh -L"
        )
    try:
        Faults(found["fault"])
    except ValueError as error:
        parser.error(str(error))
    if found["model"].startswith("-") or found["port"] not in range(65536):
        parser.error("MODEL is a folder or a hub id, --port a number up to 65535")
    found["host"] = LOOPBACK[found["host"]]
    found["name"] = found["name"] or found["model"]
    found["keep"] *= 60
    found["keep_bytes"] = found.pop("keep_size")
    return Options(**{field.name: found[field.name] for field in fields(Options)})


def _megabytes(text: str) -> int:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} MB is no size")
    return int(number * 2**20)
