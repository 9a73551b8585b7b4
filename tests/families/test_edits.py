"""Mask edits in every family: `run` gives what plain eager attention gives under that mask."""

from __future__ import annotations

import pytest
import torch

from interp import MLLM, EdgeSet, Knockout, Unmask
from interp.errors import EdgeError
from interp.families.base import module_at
from tests.conftest import plain_logits
from tests.record import proved
from tests.zoo import ZOO, build, picture


@pytest.fixture(scope="module", params=list(ZOO))
def case(request):
    """(name, model, plain copy, a batch of two rows, the first padded)."""
    module, processor = build(request.param)
    model = MLLM.load(module, processor=processor)
    prompt = ZOO[request.param].prompt
    x = model.prepare([picture(40, 32), picture(36, 50, seed=1)], [prompt, f"{prompt} a red dog"])
    plain = build(request.param)[0]
    plain.set_attn_implementation("eager")
    return request.param, model, plain, x


def plain_under(plain, family, x, layers, heads, edges, *, opens):
    """Logits of plain transformers with `edges` written into the float masks of its layers."""
    at = edges.to_mask()

    def edit(module, args, kwargs):
        mask = kwargs["attention_mask"]
        mask = mask.expand(-1, module.config.num_attention_heads, -1, -1).clone()
        closed = torch.finfo(mask.dtype).min
        for head in heads:
            mask[:, head][at] = 0.0 if opens else closed
        return args, {**kwargs, "attention_mask": mask}

    blocks = module_at(plain, family.language.blocks)
    handles = [
        blocks[layer].self_attn.register_forward_pre_hook(edit, with_kwargs=True)
        for layer in layers
    ]
    try:
        return plain_logits(plain, x)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", [Knockout, Unmask])
def test_edited_edges_are_those_of_plain_attention_under_that_mask(case, kind):
    """Every other image token loses (or gains) the edges from the first image token of its row."""
    name, model, plain, x = case
    masks = model.run(x, read="blocks.[0,2].attn.hook_mask", logits=False)
    open_now = masks["blocks.0.attn.hook_mask"][:, 0] & masks["blocks.2.attn.hook_mask"][:, 0]
    block = x.grid.image_block().to_mask()
    block &= ~torch.eye(x.n_pos, dtype=torch.bool)  # nobody loses itself
    edges = EdgeSet.from_mask(block & (open_now if kind is Knockout else ~open_now))
    if not len(edges):
        assert kind is Unmask
        assert model.family.name in ("PaliGemma", "Gemma3")
        return
    edit = kind(edges, layers=[0, 2], heads=[1, 4])
    run = model.run(x, edit)
    reference = plain_under(plain, model.family, x, [0, 2], [1, 4], edges, opens=kind is Unmask)
    attended = x.tensors["attention_mask"].bool()
    assert torch.allclose(run.logits[attended], reference[attended], atol=5e-5)
    assert float((run.logits - model.run(x).logits)[attended].abs().max()) > 1e-2
    assert [r.changed for r in run.receipts] == [len(edges)] * 2
    assert all(0 < r.mass < 1 for r in run.receipts)
    proved(name, "mask edits")


def test_mass_is_the_patterns_share_on_the_edges(case):
    _, model, _, x = case
    read = model.run(x, read="blocks.1.attn.hook_{pattern,mask}", logits=False)
    pattern, mask = read["blocks.1.attn.hook_pattern"], read["blocks.1.attn.hook_mask"][:, 0]
    edges = x.grid.image_block().to_mask() & mask & ~torch.eye(x.n_pos, dtype=torch.bool)
    run = model.run(x, Knockout(EdgeSet.from_mask(edges), layers=1), logits=True)
    share = (pattern * edges[:, None]).sum(-1)[edges.any(-1)[:, None].expand(pattern.shape[:3])]
    assert run.receipts[0].mass == pytest.approx(float(share.mean()), abs=1e-5)


def test_sliding_window_edges_are_closed_already():
    """Gemma3's first layer sees six tokens back: what lies further cannot be cut there."""
    module, processor = build("gemma3")
    model = MLLM.load(module, processor=processor)
    x = model.prepare(picture(), ZOO["gemma3"].prompt)
    far = EdgeSet.of([(0, 1, 12)], n_batch=1, n_pos=x.n_pos)
    with pytest.raises(EdgeError, match="closed already"):
        model.run(x, Knockout(far, layers=0))
    assert model.run(x, Knockout(far, layers=1)).receipts[0].changed == 1
    assert [r.changed for r in model.run(x, Knockout(far)).receipts] == [0, 1, 0]
