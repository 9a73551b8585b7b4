"""What a model is called on the way to a server: as the server says, else as nnsight would."""

from __future__ import annotations

import json

import pytest
from nnsight.modeling import huggingface
from nnsight.modeling.transformers import TransformersModel

from interp.remote.connect import KIND, _model_key
from interp.remote.server import ServerStatus, hosted
from interp.remote.versions import Versions
from tests.rehearsal.serving import TINY

TASK = "image-text-to-text"


def status(**entry):
    deployment = {
        "repo_id": "Lab/Eyes-7b",
        "task": TASK,
        "revision": "main",
        "application_state": "RUNNING",
        "deployment_level": "HOT",
        "model_key": f'{KIND}:{{"repo_id": "Lab/Eyes-7b", "odd": 1}}',
        **entry,
    }
    none = Versions()
    models = hosted({"one": deployment})
    return ServerStatus("http://127.0.0.1:1", True, models, none, none, True, True, ())


def test_the_servers_own_key_is_taken_whatever_the_case():
    assert _model_key(status(), "lab/eyes-7b", TASK, {}).endswith('"odd": 1}')


@pytest.mark.parametrize(
    ("entry", "options"),
    [
        ({"revision": "v2"}, {}),
        ({"task": "text-generation"}, {}),
        ({"repo_id": "Lab/Other"}, {}),
        ({}, {"revision": "v2"}),
        ({"model_key": "somewhere.else.Model:{}"}, {}),
    ],
)
def test_of_another_deployment_it_is_not(entry, options):
    key = _model_key(status(**entry), "Lab/Eyes-7b", TASK, options)
    kind, _, about = key.partition(":")
    assert kind == KIND
    told = {"repo_id": "Lab/Eyes-7b", "revision": options.get("revision"), "task": TASK}
    assert json.loads(about) == told


@pytest.mark.parametrize("options", [{}, {"revision": "v2"}, {"trust_remote_code": True}])
def test_else_it_is_letter_for_letter_nnsights(monkeypatch, tiny, options):
    monkeypatch.setitem(huggingface._ID_CACHE, str(TINY), str(TINY))
    model = TransformersModel(str(TINY), task=TASK, processor=tiny.processor, **options)
    assert _model_key(None, str(TINY), TASK, options) == model.to_model_key()
