"""Jobs that are left and picked up: by another call, by another process, after a Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from interp.remote import pick_up, submit
from interp.remote.errors import RemoteError
from tests.rehearsal.serving import ROOT, TINY, Starting
from tests.remote.pairs import same

READ = "blocks.4.hook_resid_post"
KEY = "planted-key-4711-secret"

SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from interp import MLLM
from interp.datasets import scenes
from interp.remote import pick_up, submit

class Told:
    def __call__(self, update):
        print(update.status, flush=True)
    def close(self):
        pass

url, what, *job = sys.argv[1:]
model = MLLM.load("tiny", remote=url)
x = model.prepare(scenes("test")[0].image, "What is in the picture?")
if what == "wait":
    model.host.transport.progress = Told()
    model.run(x, read="blocks.4.hook_resid_post")
else:
    print(submit(model.run, x, read="blocks.4.hook_resid_post").id)
    run = pick_up(job[0], model.run, x, read="blocks.4.hook_resid_post")
    print(float(run.logits.double().norm()))
"""


@pytest.fixture(scope="module")
def slow():
    """A server on which each job waits before it runs."""
    starting = Starting(TINY, "--name", "tiny", "--fault", "delay=1", key=KEY)
    try:
        yield starting.ready()
    finally:
        starting.stop()


@pytest.fixture
def asked(tiny, x):
    """What every run below must give."""
    return tiny.run(x, read=READ)


def right(run, asked):
    same(run.logits, asked.logits)
    same(run[READ], asked[READ])


def started(server, *words):
    """The script in a process of its own."""
    environment = {**os.environ, "NDIF_API_KEY": KEY, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), server.url, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_another_process(slow, load_from, x, asked):
    """A job is submitted here and picked up there, and one the other way, at the same time.

    A third process waits for its own, is stopped by Ctrl-C, and leaves it to be picked up.
    """
    model = load_from(slow)
    here = submit(model.run, x, read=READ)
    there, waiting = started(slow, "swap", here.id), started(slow, "wait")

    statuses = iter(waiting.stdout.readline, "")
    assert "QUEUED\n" in statuses  # reads up to there; it cannot have run yet
    waiting.send_signal(signal.SIGINT)
    out, err = waiting.communicate(timeout=60)
    assert waiting.returncode != 0
    assert "KeyboardInterrupt" in err or "Interrupted" in err

    id_there, norm = there.communicate(timeout=60)[0].split()
    assert float(norm) == pytest.approx(float(asked.logits.double().norm()), rel=1e-5)
    left = err.partition('interp.remote.pick_up("')[2].partition('", model.run')[0]
    assert left not in ("", here.id, id_there)
    for job in (left, id_there, here.id):
        right(pick_up(job, model.run, x, read=READ), asked)
    assert slow.executed == dict.fromkeys([here.id, id_there, left], 1)
    for text in (out, err, repr(here), repr(model), repr(model.host), slow.log.read_text()):
        assert KEY not in text


def test_a_job_of_another_call_is_told(served, hosted, x):
    job = submit(hosted.run, x, read=READ)
    with pytest.raises(RemoteError, match=r"another call \(interp\.execution\._execute"):
        pick_up(job.id, hosted.run_many, x, [[]])
    with pytest.raises(
        RemoteError, match="another call"
    ):  # the function is right, what it reads not
        pick_up(job.id, hosted.run, x, read="blocks.0.hook_resid_pre")
    right_kind = job.result()
    assert list(right_kind) == [READ]
    assert served.executed[job.id] == 1


def test_submit_is_for_models_elsewhere(tiny, hosted, x):
    before = hosted.host.traffic.requests
    with pytest.raises(RemoteError, match="made no request: its model runs here"):
        submit(tiny.run, x)
    with pytest.raises(RemoteError, match="this call made no request"):
        pick_up("some-job", tiny.run, x)
    assert hosted.host.traffic.requests == before
