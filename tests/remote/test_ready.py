"""What is told before a request, and what is raised."""

from __future__ import annotations

import dataclasses

import pytest
from nnsight.schema.config import CONFIG

from interp.remote import ready as module
from interp.remote.address import NDIF, Address, address
from interp.remote.errors import NoKey, NotHosted, Unreachable, VersionsDiffer, WrongKey
from interp.remote.keys import Key
from interp.remote.ready import look, require_ready, status, vision_models
from interp.remote.server import hosted
from interp.remote.versions import (
    Versions,
    misfits,
    pip_command,
    versions_here,
    versions_there,
)
from interp.remote.wire import Answer, Lost
from tests.remote.scripted import KEY, Scripted, deployment, playing


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(module, "_cache", {})
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    monkeypatch.setenv("NDIF_API_KEY", KEY)


def env_here(**packages):
    """/env of a server that is like this environment, but for some packages."""
    here = versions_here()
    python = packages.pop("python", here.python)
    own = {"nnsight": here.nnsight, "torch": here.torch, "transformers": here.transformers}
    return {"python_version": f"{python} (main) [GCC]", "packages": {**own, **packages}}


def test_all_is_well():
    script = Scripted(
        env=env_here(),
        deployments={
            "t": deployment("lab/text", task="text-generation"),
            "e": deployment("lab/eyes"),
        },
    )
    with playing(script):
        found = status(script.url)
        assert [m.repo_id for m in vision_models(script.url)] == ["lab/eyes"]
    assert (found.ok, found.reachable, found.key, found.accepted) == (True, True, True, True)
    assert found.problems == ()
    assert [(m.repo_id, m.vision) for m in found.models] == [
        ("lab/eyes", True),
        ("lab/text", False),
    ]
    assert found.there == found.here
    text = str(found)
    assert "* lab/eyes" in text
    assert "  lab/text" in text
    assert "key: set, accepted" in text
    assert KEY not in text + repr(found)


def test_the_key_goes_to_whoami_only():
    script = Scripted(env=env_here())
    with playing(script):
        status(script.url)
    carried = [path for path, h in zip(script.seen, script.headers) if "ndif-api-key" in h]
    assert carried == ["/whoami"]


def test_replicas_are_one_model_the_healthiest():
    ill = deployment("lab/eyes", application_state="UNHEALTHY", model_key="k")
    warm = deployment("lab/eyes", deployment_level="WARM", model_key="k")
    well = deployment("lab/eyes", model_key="k")
    cold = deployment("lab/cold", deployment_level="COLD")
    models = hosted({"1": ill, "2": well, "3": warm, "4": cold, "5": "nonsense", "6": {}})
    assert [(m.repo_id, m.level, m.state) for m in models[:2]] == [
        ("lab/eyes", "HOT", "RUNNING"),
        ("lab/cold", "COLD", "RUNNING"),
    ]
    assert [m.up for m in models] == [True, False, False]
    assert models[2].repo_id == "6"


def test_nobody_there_is_told_not_raised():
    found = status("http://127.0.0.1:9")  # discard: nothing listens there
    assert not found.reachable
    assert not found.ok
    assert "interp serve MODEL" in str(found)
    with pytest.raises(Unreachable, match="interp serve MODEL"):
        vision_models("http://127.0.0.1:9")


def test_some_other_server():
    with playing(Scripted(deployments=None)) as script:
        found = status(script.url)
    assert not found.reachable
    assert "HTTP 404" in str(found.problems[0])


def test_an_older_server_is_unknown_not_wrong():
    with playing(Scripted(env=None, whoami=None)) as script:
        found = status(script.url)
        require_ready(address(script.url), Key(KEY), "lab/eyes")
    assert found.ok
    assert found.accepted is None
    assert found.there == Versions()
    assert "does not tell its versions" in str(found.problems)


@pytest.mark.parametrize("key", [None, "another"])
def test_keys_that_do_not_do(monkeypatch, key):
    monkeypatch.setenv("NDIF_API_KEY", key or "")
    with playing(Scripted(env=env_here())) as script:
        found = status(script.url)
        with pytest.raises(NoKey if key is None else WrongKey, match="NDIF_API_KEY"):
            require_ready(address(script.url), Key(key) if key else None, "lab/eyes")
    assert found.accepted is False
    assert not found.ok
    assert found.problems[0].blocks


def test_ndif_needs_a_key_even_if_it_does_not_say(monkeypatch):
    """NDIF's /whoami answers no email to nobody, with 200."""
    script = Scripted(env=env_here(), whoami={"email": None, "tags": []}, key=None)
    with playing(script):
        ndif = Address(script.url, ndif=True, loopback=True)
        with pytest.raises(NoKey, match=r"login\.ndif\.us"):
            require_ready(ndif, None, "lab/eyes")
        monkeypatch.delenv("NDIF_API_KEY")
        monkeypatch.setattr(CONFIG.API, "APIKEY", "from-a-file")
        assert "config file" in str(look(ndif, None).problems)


def test_a_key_that_is_not_recognised_is_a_doubt_not_a_no():
    with playing(Scripted(env=env_here(), whoami={"email": None, "tags": []})) as script:
        found = status(script.url)
        require_ready(address(script.url), Key(KEY), "lab/eyes")
    assert found.accepted is None
    assert found.ok
    assert "does not recognise" in str(found.problems)


def test_a_model_that_is_not_there():
    with playing(Scripted(env=env_here())) as script:
        with pytest.raises(NotHosted, match="does not have lab/nose; it has: lab/eyes"):
            require_ready(address(script.url), Key(KEY), "lab/nose")
        assert require_ready(address(script.url), Key(KEY), "Lab/Eyes").model("lab/eyes")


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"nnsight": "0.7.9"}, 'pip install "nnsight==0.7.9"'),
        ({"python": "2.7.4"}, "Python 2.7"),
        ({"transformers": "4.57.0"}, 'pip install "transformers==4.57.0"'),
    ],
)
def test_versions_that_break_a_request(change, fix):
    with playing(Scripted(env=env_here(**change))) as script:
        assert not status(script.url).ok
        with pytest.raises(VersionsDiffer) as caught:
            require_ready(address(script.url), Key(KEY), "lab/eyes")
    assert fix in str(caught.value)


def test_versions_that_are_worth_knowing():
    here = Versions("3.11.2", "0.8.1", "2.13.0+cpu", "5.23.0")
    same = dataclasses.replace(here, python="3.11.9", torch="2.9.0", transformers="5.23.4")
    assert misfits(here, same) == []
    other = dataclasses.replace(here, nnsight="0.8.0", torch="3.0.0", transformers="5.22.0")
    assert [p.blocks for p in misfits(here, other)] == [False] * 3
    assert misfits(here, Versions()) == []
    (python, *_) = misfits(here, dataclasses.replace(other, python="3.12.0"))
    assert python.what == "Python is 3.11.2 here and 3.12.0 there"
    assert not python.blocks  # code travels by source
    worst_first = misfits(here, dataclasses.replace(other, transformers="6.0.0"))
    assert worst_first[0].what == "transformers is 5.23.0 here and 6.0.0 there"
    assert pip_command(other, here) == 'pip install "nnsight==0.8.0" "transformers==5.22.0"'
    assert pip_command(here, here) == pip_command(Versions(), here) == ""


@pytest.mark.parametrize("env", [None, [], {}, {"packages": 3}, {"python_version": ""}])
def test_an_env_that_cannot_be_read(env):
    assert versions_there(env) == Versions()


def test_a_good_answer_holds_for_a_while():
    now = [0.0]
    with playing(Scripted(env=env_here())) as script:
        at = address(script.url)

        def ready(key=KEY, repo="lab/eyes"):
            require_ready(at, Key(key), repo, clock=lambda: now[0])
            return script.count("/status")

        assert ready() == 1
        now[0] = 299.0
        assert ready() == 1
        now[0] = 301.0
        assert ready() == 2
        with pytest.raises(WrongKey):
            ready(key="another")
        with pytest.raises(WrongKey):  # a bad answer is not kept
            ready(key="another")
        assert script.count("/status") == 4
        assert ready() == 4


def test_outages_of_ndif_name_its_forum():
    ndif = Address(NDIF, ndif=True, loopback=False)
    lost = module._not_there(ndif, None, Lost("ConnectError", sent=True))
    assert "discuss.ndif.us" in lost.fix
    echo = module._not_there(ndif, Key(KEY), Answer(502, f"bad {KEY}".encode(), {}))
    assert KEY not in echo.what
