"""The same lines against a server, which is another process and has no `interp`."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch

from interp import Knockout, Unmask
from interp.errors import EdgeError, NotHere
from interp.remote.errors import JobFailed
from tests.remote.pairs import same

ASK = "What is in the picture?"
LAYERS = "blocks.*.hook_resid_post"


def design(model, x):
    """The script of the design, line by line; what it prints and what it holds."""
    out = {"grid": repr(x.grid)}
    run = model.run(x, read=LAYERS)
    out["read"] = run["blocks.3.hook_resid_post"]

    edges = x.grid.edges(src=[12, 13], dst=[22, 23])
    cut = model.run(x, Knockout(edges, layers=range(1, 4), heads=[0, 2]), read=LAYERS)
    out["receipts"], out["cut"] = repr(cut.receipts), cut["blocks.4.hook_resid_post"]

    both = model.run(x, Unmask(x.grid.image_block()), read=LAYERS)
    out["both"], out["mass"] = both["blocks.4.hook_resid_post"], repr(both.receipts)

    logits, cache = model.run_with_cache(x, names_filter="blocks.*.attn.hook_pattern")
    out["logits"], out["pattern"] = logits, cache["pattern", 2]
    out["hooks"] = model.run_with_hooks(
        x, fwd_hooks=[("blocks.2.attn.hook_z", lambda z, hook: z * 0)]
    )

    with model.trace(x):
        model.hook("blocks.2.attn.hook_z").output[:, :, 3] = 0
        traced = model.hook("blocks.4.hook_resid_post").output.save()
    out["traced"] = traced
    return out


def test_the_script_of_the_design(tiny, hosted, scene):
    assert next(hosted.module.parameters()).is_meta
    ours = design(tiny, tiny.prepare(scene.image, ASK))
    theirs = design(hosted, hosted.prepare(scene.image, ASK))
    for name, value in ours.items():
        if isinstance(value, str):
            assert theirs[name] == value, name
        else:
            same(value, theirs[name], name)
    assert not torch.allclose(ours["both"], ours["read"])


def test_a_run_states_its_bytes(hosted, x, served):
    """As counted on the socket: what was sent, and the result with its statuses."""
    run = hosted.run(x, read="blocks.4.hook_resid_post", logits=False)
    traffic = run.traffic
    state = run["blocks.4.hook_resid_post"]
    assert traffic.requests == 1
    assert traffic.down > 0.8 * state.numel() * 4  # zstd finds little in a stream
    assert traffic.down < 1.1 * state.numel() * 4 + 5000
    assert 20_000 < traffic.up < 250_000
    assert f"{traffic.requests} request" in repr(run)


def test_the_server_has_no_interp(hosted, x):
    """Though it is installed where the tests run; what ran there was sent."""

    def look(z, hook):
        import importlib

        try:
            importlib.import_module("inter" + "p")
        except ModuleNotFoundError:
            return torch.tensor([0.0, float(hook.layer())])
        return torch.tensor([1.0, float(hook.layer())])

    kept = hosted.run(x, read="blocks.2.attn.hook_z", keep=look, logits=False)
    assert kept["blocks.2.attn.hook_z"].tolist() == [0.0, 2.0]

    def job():
        with hosted.trace(x):
            import interp  # noqa: F401

            hosted.hook("blocks.0.hook_resid_post").output.save()

    with pytest.raises(JobFailed, match="No module named 'interp'"):
        job()


def test_errors_of_this_library_come_back_as_what_they_are(tiny, hosted, x):
    """One that is found here before anything is sent, one that only the run finds."""
    sent = hosted.host.traffic.requests
    again = Knockout(x.grid.edges(src=[22], dst=[12]))  # against the causal mask
    for model in (tiny, hosted):
        with pytest.raises(EdgeError, match="closed already"):
            model.run(x, again)
    assert hosted.host.traffic.requests in (sent, sent + 1)
    with pytest.raises(NotHere, match="load the model without remote="):
        hosted.fingerprint()


def test_an_error_in_a_hook_function_shows_the_users_own_line(hosted, x):
    def mine(z, hook):
        wrong = z[:, :, 99]
        return wrong

    with pytest.raises(JobFailed) as caught:
        hosted.run_with_hooks(x, fwd_hooks=[("blocks.2.attn.hook_z", mine)])
    assert "wrong = z[:, :, 99]" in caught.value.line
    assert __file__.rpartition("/")[2] in caught.value.line
    assert "IndexError" in str(caught.value)
    assert hosted.run(x).logits.shape[0] == 1  # and the server goes on


# -- hundred jobs from four processes --------------------------------------------------------------


def twenty_five(load_from, served, x, number, folder):
    """A client: 25 small jobs, each its own question; the answers go to a file."""
    model, lines = load_from(served), []
    for job in range(25):
        factor = 2.0 + 25 * number + job
        with model.trace(x):
            asked = (model.hook("blocks.0.hook_resid_post").output[0, 3, :2] * factor).save()
        lines.append([factor, *asked.tolist()])
    (folder / str(number)).write_text(json.dumps(lines))


def test_hundred_jobs_from_four_processes(served, load_from, tiny, x, tmp_path):
    """Each gets the answer to its own, and none is run twice."""
    before = set(served.executed)
    fork = multiprocessing.get_context("fork")  # a fresh process would import torch first
    clients = [
        fork.Process(target=twenty_five, args=(load_from, served, x, number, tmp_path))
        for number in range(4)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert [client.exitcode for client in clients] == [0] * 4
    answers = [line for n in range(4) for line in json.loads((tmp_path / str(n)).read_text())]
    assert [factor for factor, *_ in answers] == [2.0 + i for i in range(100)]
    state = tiny.run(x, read="blocks.0.hook_resid_post")["blocks.0.hook_resid_post"][0, 3, :2]
    for factor, *kept in answers:
        assert kept == pytest.approx((factor * state).tolist(), rel=1e-5)
    ran = {job: n for job, n in served.executed.items() if job not in before}
    assert list(ran.values()) == [1] * 100
