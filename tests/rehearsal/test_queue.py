"""Many jobs: each answered right, run once, and told where it stands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import websocket

from tests.rehearsal.conftest import Payload
from tests.rehearsal.raw import envelope, fetch, finish, submit
from tests.rehearsal.serving import ROOT

CLIENT = """
import json, sys
from pathlib import Path
import httpx
url, key, folder = sys.argv[1:4]
ids = {}
with httpx.Client(headers={"ndif-api-key": key}, timeout=60) as client:
    for path in sys.argv[4:]:
        form = {"data": Path(folder, "envelope").read_text()}
        response = client.post(url + "/request", data=form, files={"blob": Path(path).read_bytes()})
        ids[Path(path).name] = response.raise_for_status().json()["id"]
print(json.dumps(ids))
"""


def test_a_hundred_jobs_from_four_processes(server, payloads, llava, tmp_path):
    """All answered, each with its own answer, each run once."""
    Path(tmp_path / "envelope").write_text(envelope())
    for i in range(100):
        (tmp_path / str(i)).write_bytes(payloads(i))
    before = server.executed
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, server.url, server.key, str(tmp_path)]
            + [str(tmp_path / str(i)) for i in range(k, 100, 4)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        for k in range(4)
    ]
    ids: dict[str, str] = {}
    for client in clients:
        ids |= json.loads(client.communicate(timeout=120)[0])
    norm = llava.lm_head._module.weight.norm().item()
    assert len(ids) == len(set(ids.values())) == 100
    for i, job in ids.items():
        answer = fetch(server, finish(server, job))["answer"]
        assert answer == pytest.approx(int(i) * norm)
    after = server.executed
    assert {job: after[job] for job in after if job not in before} == dict.fromkeys(ids.values(), 1)


def test_positions_in_the_queue(server, payloads, llava, tmp_path):
    """While one job waits for a file, the others are told where they stand, and move up."""
    backend, gate = Payload(), str(tmp_path / "gate")
    with llava.session(backend=backend):
        import os

        while not os.path.exists(gate):  # noqa: PTH110
            pass
    ws = websocket.create_connection(
        server.url.replace("http", "ws") + "/subscribe", header=server.headers, timeout=60
    )
    session = json.loads(ws.recv())["session_id"]
    blobs = [backend.blob, payloads(1), payloads(2)]
    told: list[dict] = []

    def watch(until):
        while not any(until(one) for one in told):
            frame = ws.recv()
            told.append({"status": "done"} if isinstance(frame, bytes) else json.loads(frame))

    jobs = [submit(server, blobs[0], session_id=session).json()["id"]]
    watch(lambda one: one["status"] == "RUNNING")
    jobs += [submit(server, blob, session_id=session).json()["id"] for blob in blobs[1:]]
    Path(gate).touch()
    watch(lambda one: one["status"] == "RUNNING" and one["id"] == jobs[2])
    ws.close()
    queued = [one for one in told if one["status"] == "QUEUED"]
    assert [(jobs.index(one["id"]), one["description"]) for one in queued] == [
        (0, "Position 1 of 1 in the queue."),
        (1, "Position 1 of 1 in the queue."),
        (2, "Position 2 of 2 in the queue."),
        (2, "Position 1 of 1 in the queue."),
    ]
    order = [one["id"] for one in told if one["status"] == "RUNNING"]
    assert order == jobs
