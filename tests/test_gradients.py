"""Gradients in a bare trace: each hook's, by what a small step there does to the loss."""

from __future__ import annotations

import pytest
import torch

from interp import MLLM
from tests.zoo import build, inputs

#: of every way in which a hook's tensor lies in its module: as it is, by head, packed, a point
NAMES = {
    "llava-clip-llama": [
        "adapter.hook_out",
        "vision.blocks.0.attn.hook_q",
        "blocks.1.attn.hook_k",
        "blocks.1.attn.hook_z",
        "blocks.1.attn.hook_pattern",
        "blocks.1.hook_resid_mid",
        "blocks.2.hook_resid_post",
    ],
    "qwen2.5-vl": [
        "adapter.hook_in",
        "adapter.hook_out",
        "vision.blocks.1.hook_resid_post",
        "vision.blocks.1.attn.hook_z",
        "blocks.0.attn.hook_v",
        "blocks.1.mlp.hook_post",
    ],
}


@pytest.fixture(scope="module", params=list(NAMES))
def case(request):
    module, processor = build(request.param)
    model = MLLM.load(module.double(), processor=processor)
    return request.param, model, inputs(model, request.param)


def test_gradient_is_what_a_small_step_changes(case):
    family, model, x = case
    generator = torch.Generator().manual_seed(0)
    for name in NAMES[family]:
        with model.trace(x):
            value = model.hook(name).output.save()
            value.retain_grad()
            logits = model.nn.output.logits.save()
        logits[0, -1].sum().backward()
        assert value.grad is not None, name
        step = torch.randn(value.shape, generator=generator, dtype=value.dtype) * 1e-3
        moved = [
            model.run_with_hooks(x, fwd_hooks=[(name, lambda v, hook, s=sign * step: v + s)])
            for sign in (1, -1)
        ]
        # norms and rotations round to float32 on the way, whatever the model's precision
        change = float((moved[0] - moved[1])[0, -1].sum()) / 2
        assert change == pytest.approx(float((value.grad * step).sum()), rel=1e-2), name
