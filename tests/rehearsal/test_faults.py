"""Each fault happens as often as it was asked for, and no job runs twice for it."""

from __future__ import annotations

import json
import time

import httpx
import pytest
import websocket

from tests.rehearsal.raw import fetch, finish, run, submit
from tests.rehearsal.serving import TINY, serve

FAULTS = ["http500=1", "http429=1", "http503=1", "lose-answer=1", "kill-worker=1", "poll404=1"]
DELAY = 0.2  # seconds


@pytest.fixture(scope="module")
def faulty():
    """Its faults fire in the order of the tests of this file."""
    options = [
        word
        for fault in (*FAULTS, "drop-after=2x1", f"delay={DELAY}")
        for word in ("--fault", fault)
    ]
    with serve(TINY, *options) as server:
        yield server


def test_answers_that_refuse_once(faulty, payloads):
    answers = [submit(faulty, payloads(1)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [500, 429, 503]
    assert answers[1].headers["Retry-After"] == "1"
    assert faulty.executed == {}


def test_a_websocket_cut_and_a_lost_answer_and_a_killed_worker(faulty, payloads):
    """One job meets all three; its id is known from the websocket, its end from polling."""
    ws = websocket.create_connection(
        faulty.url.replace("http", "ws") + "/subscribe", header=faulty.headers, timeout=60
    )
    session = json.loads(ws.recv())["session_id"]
    with pytest.raises(httpx.RemoteProtocolError):
        submit(faulty, payloads(2), session_id=session)
    told = [json.loads(ws.recv()) for _ in range(2)]
    assert [one["status"] for one in told] == ["RECEIVED", "QUEUED"]
    with pytest.raises((websocket.WebSocketConnectionClosedException, ConnectionError)):
        ws.recv()
    job = told[0]["id"]
    assert faulty.get(f"/response/{job}").status_code == 404  # once
    end = finish(faulty, job)
    assert end["status"] == "ERROR"
    assert "the worker died" in end["description"]
    assert "kill-worker" in end["description"]
    assert faulty.executed == {job: 1}


def test_and_then_no_more(faulty, payloads, llava):
    norm = llava.lm_head._module.weight.norm().item()
    told = run(faulty, payloads(3))
    assert fetch(faulty, told)["answer"] == pytest.approx(3 * norm)
    assert faulty.fired == {
        **{fault.partition("=")[0]: 1 for fault in FAULTS},
        "drop-after": 1,
    }
    assert sorted(faulty.executed.values()) == [1, 1]


def test_a_delay(faulty, payloads):
    began = time.monotonic()
    told = run(faulty, payloads(1))
    assert told["meta"]["seconds"] < time.monotonic() - began - DELAY
