"""What the server answers before any job runs: keys, versions, bounds, what is kept how long.

In this process, without a worker: jobs wait in the queue and stay there.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import pytest
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from interp.rehearsal.app import make_app
from interp.rehearsal.board import Board, Job
from interp.rehearsal.faults import Faults
from interp.rehearsal.options import parse
from interp.rehearsal.runner import Runner
from interp.rehearsal.sessions import WAITING, Session
from tests.rehearsal.raw import envelope

KEY = "planted-key"
HERE = {"nnsight-version": version("nnsight"), "python-version": sys.version}


class App:
    """The application over a board whose clock is set by hand."""

    def __init__(self, *arguments: str) -> None:
        from tests.rehearsal.serving import TINY

        options = parse([TINY, *arguments])
        self.now = 0.0
        faults = Faults(options.fault)
        self.board = Board(options.keep, options.keep_bytes, clock=lambda: self.now)
        self.runner = Runner(options, self.board, faults)
        app = make_app(options, KEY, self.board, self.runner, faults)
        self.client = TestClient(app, headers={"ndif-api-key": KEY})

    def post(self, blob=b"x", headers=None, **fields):
        return self.client.post(
            "/request",
            data={"data": envelope(**fields)},
            files={"blob": ("request", blob)},
            headers=headers or {},
        )


def detail(response):
    return response.json()["detail"]


# -- the key ---------------------------------------------------------------------------------------

LOCKED = [("POST", "/request"), ("GET", "/response/x"), ("GET", "/whoami"), ("GET", "/faults")]


@pytest.mark.parametrize(("method", "path"), LOCKED)
@pytest.mark.parametrize("key", ["", "wrong", KEY + "x", KEY[:-1], "\xe9"])
def test_no_key_no_service(method, path, key):
    app = App()
    headers = {"ndif-api-key": key.encode("latin-1")}
    response = app.client.request(method, path, headers=headers)
    assert response.status_code == 401
    assert "NDIF_API_KEY" in detail(response)
    assert KEY not in response.text


def test_no_key_no_websocket():
    app = App()
    with (
        pytest.raises(WebSocketDisconnect) as caught,
        app.client.websocket_connect("/subscribe", headers={"ndif-api-key": "wrong"}),
    ):
        pass
    assert caught.value.status_code == 401
    assert "NDIF_API_KEY" in caught.value.json()["detail"]


def test_what_is_open_to_all():
    app = App()
    app.runner.facts = {"env": {"python_version": "3", "packages": {}}, "n_parameters": 1}
    for path in ("/status", "/env", "/ping"):
        assert app.client.get(path, headers={"ndif-api-key": ""}).status_code == 200


# -- versions --------------------------------------------------------------------------------------


def test_equal_versions_are_served():
    assert App().post(headers=HERE).status_code == 200
    patch = {**HERE, "nnsight-version": HERE["nnsight-version"].rpartition(".")[0] + ".99"}
    assert App().post(headers=patch).status_code == 200


def test_another_nnsight_is_refused():
    headers = {**HERE, "nnsight-version": "0.5.3"}
    response = App().post(headers=headers)
    assert response.status_code == 400
    assert "0.5.3" in detail(response)
    assert HERE["nnsight-version"] in detail(response)
    assert App("--no-require-versions").post(headers=headers).status_code == 200


def test_another_python_is_served_since_code_travels_by_source():
    assert App().post(headers={**HERE, "python-version": "3.99.1 (main)"}).status_code == 200


def test_a_pretended_version():
    response = App("--pretend-version", "0.7.0").post(headers=HERE)
    assert response.status_code == 400
    assert "pip install nnsight==0.7.0" in detail(response)


# -- bounds ----------------------------------------------------------------------------------------


def test_a_large_body_is_refused_by_its_announcement():
    response = App("--max-body", "1").post(b"x" * 3 * 2**20)
    assert response.status_code == 413
    assert "3.0 MB" in detail(response)
    assert "1 MB" in detail(response)


def test_a_blob_just_over_and_just_under():
    app = App("--max-body", "1")
    assert app.post(b"x" * (2**20 + 1)).status_code == 413
    assert app.post(b"x" * 2**20).status_code == 200


def test_a_full_queue():
    app = App("--max-queue", "2")
    assert [app.post().status_code for _ in range(3)] == [200, 200, 429]
    response = app.post()
    assert response.headers["Retry-After"] == "1"
    assert "2 jobs are waiting" in detail(response)


def test_a_queue_full_of_bytes():
    app = App("--max-body", "0.01")
    codes = [app.post(b"x" * 10_000).status_code for _ in range(9)]
    assert codes == [200] * 8 + [429]


# -- statuses and results --------------------------------------------------------------------------


def test_the_statuses_of_two_jobs_in_a_session():
    app = App()
    session = Session("http://here")
    jobs = [Job(b"x", True, {}, session) for _ in range(2)]
    for job in jobs:
        app.board.add(job)
        app.runner.add(job)
    told = [json.loads(session.frames.get_nowait()) for _ in range(4)]
    assert [(one["id"], one["status"], one["description"]) for one in told] == [
        (jobs[0].id, "RECEIVED", "The job has been received."),
        (jobs[0].id, "QUEUED", "Position 1 of 1 in the queue."),
        (jobs[1].id, "RECEIVED", "The job has been received."),
        (jobs[1].id, "QUEUED", "Position 2 of 2 in the queue."),
    ]
    for job in jobs:  # those of a session can be asked for as well
        assert app.client.get(f"/response/{job.id}").json()["status"] == "QUEUED"


def test_the_answer_to_a_request():
    app = App()
    answer = app.post().json()
    assert answer["status"] == "RECEIVED"
    assert app.client.get(f"/response/{answer['id']}").json()["status"] == "QUEUED"
    assert app.client.get("/faults").json()["executed"] == {}


def test_a_client_that_does_not_read_is_cut_off():
    session = Session("http://here")
    for _ in range(WAITING + 1):
        session.put("frame")
    assert session.frames.get_nowait() is None


def completed(app, n_bytes):
    job = Job(b"x", True, {}, None)
    app.board.add(job)
    app.board.complete(job, b"r" * n_bytes, b"", {})
    return job


def test_a_result_is_fetched_by_its_url_without_a_key():
    app = App()
    job = completed(app, 10)
    told = app.client.get(f"/response/{job.id}", headers={"host": "localhost:5"}).json()
    assert told["status"] == "COMPLETED"
    assert told["data"].startswith("http://localhost:5/results/")
    assert job.id not in told["data"]
    path = told["data"].removeprefix("http://localhost:5")
    assert app.client.get(path, headers={"ndif-api-key": ""}).content == b"r" * 10
    assert app.client.get(path[:-1]).status_code == 404


def test_the_oldest_results_are_dropped_first():
    app = App("--keep-size", str(25 / 2**20))
    jobs = [completed(app, 10) for _ in range(3)]
    told = [app.client.get(f"/response/{job.id}").json() for job in jobs]
    assert [one["status"] for one in told] == ["ERROR", "COMPLETED", "COMPLETED"]
    assert told[0]["description"].startswith("result dropped")
    assert app.client.get(f"/results/{jobs[0].ticket}").status_code == 404


def test_a_job_is_forgotten_after_a_while():
    app = App("--keep", "2")
    job = completed(app, 10)
    app.now = 119
    assert app.client.get(f"/response/{job.id}").status_code == 200
    app.now = 121
    assert app.client.get(f"/response/{job.id}").status_code == 404
    assert app.client.get(f"/results/{job.ticket}").status_code == 404


def test_a_log_line_does_not_hide_the_status():
    app = App()
    job = Job(b"x", True, {}, None)
    app.board.add(job)
    app.board.tell(job, "RUNNING", "")
    app.board.tell(job, "LOG", "printed")
    assert app.client.get(f"/response/{job.id}").json()["status"] == "RUNNING"


def test_before_the_model_is_there():
    app = App()
    deployment = next(iter(app.client.get("/status").json()["deployments"].values()))
    assert deployment["application_state"] == "DEPLOYING"
    assert app.client.get("/env").status_code == 503


# -- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["m", "--host", "0.0.0.0"], "this machine only"),
        (["m", "--host", "example.org"], "this machine only"),
        (["m", "--fault", "http418=1"], "no such fault"),
        (["m", "--fault", "http500=x"], "http500=x"),
        (["m", "--fault", "delay=-1"], "negative"),
        (["m", "--max-body", "-1"], "max-body"),
        (["m", "--port", "70000"], "65535"),
        ([], "model"),
    ],
)
def test_a_command_line_that_is_refused(arguments, says, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert says in capsys.readouterr().err


def test_names_of_this_machine():
    assert parse(["m", "--host", "localhost"]).host == "127.0.0.1"
    assert parse(["m", "--host", "::1"]).host == "::1"
    assert parse(["m", "--name", "org/name"]).name == "org/name"


def test_faults_are_counted_down():
    faults = Faults(["http500=2", "drop-after=3x1", "delay=0.5"])
    assert [faults.take("http500") for _ in range(3)] == [True, True, False]
    assert (faults.drop_after, faults.take("drop-after"), faults.take("drop-after")) == (3, 1, 0)
    assert faults.delay == 0.5
    assert faults.fired == {"http500": 2, "drop-after": 1}
    endless = Faults(["drop-after=1"])
    assert all(endless.take("drop-after") for _ in range(100))
    assert json.dumps(endless.left) == "{}"
