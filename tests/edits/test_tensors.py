"""Tensors inside edits: equal by content, shared in memory, watched for changes."""

from __future__ import annotations

import json

import pytest
import torch

from interp.edits.tensors import Frozen, Source
from interp.errors import NotRead


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_tensors_come_back_from_json_to_the_last_bit(dtype):
    tensor = (torch.randn(3, 5) / 3).to(dtype)
    back = Frozen.from_json(json.loads(json.dumps(Frozen(tensor).to_json())))
    assert back.tensor.dtype == dtype
    assert torch.equal(back.tensor, tensor)
    assert back == Frozen(tensor)


def test_type_shape_and_content_all_count():
    tensor = torch.arange(6.0)
    others = [tensor.double(), tensor.view(2, 3), tensor + torch.eye(6)[5], tensor.flip(0)]
    assert len({Frozen(one) for one in (tensor, tensor.clone(), *others)}) == 5
    transposed = torch.arange(6.0).view(3, 2).T
    assert Frozen(transposed) == Frozen(transposed.contiguous())


def test_memory_is_shared_and_changes_are_noticed():
    tensor = torch.zeros(4, requires_grad=True)
    frozen = Frozen(tensor)
    assert frozen.tensor.data_ptr() == tensor.data_ptr()
    assert not frozen.tensor.requires_grad
    with torch.no_grad():
        tensor[1] = 3
    with pytest.raises(RuntimeError, match="changed in place"):
        _ = frozen.tensor


def test_a_source_holds_what_its_pattern_names():
    states = {f"blocks.{i}.hook_mlp_out": torch.full((2,), float(i)) for i in range(3)}
    source = Source(states, "blocks.[0,2].hook_mlp_out")
    assert list(source.tensors) == ["blocks.0.hook_mlp_out", "blocks.2.hook_mlp_out"]
    more = {**states, "blocks.1.hook_mlp_out": torch.ones(9)}
    assert Source(more, "blocks.[0,2].hook_mlp_out") == source
    assert hash(Source(more, "blocks.{2,0}.hook_mlp_out")) == hash(source)
    assert Source(states, "blocks.[0,1].hook_mlp_out") != source
    renamed = {"blocks.0.hook_mlp_out": states["blocks.1.hook_mlp_out"]}
    assert Source(renamed, "*") != Source(states, "blocks.1.*")
    assert Source(renamed, "*").digest != Source(states, "blocks.1.*").digest
    assert Source(renamed, "*").digest == Source(dict(renamed), "blocks.0.*").digest
    with pytest.raises(NotRead, match=r"did not read it; did you mean blocks\.2\.hook_mlp_out"):
        Source(states, "blocks.3.hook_mlp_out")
