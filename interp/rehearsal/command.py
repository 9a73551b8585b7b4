"""The program: bind, load, print how to use it, serve until told to stop.

The key is made anew at each start and printed once, here, and nowhere else; INTERP_SERVE_KEY in the
environment sets it instead. Nothing logs a request's headers or its path.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from .app import make_app
from .board import Board
from .cutting import Cuttable
from .faults import Faults
from .options import Options, parse
from .runner import Runner, WorkerFailed

WARNING = "It runs what it is sent: for your own scripts on this machine, not a service."


def main(arguments: Sequence[str]) -> int:
    """Serve until SIGINT or SIGTERM.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The exit status: 0 when stopped, 1 if the port or the model cannot be had.
    """
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("rehearsal").setLevel(logging.INFO)
    given = os.environ.pop("INTERP_SERVE_KEY", "")
    if given and not (given.isascii() and given.isprintable() and " " not in given):
        print("INTERP_SERVE_KEY must be of visible ASCII characters", file=sys.stderr)
        return 1
    try:
        listener = _bind(options)
    except OSError as error:
        print(
            f"port {options.port} of {options.host} cannot be had ({error.strerror}); another "
            "server may have it: take one with --port, or any free one with --port 0",
            file=sys.stderr,
        )
        return 1
    try:
        asyncio.run(_serve(options, listener, given))
    except WorkerFailed as error:
        print(f"{options.model} cannot be served: {error}", file=sys.stderr)
        return 1
    return 0


def _bind(options: Options) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    # with the protocol named: asyncio else leaves Nagle's algorithm on, at 40 ms an answer
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, options.port))
    except OSError:
        listener.close()
        raise
    return listener


async def _serve(options: Options, listener: socket.socket, given: str) -> None:
    key = given or secrets.token_urlsafe(32)
    faults = Faults(options.fault)
    board = Board(options.keep, options.keep_bytes)
    runner = Runner(options, board, faults)
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(options, key, board, runner, faults),
            loop="asyncio",
            http=Cuttable,
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            ws_max_size=2**16,  # nothing is expected from a client there
            ws_ping_timeout=120,  # a client that is sending a large job does not read
            timeout_graceful_shutdown=1,
        )
    )

    def stop(*_: object) -> None:
        server.should_exit = True

    # uvicorn raises the signal it stopped for once more when it is done: these then catch it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    running = asyncio.create_task(runner.run())
    running.add_done_callback(stop)
    announcing = asyncio.create_task(
        _announce(options, listener, key, bool(given), runner, running)
    )
    try:
        await server.serve(sockets=[listener])
    finally:
        announcing.cancel()
        running.cancel()
        outcomes = await asyncio.gather(running, announcing, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome


async def _announce(
    options: Options,
    listener: socket.socket,
    key: str,
    given: bool,
    runner: Runner,
    running: asyncio.Task[None],
) -> None:
    """Say how to use the server as soon as the model is there."""
    await asyncio.wait(
        {running, asyncio.create_task(runner.ready.wait())}, return_when="FIRST_COMPLETED"
    )
    if not runner.facts:
        return
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    secret = "(the one in INTERP_SERVE_KEY)" if given else key
    print(
        f"{options.name}: {runner.facts['kind']}, {runner.facts['n_parameters']:,} parameters\n"
        f"URL: {url}\n"
        f"NDIF_API_KEY={secret}\n"
        f"In another terminal: export that line, then remote={url!r} in the script.\n"
        f"{WARNING}",
        flush=True,
    )
    if options.ready_file:
        _write_private(options.ready_file, {"url": url, "key": key, "pid": os.getpid()})


def _write_private(path: str, facts: dict[str, object]) -> None:
    """Write a file that only this user can read, all of it or none."""
    part = Path(f"{path}.{os.getpid()}.part")
    with os.fdopen(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        json.dump(facts, file)
    part.replace(path)
