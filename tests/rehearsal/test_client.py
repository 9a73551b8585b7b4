"""What a stock nnsight client gets: the numbers that it gets at home, and errors in its own terms.

The server is another process and has no `interp`; the client is nnsight's own, unchanged.
"""

from __future__ import annotations

import asyncio
import importlib
import linecache
import sys
import time

import nnsight
import pytest
import torch
from nnsight.intervention.backends.remote import AsyncRemoteBackend, RemoteBackend, RemoteError

from tests.rehearsal.conftest import Payload
from tests.rehearsal.raw import fetch, run
from tests.rehearsal.serving import TINY


def logits_at_home(llava, x):
    with torch.no_grad():
        return llava._module(**x).logits


def close(a, b):
    return torch.allclose(a, b, atol=1e-5)


def test_a_trace(server, llava, picture_inputs, use):
    url, x = use(server), picture_inputs
    with llava.trace(**x, remote=url):
        middle = llava.model.language_model.layers[1].output.save()
        logits = llava.output.logits.save()
    with torch.no_grad(), llava.trace(**x):
        here = llava.model.language_model.layers[1].output.save()
    assert close(logits, logits_at_home(llava, x))
    assert close(torch.as_tensor(middle), torch.as_tensor(here))


def test_an_edit(server, llava, picture_inputs, use):
    url, x = use(server), picture_inputs

    with llava.trace(**x, remote=url):
        llava.model.language_model.layers[1].self_attn.o_proj.input[:, :, :8] = 0
        there = llava.output.logits.save()
    with torch.no_grad(), llava.trace(**x):
        llava.model.language_model.layers[1].self_attn.o_proj.input[:, :, :8] = 0
        here = llava.output.logits.save()
    assert close(there, here)
    assert not close(there, logits_at_home(llava, x))


def test_a_session_of_two_traces(server, llava, picture_inputs, use):
    url, x = use(server), picture_inputs
    with llava.session(remote=url):
        with llava.trace(**x):
            hidden = llava.model.language_model.layers[0].output.clone()
        with llava.trace(**x):
            llava.model.language_model.layers[0].output = hidden * 2
            logits = llava.output.logits.save()
    with torch.no_grad(), llava.trace(**x):
        llava.model.language_model.layers[0].output = (
            llava.model.language_model.layers[0].output * 2
        )
        here = llava.output.logits.save()
    assert close(logits, here)


def test_a_job_without_a_websocket(server, llava, picture_inputs, use):
    url, x = use(server), picture_inputs
    with llava.trace(**x, remote=url, blocking=False) as tracer:
        logits = llava.output.logits.save()  # noqa: F841
    job = tracer.backend.job_id
    elsewhere = RemoteBackend(llava.to_model_key(), host=url, blocking=False, job_id=job)
    deadline = time.monotonic() + 60
    while (result := elsewhere()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert close(result["logits"], logits_at_home(llava, x))
    assert server.executed[job] == 1


def test_an_awaited_job(server, llava, picture_inputs, use):
    url, x = use(server), picture_inputs
    backend = AsyncRemoteBackend(llava.to_model_key(), host=url)
    with llava.trace(**x, backend=backend):
        logits = llava.output.logits.save()  # noqa: F841

    async def statuses():
        return [update async for update in backend]

    *updates, result = asyncio.run(statuses())
    told = [update.status.value for update in updates]
    assert told == ["RECEIVED", "QUEUED", "DISPATCHED", "RUNNING", "COMPLETED"]
    assert updates[1].description == "Position 1 of 1 in the queue."
    assert backend.meta["result_bytes"] > 0
    assert close(result["logits"], logits_at_home(llava, x))


def test_a_result_that_is_not_compressed(server, llava, picture_inputs, use, monkeypatch):
    from nnsight.schema.config import CONFIG

    url, x = use(server), picture_inputs
    monkeypatch.setattr(CONFIG.API, "COMPRESS", False)
    with llava.trace(**x, remote=url):
        logits = llava.output.logits.save()
    assert close(logits, logits_at_home(llava, x))


def test_a_backward_pass(server, llava, picture_inputs, use):
    url, x = use(server), picture_inputs
    with llava.trace(**x, remote=url):
        hidden = llava.model.language_model.layers[1].output
        with llava.output.logits[0, -1, 3].backward():
            there = hidden.grad.save()
    with llava.trace(**x):
        hidden = llava.model.language_model.layers[1].output
        with llava.output.logits[0, -1, 3].backward():
            here = hidden.grad.save()
    llava._module.zero_grad()
    assert there.abs().max() > 0
    assert close(there, here)


def test_attention_weights_by_the_request(server, llava, picture_inputs, use):
    """attn_implementation travels with each request, and does not stay."""
    url, x = use(server), picture_inputs
    usual = llava._module.config._attn_implementation
    llava._module.set_attn_implementation("eager")
    try:
        with llava.trace(**x, remote=url):
            pattern = llava.model.language_model.layers[0].self_attn.output[1].save()
    finally:
        llava._module.set_attn_implementation(usual)
    assert close(pattern.sum(-1), torch.ones(()))
    backend = Payload()
    with llava.session(backend=backend):
        found = str(llava._module.config._attn_implementation).save()  # noqa: F841
    told = run(server, backend.blob)  # a request that asks for nothing, as older clients send
    assert fetch(server, told)["found"] == usual


FAILING = """\
def run(llava, x, url):
    with llava.trace(**x, remote=url):
        llava.model.language_model.layers[0].output.save()
        error = ValueError("no such head")
        error.add_note("there are four")
        raise error
"""


def from_elsewhere(source, name):
    """The function `run` of a script that is not on this machine's disk."""
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    for cache in (nnsight.tracing.globals.SOURCES, nnsight.tracing.globals.BLOCKS):
        cache.clear()  # a client is a new process each time; the server is not
    scope: dict = {}
    exec(compile(source, name, "exec"), scope)
    return scope["run"]


def test_an_error_shows_the_users_line(server, llava, picture_inputs, use):
    url, x = use(server), picture_inputs
    run = from_elsewhere(FAILING, "/elsewhere/failing.py")
    with pytest.raises(RemoteError) as caught:
        run(llava, x, url)
    told = str(caught.value)
    assert told.startswith("Traceback")
    assert told.endswith(
        '  File "/elsewhere/failing.py", line 6, in run\n'
        "    raise error\n"
        "ValueError: no such head\n"
        "there are four"
    )
    assert "site-packages/nnsight/" not in told
    assert "interp/rehearsal/" not in told
    with llava.trace(**x, remote=url):  # and the model is as it was
        logits = llava.output.logits.save()
    assert close(logits, logits_at_home(llava, x))


def test_an_error_of_the_model_ends_with_its_message(server, llava, picture_inputs, use):
    url, x = use(server), picture_inputs

    def job():
        with llava.trace(**x, remote=url):
            llava.model.language_model.layers[0].output = torch.zeros(1, 2, 3)
            llava.output.logits.save()

    with pytest.raises(RemoteError) as caught:
        job()
    assert str(caught.value).splitlines()[-1].startswith("RuntimeError: ")


@pytest.fixture
def module_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "of_my_own.py").write_text("def twice(x):\n    return x * 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    nnsight.ndif.pull_env()  # before the module is there: nothing registers it by itself
    yield importlib.import_module("of_my_own")
    del sys.modules["of_my_own"]


def test_a_module_that_is_not_there(server, llava, picture_inputs, use, module_of_ones_own):
    url, x = use(server), picture_inputs
    with pytest.raises(RemoteError) as caught, llava.trace(**x, remote=url):
        module_of_ones_own.twice(llava.output.logits).save()
    assert "ModuleNotFoundError: No module named 'of_my_own'" in str(caught.value)
    assert "nnsight.register('of_my_own')" in str(caught.value)


def test_a_module_sent_by_value(server, llava, picture_inputs, use, module_of_ones_own):
    from cloudpickle import unregister_pickle_by_value

    url, x = use(server), picture_inputs
    twice = module_of_ones_own.twice
    nnsight.register(module_of_ones_own)
    try:
        with llava.trace(**x, remote=url):
            logits = twice(llava.output.logits).save()
    finally:
        unregister_pickle_by_value(module_of_ones_own)
    assert close(logits, 2 * logits_at_home(llava, x))


def test_interp_is_not_there(server, llava, picture_inputs, use):
    """Although it is installed where the tests run."""
    url, x = use(server), picture_inputs

    def job():
        with llava.trace(**x, remote=url):
            import interp  # noqa: F401

            llava.output.logits.save()

    with pytest.raises(RemoteError, match="No module named 'interp'"):
        job()


def test_prints_come_back(server, llava, picture_inputs, use, capsys):
    url, x = use(server), picture_inputs
    backend = AsyncRemoteBackend(llava.to_model_key(), host=url)
    with llava.trace(**x, backend=backend):
        print("layer", 1)
        for i in range(1000):
            print(i)
        llava.output.logits.save()

    async def logs():
        return [u.description async for u in backend if getattr(u, "status", None) == "LOG"]

    told = asyncio.run(logs())
    assert told[:2] == ["layer 1", "0"]
    assert 100 < len(told) < 300
    assert told[-1] == "... the job prints more than is passed on"


def test_a_script_edited_between_two_runs(server, llava, picture_inputs, use):
    """Same file, same lines, other code: the second run must not be the first once more."""
    url, x = use(server), picture_inputs
    got = []
    for factor in (2, 3):
        source = (
            "def run(llava, x, url):\n"
            "    with llava.session(remote=url):\n"
            "        with llava.trace(**x):\n"
            f"            logits = (llava.output.logits * {factor}).save()\n"
            "    return logits\n"
        )
        got.append(from_elsewhere(source, "/elsewhere/edited.py")(llava, x, url))
    assert close(got[0] / 2, got[1] / 3)


def test_the_next_job_finds_the_model_as_it_was(server, llava, picture_inputs, use):
    url, x = use(server), picture_inputs
    usual = logits_at_home(llava, x)
    with llava.trace(**x, remote=url):
        weight = llava.model.language_model.layers[1].mlp.up_proj.weight
        weight.requires_grad_(False)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        llava._module.lm_head.register_forward_hook(lambda module, args, output: output * 0)
        llava._module.train()
        llava.output.logits.save()
    with llava.trace(**x, remote=url):
        wants = llava.model.language_model.layers[1].mlp.up_proj.weight.requires_grad
        state = [wants, torch.is_grad_enabled(), torch.ones(1).dtype, llava._module.training].save()
        logits = llava.output.logits.save()
    assert state == [True, True, torch.float32, False]
    assert close(logits, usual)


def test_changed_weights_are_loaded_anew(server, llava, picture_inputs, use):
    """By `.data`, which torch does not count as a change, and by a permutation in place."""
    url, x = use(server), picture_inputs
    usual = logits_at_home(llava, x)
    with llava.trace(**x, remote=url):
        llava.lm_head.weight.data[3] += 1.0
        changed = llava.output.logits.save()
    assert not close(changed, usual)
    with llava.trace(**x, remote=url):
        logits = llava.output.logits.save()
    assert close(logits, usual)


def test_status_env_and_whoami_as_nnsight_reads_them(server, llava, use):
    use(server)
    status = nnsight.status()
    assert TINY in status
    assert status[TINY]["state"] == "RUNNING"
    assert status[TINY]["level"] == "HOT"
    assert status[TINY]["task"] == "image-text-to-text"
    assert status.status.value == "UP"
    deployment = next(iter(nnsight.status(raw=True)["deployments"].values()))
    assert deployment["model_key"] == llava.to_model_key()
    comparison = nnsight.ndif.EnvComparison(
        nnsight.ndif.get_local_env(), nnsight.ndif.get_remote_env(force_refresh=True)
    )
    assert comparison.python_matches
    assert not comparison.critical_mismatches
    assert "interp" not in comparison.remote["packages"]
    assert nnsight.ndif.whoami()["tags"] == ["rehearsal"]
