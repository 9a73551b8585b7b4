"""Clients that mean harm or know no better: each is answered, and the next job is served."""

from __future__ import annotations

import pickle
import socket

import pytest
import websocket
import zstandard

from tests.rehearsal.conftest import Payload
from tests.rehearsal.raw import envelope, fetch, model_key, run, submit
from tests.rehearsal.serving import wait_for_end


@pytest.fixture(autouse=True)
def still_serves(server, payloads, llava):
    """After each test of this file, an ordinary job is answered right."""
    yield
    assert server.process.poll() is None
    norm = llava.lm_head._module.weight.norm().item()
    assert fetch(server, run(server, payloads(7)))["answer"] == pytest.approx(7 * norm)


def subscribe(server):
    return websocket.create_connection(
        server.url.replace("http", "ws") + "/subscribe", header=server.headers, timeout=30
    )


def test_garbage_in_a_websocket(server):
    for send in (
        lambda ws: ws.send("not json"),
        lambda ws: ws.send_binary(bytes(range(256)) * 16),
        lambda ws: ws.send("x" * 2**20),  # more than a frame may have
        lambda ws: ws.sock.sendall(b"\xff" * 64),  # no frame at all
        lambda ws: ws.sock.close(),
    ):
        ws = subscribe(server)
        assert "session_id" in ws.recv()
        send(ws)
        ws.close()


def test_garbage_for_http(server):
    host, port = server.url.removeprefix("http://").split(":")
    for sent in (
        b"\x16\x03\x01\x00\xff",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /request HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            assert b"200" not in connection.recv(4096)[:15]


def test_a_client_that_leaves_in_the_middle_of_its_request(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"POST /request HTTP/1.1\r\nHost: here\r\nndif-api-key: %s\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 5000\r\n\r\n--x\r\n"
            % server.key.encode()
        )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("{not json", "no request"),
        ("[]", "no request"),
        ("{}", "model_key"),
        (envelope(model_key=3), "model_key"),
        (envelope(model_key="x" * 5000), "model_key"),
        (envelope(model_key="no colon"), "no model key"),
        (envelope(model_key="a.b:{}"), "no model key"),
        (envelope(model_key="a.b:[1]"), "no model key"),
        (envelope(env=[1]), "env"),
        (envelope(session_id="s" * 1000), "session_id"),
    ],
)
def test_a_bad_envelope(server, data, says):
    response = server.client.post(
        f"{server.url}/request",
        data={"data": data},
        files={"blob": b"x"},
        headers=server.headers,
    )
    assert response.status_code == 400
    assert says in response.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        {"content": b"no form"},
        {"data": {"data": envelope()}},
        {"files": {"blob": b"x"}},
        {"data": {"data": envelope(), "blob": "text"}, "files": {"other": b"x"}},
        {"files": {"data": b"{}", "blob": b"x"}},
        {"data": {"data": "x" * 2**21}, "files": {"blob": b"x"}},
        {"content": b"--x\r\nrubbish", "headers": {"Content-Type": "multipart/form-data"}},
        {
            "content": b"--x\r\nrub\0bish",
            "headers": {"Content-Type": "multipart/form-data; boundary=x"},
        },
    ],
)
def test_a_bad_form(server, body):
    headers = {**server.headers, **body.pop("headers", {})}
    response = server.client.post(f"{server.url}/request", headers=headers, **body)
    assert response.status_code == 400
    assert "form" in response.json()["detail"] or "part" in response.json()["detail"]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (model_key("someone/else"), "repo_id 'someone/else'"),
        (model_key(task="text-generation"), "task 'text-generation'"),
        (model_key(revision="v2"), "revision 'v2'"),
        (model_key().replace("TransformersModel", "DiffusionModel"), "DiffusionModel"),
    ],
)
def test_another_model(server, key, says):
    response = submit(server, b"x", model_key=key)
    assert response.status_code == 404
    assert says in response.json()["detail"]


class Nonsense:
    """Unpickles to something else."""

    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        (b"", "unpacked"),
        (b"garbage", "zstd"),
        (zstandard.compress(b"garbage"), "unpacked"),
        (zstandard.compress(b""), "unpacked"),
        (zstandard.compress(pickle.dumps({"a": 1})), "unpacked"),
        (zstandard.compress(pickle.dumps((1, (2, 3, 4)))), "unpacked"),
        (zstandard.compress(pickle.dumps(Nonsense())), "unpacked"),
    ],
)
def test_a_blob_that_is_no_job(server, blob, says):
    told = run(server, blob)
    assert told["status"] == "ERROR"
    assert told["description"].startswith("JobRefused: ")
    assert says in told["description"]


def test_a_truncated_blob(server, payloads):
    told = run(server, payloads(1)[:-20])
    assert told["status"] == "ERROR"
    assert told["description"].startswith("JobRefused: ")


def test_an_implementation_that_does_not_exist(server, payloads):
    told = run(server, payloads(1), env={"attn_implementation": "no such thing"})
    assert told["status"] == "ERROR"
    assert "no such thing" in told["description"]


def test_a_job_that_exits(server, llava):
    backend = Payload()
    with llava.session(backend=backend):
        import sys

        sys.exit(3)
    told = run(server, backend.blob)
    assert told["status"] == "ERROR"
    assert told["description"].endswith("SystemExit: 3")


def test_a_job_that_takes_more_than_there_is(server, llava):
    backend = Payload()
    with llava.session(backend=backend):
        import torch

        torch.empty(10**14).save()
    told = run(server, backend.blob)
    assert told["status"] == "ERROR"
    assert "allocate" in told["description"].splitlines()[-1]


def test_a_job_that_ends_its_process(server, llava, tmp_path):
    """What it had started ends with it."""
    backend, note = Payload(), str(tmp_path / "pid")
    with llava.session(backend=backend):
        import os
        import subprocess

        child = subprocess.Popen(["sleep", "1000"])
        with open(note, "w") as file:  # noqa: PTH123
            file.write(str(child.pid))
        os._exit(3)
    told = run(server, backend.blob)
    assert told["status"] == "ERROR"
    assert "the worker died while it ran this job (exit status 3)" in told["description"]
    assert server.executed[told["id"]] == 1
    wait_for_end(int((tmp_path / "pid").read_text()))
