"""Which call a job answers: alike for the same call in any process, other for any other."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from interp import Ablate, Knockout, Steer
from interp.edges import EdgeSet
from interp.remote.asked import what_was_asked
from tests.conftest import random_inputs


def function(model):
    return model


def told(*args, **kwargs):
    return what_was_asked(function, args, kwargs)


def edges(n):
    return EdgeSet.of([(0, 1, 3), (0, 2, n)], 1, 8)


BASE = torch.arange(6.0)
OTHERS = [
    (Knockout(edges(3), layers=1), Knockout(edges(4), layers=1)),
    (Knockout(edges(3), layers=1), Knockout(edges(3), layers=2)),
    (Steer("blocks.1.hook_resid_post", BASE), Steer("blocks.1.hook_resid_post", BASE + 1)),
    (Ablate("blocks.1.hook_mlp_out"), Ablate("blocks.2.hook_mlp_out")),
    (lambda z, hook: z * 2, lambda z, hook: z * 3),
    (np.arange(3), np.arange(3.0)),
    ({"a": 1}, {"a": 2}),
    ([1, 2], [2, 1]),
    (None, False),
    (torch.zeros(2, 3), torch.zeros(3, 2)),
]


@pytest.mark.parametrize(("one", "other"), OTHERS, ids=range(len(OTHERS)))
def test_another_argument_is_another_call(one, other):
    assert told(one) == told(one)
    assert told(one) != told(other)
    assert told(x=one) != told(x=other)


def test_what_a_function_closes_over_counts():
    def scaled(by):
        return lambda z, hook: z * by

    assert told(scaled(2)) == told(scaled(2))
    assert told(scaled(2)) != told(scaled(3))


def test_another_picture_is_another_call(rand):
    assert told(random_inputs(rand)) == told(random_inputs(rand))
    assert told(random_inputs(rand)) != told(random_inputs(rand, seed=1))


def test_looking_changes_nothing(rand):
    """Digests and grids that were worked out meanwhile do not count."""
    x, steer = random_inputs(rand), Steer("blocks.1.hook_resid_post", BASE)
    before = told(x, steer)
    assert repr(steer)
    assert hash(steer) is not None
    assert x.grid.token_at is not None
    assert told(x, steer) == before


def test_another_process_says_the_same():
    code = (
        "import torch; from interp import Knockout; from interp.edges import EdgeSet\n"
        "from interp.remote.asked import what_was_asked\n"
        "def function(model): ...\n"
        "e = EdgeSet.of([(0, 1, 3), (0, 2, 4)], 1, 8)\n"
        "args = (Knockout(e, layers=1), torch.arange(6.0), {'b', 'a'})\n"
        "print(what_was_asked(function, args, {}).split()[1])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mine = told(Knockout(edges(4), layers=1), BASE, {"a", "b"})
    assert ran.stdout.strip() == mine.split()[1]
