"""Every fault of a server, met by `model.run`: survived, or refused with words; none runs twice.

How often each job was run is the server's own count (`/faults`).
"""

from __future__ import annotations

import pytest
import torch

from interp import MLLM
from interp.remote import Limits
from interp.remote.errors import JobFailed, TooLarge, VersionsDiffer, WrongKey
from tests.rehearsal.serving import TINY, Starting
from tests.remote.pairs import same

READ = "blocks.4.hook_resid_post"
KEY = "planted-key-4711-secret"
NAMED = ("--name", "tiny")
#: by fixture name: the options of a server of its own
SERVERS = {
    "faulty": [
        "http500=1",
        "http429=1",
        "http503=1",
        "lose-answer=1",
        "drop-after=2x1",
        "poll404=1",
    ],
    "narrow": ["kill-worker=1"],
    "old": [],
}
MORE = {"narrow": ["--max-body", "0.15"], "old": ["--pretend-version", "0.7.0"]}
QUICK = Limits(first_wait=0.01, max_wait=0.02)


@pytest.fixture(scope="module")
def servers():
    """All of them, started side by side."""
    starting = {}
    for name, faults in SERVERS.items():
        options = [word for fault in faults for word in ("--fault", fault)]
        starting[name] = Starting(TINY, *NAMED, *options, *MORE.get(name, ()), key=KEY)
    try:
        yield {name: one.ready() for name, one in starting.items()}
    finally:
        ends = [one.stop() for one in starting.values()]
    assert ends == [0] * len(ends)


@pytest.fixture
def at(servers, load_from):
    """`at(name)` is that server and its model; `limits` are those of a test."""

    def get(name, **options):
        return servers[name], load_from(servers[name], limits=QUICK, **options)

    return get


@pytest.fixture
def asked(tiny, x):
    """What every run below must give."""
    return tiny.run(x, read=READ)


def right(run, asked):
    same(run.logits, asked.logits)
    same(run[READ], asked[READ])


def test_a_job_that_meets_everything_at_once(at, x, asked):
    """Refused three times; then its answer lost, its websocket cut, its id unknown for a while."""
    server, model = at("faulty")
    right(model.run(x, read=READ), asked)
    assert list(server.executed.values()) == [1]
    assert server.fired == {fault.partition("=")[0]: 1 for fault in SERVERS["faulty"]}
    assert model.host.traffic.requests == 1
    right(model.run(x, read=READ), asked)
    assert list(server.executed.values()) == [1, 1]


def test_a_worker_that_dies_is_told_and_the_job_is_not_run_again(at, x, asked):
    server, model = at("narrow")
    with pytest.raises(JobFailed, match="the worker died"):
        model.run(x, read=READ)
    assert list(server.executed.values()) == [1]
    right(model.run(x, read=READ), asked)
    assert list(server.executed.values()) == [1, 1]


def test_another_version_is_told_before_a_request(servers, load_from):
    with pytest.raises(VersionsDiffer, match=r"0\.7\.0.*pip install") as caught:
        load_from(servers["old"])
    assert KEY not in repr(caught.value)
    assert servers["old"].executed == {}


def test_a_wrong_key(servers, monkeypatch):
    monkeypatch.setenv("NDIF_API_KEY", "another-key-0815-secret")
    with pytest.raises(WrongKey, match="NDIF_API_KEY") as caught:
        MLLM.load("tiny", remote=servers["faulty"].url)
    assert "0815" not in str(caught.value)


def test_a_body_that_is_too_large(at, x):
    """What a function uses travels with it; this takes a tensor of 0.8 MB along."""
    server, model = at("narrow")
    before, noise = server.executed, torch.randn(200_000)
    with pytest.raises(TooLarge, match=r"takes no request of .* MB"):
        model.run_with_hooks(x, fwd_hooks=[(READ, lambda state, hook: state + noise[0])])
    assert server.executed == before


def test_the_key_is_nowhere(servers):
    """Last: in nothing that these servers wrote."""
    for server in servers.values():
        text = server.log.read_text()
        assert text
        assert KEY not in text, server.url
