"""One rehearsal server for all tests of this folder, and a stock nnsight model as its client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from nnsight.modeling import huggingface
from nnsight.modeling.transformers import TransformersModel
from nnsight.schema.config import CONFIG
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from PIL import Image

from tests.rehearsal.serving import TINY, Server, serve


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Serves the bundled model with no fault; every test must leave it able to serve the next."""
    with serve(TINY) as running:
        yield running


@pytest.fixture(scope="session")
def llava() -> TransformersModel:
    """The bundled model as a user of nnsight has it: weights here, too, to compare with."""
    huggingface._ID_CACHE[TINY] = TINY  # else nnsight asks the hub how the name is spelt
    model = TransformersModel(TINY, task="image-text-to-text", dispatch=True)
    model._module.eval()
    return model


@pytest.fixture(scope="session")
def picture_inputs(llava: TransformersModel) -> dict[str, Any]:
    """Tensors of one picture and one question."""
    pixels = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    text = "<image>What is in the picture?"
    x = llava.processor(images=Image.fromarray(pixels), text=text, return_tensors="pt")
    return {**x, "use_cache": False}


class Payload(Backend):
    """Keeps what would be sent, as `blob`, and sends nothing."""

    def __call__(self, tracer: Any = None) -> None:
        self.blob = RequestModel.serialize(tracer, True)


@pytest.fixture(scope="session")
def payloads(llava: TransformersModel) -> Callable[[int], bytes]:
    """`payloads(i)` is a small job whose result `answer` is the norm of something, times i."""

    def make(i: int) -> bytes:
        backend = Payload()
        with llava.session(backend=backend):
            norm = llava.lm_head.weight.norm()
            answer = (norm * i).item().save()  # noqa: F841
        return backend.blob

    return make


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`use(server)` lets nnsight talk to that server for the rest of the test; its URL."""

    def point_at(server: Server, key: str | None = None) -> str:
        monkeypatch.setattr(CONFIG.API, "APIKEY", server.key if key is None else key)
        monkeypatch.setattr(CONFIG.API, "HOST", server.url)
        monkeypatch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)
        return server.url

    return point_at
