"""One small baseline shared by the tests of the studies."""

from __future__ import annotations

import pytest

from interp.datasets import scenes
from interp.studies.recovery import recovery
from interp.studies.split import Split

N_PROBE, N_TEST = 60, 24


@pytest.fixture(scope="session")
def splits(tiny):
    question = "What is in the picture?"
    return (
        Split.prepare(tiny, scenes("probe"), N_PROBE, question, batch_size=20),
        Split.prepare(tiny, scenes("test"), N_TEST, question, batch_size=8),
    )


@pytest.fixture(scope="session")
def recovered(splits):
    return recovery(*splits)


@pytest.fixture(scope="session")
def base(recovered):
    return recovered[0]
