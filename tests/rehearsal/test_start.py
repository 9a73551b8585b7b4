"""Starting and stopping."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys

import pytest
import websocket

from tests.rehearsal.conftest import Payload
from tests.rehearsal.raw import submit
from tests.rehearsal.serving import PROGRAM, TINY, Starting, wait_for_end


def test_it_ends_with_its_worker(llava):
    """By Ctrl-C, although a client listens and a job runs without end."""
    backend = Payload()
    with llava.session(backend=backend):
        while True:
            pass
    starting = Starting(TINY)
    try:
        server = starting.ready()
        log = server.log.read_text()
        assert log.count(server.key) == 1
        assert f"NDIF_API_KEY={server.key}\n" in log
        assert "1,018,208 parameters" in log
        assert "It runs what it is sent" in log
        ready = server.log.with_name("ready.json")
        assert ready.stat().st_mode & 0o777 == 0o600
        worker = _children(server.pid)
        assert len(worker) == 1
        ws = subscribe(server)
        session = json.loads(ws.recv())["session_id"]
        submit(server, backend.blob, session_id=session)
        while json.loads(ws.recv())["status"] != "RUNNING":
            pass
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
        wait_for_end(worker[0])
    finally:
        starting.stop()


def _children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def test_a_worker_does_not_outlive_a_server_that_was_killed(llava):
    """Even with a job at hand that never ends."""
    backend = Payload()
    with llava.session(backend=backend):
        print("here")
        while True:
            pass
    starting = Starting(TINY)
    try:
        server = starting.ready()
        worker = _children(server.pid)
        ws = subscribe(server)
        submit(server, backend.blob, session_id=json.loads(ws.recv())["session_id"])
        while json.loads(ws.recv())["status"] != "LOG":
            pass
        server.process.kill()
        wait_for_end(worker[0])
    finally:
        starting.stop()


def subscribe(server):
    return websocket.create_connection(
        server.url.replace("http", "ws") + "/subscribe", header=server.headers, timeout=60
    )


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = subprocess.run(
            [sys.executable, str(PROGRAM), TINY, "--port", port], capture_output=True, text=True
        )
    assert ended.returncode == 1
    assert "--port" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_model_that_is_not_there(tmp_path):
    starting = Starting(str(tmp_path / "nothing"))
    try:
        with pytest.raises(RuntimeError, match="cannot be served"):
            starting.ready()
    finally:
        assert starting.stop() == 1


def test_not_as_a_part_of_interp():
    ended = subprocess.run(
        [sys.executable, "-m", "interp.rehearsal", TINY],
        capture_output=True,
        text=True,
        cwd=PROGRAM.parents[2],
    )
    assert ended.returncode == 1
    assert str(PROGRAM) in ended.stderr
