"""The shuffled language model: what cannot be shuffled is said, and what was is put back."""

from __future__ import annotations

import pytest
import torch

from interp import MLLM
from interp.errors import Untestable
from interp.studies import controls
from interp.studies.controls import shuffled_llm
from tests.conftest import random_llava


def blocks(model: MLLM):
    return model.module.model.language_model.layers


def test_weights_that_are_buffers_cannot_be_shuffled():
    """As quantised layers keep them: nothing would move, and the control would be the model."""
    model = MLLM(random_llava())
    layer = blocks(model)[1].mlp.down_proj
    weight = layer.weight.data
    del layer.weight
    layer.register_buffer("weight", weight)
    with pytest.raises(Untestable, match="quantised"), shuffled_llm(model):
        pass


def test_whole_numbers_and_weights_elsewhere_cannot_be_shuffled():
    model = MLLM(random_llava())
    layer = blocks(model)[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(Untestable, match="not in memory"), shuffled_llm(model):
        pass


@pytest.mark.parametrize("at", [0, 5])
def test_a_failure_on_the_way_leaves_the_model_as_it_was(monkeypatch, at):
    model = MLLM(random_llava())
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    permute, calls = torch.randperm, []

    def fails(n, **options):
        calls.append(n)
        if len(calls) == at + 1:
            raise MemoryError("no room for the order")
        return permute(n, **options)

    monkeypatch.setattr(controls.torch, "randperm", fails)
    with pytest.raises(MemoryError), shuffled_llm(model):
        pass
    assert all(torch.equal(before[k], v) for k, v in model.module.state_dict().items())


def test_an_error_under_it_leaves_the_model_as_it_was():
    model = MLLM(random_llava())
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    with pytest.raises(KeyError), shuffled_llm(model, seed=4):
        raise KeyError
    assert all(torch.equal(before[k], v) for k, v in model.module.state_dict().items())
