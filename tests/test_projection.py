"""W_O by asking the projection equals W_O as it is stored, bias or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from interp import MLLM
from interp.projection import output_bias, output_matrix
from tests.conftest import random_llava


@pytest.fixture(scope="module", params=[False, True], ids=["no bias", "bias"])
def pair(request):
    """The same weights prepared (the matrix is read) and stock (it is asked for)."""
    models = []
    for remote in (False, "local"):
        module = random_llava()
        project = module.model.language_model.layers[1].self_attn.o_proj
        if request.param:
            project.bias = nn.Parameter(torch.linspace(-1, 1, project.out_features))
        models.append(MLLM.load(module, remote=remote))
    return models


def test_asked_is_read(pair):
    here, stock = pair
    weight = here.module.model.language_model.layers[1].self_attn.o_proj.weight
    read, asked = output_matrix(here, 1), output_matrix(stock, 1)
    assert read.shape == (here.cfg.n_heads, here.cfg.d_head, here.cfg.d_model)
    assert torch.equal(read.flatten(0, 1).T.float(), weight.detach())
    # with a bias, it is subtracted again: its rounding stays
    torch.testing.assert_close(asked, read, rtol=0, atol=2e-7)
    biased = here.module.model.language_model.layers[1].self_attn.o_proj.bias is not None
    assert biased or torch.equal(asked, read)


def test_the_bias(pair):
    here, stock = pair
    bias = here.module.model.language_model.layers[1].self_attn.o_proj.bias
    for model in pair:
        found = output_bias(model, 1)
        if bias is None:
            assert found is None
        else:
            torch.testing.assert_close(found.float(), bias.detach(), rtol=0, atol=0)
    assert output_bias(here, 0) is None
    assert output_bias(stock, 0) is None
