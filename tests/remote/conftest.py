"""A rehearsal server in a process of its own, which has no `interp`, and the model it hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from interp import MLLM
from tests.rehearsal.serving import TINY, Server, serve


@pytest.fixture(scope="session")
def served() -> Iterator[Server]:
    """Hosts the bundled model as "tiny", with no fault."""
    with serve(TINY, "--name", "tiny") as server:
        yield server


@pytest.fixture(scope="session")
def load_from() -> Callable[..., MLLM]:
    """`load_from(server, **options)` is the bundled model, hosted there."""

    def load(server: Server, **options: object) -> MLLM:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("NDIF_API_KEY", server.key)
            return MLLM.load("tiny", remote=server.url, **options)

    return load


@pytest.fixture(scope="session")
def hosted(served, load_from) -> MLLM:
    """The bundled model, without weights here."""
    return load_from(served)
