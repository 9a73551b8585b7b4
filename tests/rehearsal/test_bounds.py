"""The bounds of a real server, set tight; and that it keeps a key it was given to itself."""

from __future__ import annotations

import contextlib
import socket

import httpx
import pytest
import torch
import websocket
import zstandard
from nnsight.intervention.backends.remote import RemoteError

from tests.rehearsal.conftest import Payload
from tests.rehearsal.raw import fetch, finish, run, submit
from tests.rehearsal.serving import TINY, serve

KEY = "a-key-planted-in-the-environment"
NDIF_KEY = "the-users-key-for-ndif"


@pytest.fixture(scope="module")
def tight():
    options = ["--max-body", "0.5", "--max-result", "0.3", "--inline", "0", "--job-time", "3"]
    options += ["--max-websockets", "2", "--max-memory", "200"]
    environment = {"NDIF_API_KEY": NDIF_KEY, "PYTHONPATH": "/elsewhere"}
    with serve(TINY, *options, key=KEY, environment=environment) as server:
        yield server
        log = server.log.read_text()
        assert "URL: http://127.0.0.1:" in log
        assert KEY not in log
        assert NDIF_KEY not in log


def test_a_large_result_comes_by_url(tight, llava, picture_inputs, use):
    url, x = use(tight), picture_inputs
    with llava.trace(**x, remote=url):
        logits = llava.output.logits[:, -1].clone().save()
    with torch.no_grad():
        assert torch.allclose(logits, llava._module(**x).logits[:, -1], atol=1e-5)


def test_a_result_that_is_too_large(tight, llava):
    backend = Payload()
    with llava.session(backend=backend):
        import torch

        zeros = torch.zeros(2**18).save()  # noqa: F841
    told = run(tight, backend.blob)
    assert told["status"] == "ERROR"
    assert told["description"].startswith("JobRefused: the saved values have 1.0 MB")


def test_a_body_that_is_too_large(tight, llava, use):
    """The client hears why, although the server did not wait for the body."""
    url = use(tight)
    noise = torch.randn(5 * 2**20)

    def job():
        with llava.session(remote=url):
            noise.sum().save()

    with pytest.raises(RemoteError, match=r"takes 0\.5 MB \(--max-body\)"):
        job()


def test_a_client_that_sends_it_all_before_it_listens(tight):
    """The refusal is not lost to a connection that is reset with data unread."""
    host, port = tight.url.removeprefix("http://").split(":")
    size = 64 * 2**20
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(
            b"POST /request HTTP/1.1\r\nHost: here\r\nndif-api-key: %s\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: %d\r\n\r\n"
            % (tight.key.encode(), size)
        )
        for _ in range(64):
            connection.sendall(bytes(2**20))
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_say_how_large_it_is(tight):
    def chunks():
        head = b'--x\r\nContent-Disposition: form-data; name="blob"; filename="b"\r\n\r\n'
        yield head
        for _ in range(40):
            yield b"x" * 2**16

    response = httpx.post(
        f"{tight.url}/request",
        content=chunks(),
        headers={**tight.headers, "Content-Type": "multipart/form-data; boundary=x"},
    )
    assert response.status_code == 413


def test_a_bomb(tight):
    told = run(tight, zstandard.compress(bytes(2**30)))
    assert told["status"] == "ERROR"
    assert told["description"] == ("JobRefused: the payload holds more than 8 MB when decompressed")


def test_a_job_that_takes_too_long(tight, payloads, llava):
    backend = Payload()
    with llava.session(backend=backend):
        while True:
            pass
    first = submit(tight, backend.blob).json()["id"]
    second = submit(tight, payloads(3)).json()["id"]
    told = finish(tight, first)
    assert told["status"] == "ERROR"
    assert "longer than 3 s (--job-time)" in told["description"]
    assert "answer" in fetch(tight, finish(tight, second))
    assert tight.executed[first] == tight.executed[second] == 1


def test_a_job_that_fills_the_memory(tight, llava):
    backend = Payload()
    with llava.session(backend=backend):
        import torch

        kept = [torch.ones(2**22) for _ in range(100)]  # noqa: F841
    told = run(tight, backend.blob)
    assert told["status"] == "ERROR"
    assert "allocate" in told["description"]


def test_more_websockets_than_allowed(tight):
    url = tight.url.replace("http", "ws") + "/subscribe"
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            ws = websocket.create_connection(url, header=tight.headers, timeout=30)
            stack.callback(ws.close)
            ws.recv()
        with pytest.raises(websocket.WebSocketBadStatusException) as caught:
            websocket.create_connection(url, header=tight.headers, timeout=30)
    assert caught.value.status_code == 429


def test_a_wrong_key(tight, llava, use):
    url = use(tight, key="wrong")

    def job():
        with llava.session(remote=url):
            llava.lm_head.weight.norm().save()

    with pytest.raises(websocket.WebSocketBadStatusException) as caught:
        job()
    assert caught.value.status_code == 401
    assert "NDIF_API_KEY" in str(caught.value)


def test_a_job_does_not_find_keys_or_the_users_modules(tight, llava):
    backend = Payload()
    with llava.session(backend=backend):
        import os

        found = dict(os.environ).save()
    found = fetch(tight, run(tight, backend.blob))["found"]
    assert found["HF_HUB_OFFLINE"] == "1"
    for planted in (KEY, NDIF_KEY, "/elsewhere"):
        assert planted not in str(found)
