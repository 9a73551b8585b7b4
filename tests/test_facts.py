"""What this library takes for granted about its dependencies. A failure here names the change."""

from __future__ import annotations

import nnsight
import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from interp import MLLM
from interp.attention import softmax
from tests.conftest import plain_logits, random_inputs, random_llava


def test_nnsight_says_where_its_workers_wait():
    """`points.watched` asks `interleaver.parked` and `.observers` for "<path>.output"."""
    net = nnsight.NNsight(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    waiting = []
    net._module[0].register_forward_hook(lambda *_: waiting.append(set(net.interleaver.parked)))
    with net.trace(torch.zeros(1, 2)) as tracer:
        tracer.cache(modules=[net[0]])
        net[1].output.save()
    assert waiting == [{"model.1.output"}]
    assert net.interleaver.interleaving is False


def test_nnsight_wants_accesses_in_execution_order():
    net = nnsight.NNsight(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(OutOfOrderError), net.trace(torch.zeros(1, 2)):  # noqa: PT012
        net[1].output.save()
        net[0].output.save()


def test_sdpa_mask_is_none_where_the_causal_flag_does():
    def made(attention_mask):
        return sdpa_mask(
            batch_size=1, q_length=4, kv_length=4, attention_mask=attention_mask, device="cpu"
        )

    assert made(None) is None
    assert made(torch.ones(1, 4, dtype=torch.bool)) is None
    padded = made(torch.tensor([[False, True, True, True]]))
    assert padded.dtype == torch.bool
    assert padded[0, 0].int().tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]


def test_sdpa_gives_zero_where_nothing_is_open_as_our_softmax_does():
    query = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[..., 1, :] = False
    z, _ = sdpa_attention_forward(nn.Identity(), query, query, query, mask, is_causal=False)
    assert not z[:, 1].any()
    assert z[:, [0, 2]].all()
    closed = torch.full((1, 3), -torch.inf)
    assert softmax(closed).tolist() == [[0, 0, 0]]


def test_transformers_shares_one_mask_between_layers():
    module = random_llava()
    model = MLLM.load(module)
    x = random_inputs(model, 2, padding=3)
    masks = []
    for layer in module.model.language_model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda m, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    plain_logits(module, x)
    assert masks[0] is masks[1] is masks[2]


def test_hookpoint_calls_its_hooks_with_the_point_and_takes_their_value():
    point = HookPoint()
    point.name = "blocks.4.attn.hook_z"
    point.add_hook(lambda value, hook: value * hook.layer())
    assert point(torch.ones(2)).tolist() == [4, 4]
    point.remove_hooks()
    assert not point._forward_hooks


def test_a_plain_forward_hook_at_the_layer_llava_reads_is_lost_and_ours_is_not():
    """Why vision edits go through nnsight: transformers captures `hidden_states` before it."""
    module = random_llava()
    model = MLLM.load(module)
    x = random_inputs(model)
    clean = model.run(x).logits
    layer = module.model.vision_tower.encoder.layers[1]
    handle = layer.register_forward_hook(lambda module, args, output: output * 0)
    try:
        assert torch.equal(plain_logits(module, x), clean)
    finally:
        handle.remove()
    edit = (model.adapter_reads, lambda state, hook: state * 0)
    assert not torch.allclose(model.run_with_hooks(x, fwd_hooks=[edit]), clean, atol=1e-2)
