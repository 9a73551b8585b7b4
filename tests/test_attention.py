"""Attention under edits against attention written out by hand, in float64 NumPy.

Queries, keys and values are taken from their hooks (after rotation); masks, softmax and the sum
over values are done again here, with nothing of the library in them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp import MLLM, EdgeSet, Knockout, Unmask
from interp import attention as interp_attention
from tests.conftest import plain_logits, random_inputs, random_llava

HOOKS = "blocks.*.attn.{hook_rot_q,hook_rot_k,hook_v,hook_pattern,hook_z}"


def mask_by_hand(attended, edits, layer, n_heads):
    """`[batch, head, query, key]` bool: causal and padding, then the edits in order."""
    n_batch, n_pos = attended.shape
    mask = np.zeros((n_batch, n_heads, n_pos, n_pos), dtype=bool)
    for row in range(n_batch):
        for query in range(n_pos):
            for key in range(query + 1):
                mask[row, :, query, key] = attended[row, key]
    for edit in edits:
        if edit.layers is not None and layer not in edit.layers:
            continue
        for row, dst, src in edit.edges.table:
            for head in range(n_heads) if edit.heads is None else edit.heads:
                mask[row, head, dst, src] = isinstance(edit, Unmask)
    return mask


def attention_by_hand(q, k, v, mask):
    """(pattern, z) of one layer in float64, rows with no key all zero."""
    q, k, v = (t.double().numpy() for t in (q, k, v))
    n_heads, d_head = q.shape[2:]
    group = n_heads // k.shape[2]
    pattern = np.zeros(mask.shape)
    z = np.zeros(q.shape)
    for row, head, query in np.ndindex(mask.shape[:3]):
        keys = np.flatnonzero(mask[row, head, query])
        if not len(keys):
            continue
        scores = k[row, keys, head // group] @ q[row, query, head] / np.sqrt(d_head)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        pattern[row, head, query, keys] = weights
        z[row, query, head] = weights @ v[row, keys, head // group]
    return pattern, z


def block(x, src, dst):
    return x.grid.edges(src=src, dst=dst)


EDITS = {
    "none": lambda x: [],
    "all layers": lambda x: [Knockout(block(x, [0, 1, 5], [9, 12]))],
    "one layer": lambda x: [Knockout(block(x, [0, 1, 5], [9, 12]), layers=1)],
    "some layers, some heads": lambda x: [Knockout(block(x, [2], [3, 15]), [0, 2], [0, 4])],
    "opened": lambda x: [Unmask(x.grid.image_block())],
    "opened in some heads": lambda x: [Unmask(block(x, [9, 10], [1]), layers=[1], heads=[5])],
    "opened, then cut in one head": lambda x: [
        Unmask(block(x, [9, 10], [1])),
        Knockout(block(x, [9], [1]), heads=2),
    ],
    "two edits that share a layer": lambda x: [
        Knockout(block(x, [0], [4]), layers=[0, 1]),
        Knockout(block(x, [1], [4]), layers=[1, 2], heads=[1]),
    ],
    "one row of the batch": lambda x: [Knockout(x.grid.edges([3, 4], [8], image=-1))],
}


@pytest.fixture(scope="module", params=[1, 2, 6], ids="{} kv heads".format)
def model(request):
    return MLLM.load(random_llava(n_kv_heads=request.param))


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("n_batch", [1, 2])
def test_edited_attention_is_attention_by_hand(model, name, n_batch):
    x = random_inputs(model, n_batch, padding=3 if n_batch > 1 else 0)
    edits = EDITS[name](x)
    run = model.run(x, *edits, read=HOOKS)
    fused = model.run(x, *edits, read="blocks.*.attn.hook_z")  # nobody looks at the pattern
    attended = x.tensors["attention_mask"].numpy().astype(bool)
    for layer in range(3):
        q, k, v, pattern, z = (
            run[f"blocks.{layer}.attn.hook_{hook}"]
            for hook in ("rot_q", "rot_k", "v", "pattern", "z")
        )
        mask = mask_by_hand(attended, edits, layer, model.cfg.n_heads)
        pattern_by_hand, z_by_hand = attention_by_hand(q, k, v, mask)
        assert np.abs(pattern.numpy() - pattern_by_hand).max() < 1e-5
        assert not pattern.numpy()[~mask].any()  # exactly 0 where closed
        assert np.abs(z.numpy() - z_by_hand).max() < 1e-5
        # this path's states drift by a rounding a layer: float32, logits up to 5
        assert np.abs(fused[f"blocks.{layer}.attn.hook_z"].numpy() - z_by_hand).max() < 5e-5


def test_vision_attention_is_attention_by_hand(rand, rx):
    run = rand.run(rx, read="vision.blocks.*.attn.*", logits=False)
    for layer in range(3):
        q, k, v, pattern, z = (
            run[f"vision.blocks.{layer}.attn.hook_{hook}"]
            for hook in ("q", "k", "v", "pattern", "z")
        )
        everyone = np.ones((1, 4, 17, 17), dtype=bool)
        pattern_by_hand, z_by_hand = attention_by_hand(q, k, v, everyone)
        assert np.abs(pattern.numpy() - pattern_by_hand).max() < 1e-5
        assert np.abs(z.numpy() - z_by_hand).max() < 1e-5


def test_what_remains_is_renormalised(rand, rx):
    edges = block(rx, [0, 1, 5], [9, 12])
    name = "blocks.0.attn.hook_pattern"
    clean, cut = rand.run(rx, read=name)[name], rand.run(rx, Knockout(edges), read=name)[name]
    rest = clean.masked_fill(edges.to_mask()[:, None], 0)
    assert torch.allclose(cut, rest / rest.sum(-1, keepdim=True), atol=1e-6)
    assert torch.allclose(cut.sum(-1), torch.ones(()), atol=1e-6)


def test_edit_of_one_layer_does_not_leak_into_others(rand, rx2):
    edges = block(rx2, [0, 1, 5], [9, 12])
    hooks = "blocks.*.attn.hook_mask"
    clean, cut = rand.run(rx2, read=hooks), rand.run(rx2, Knockout(edges, layers=1), read=hooks)
    for layer in (0, 2):
        name = f"blocks.{layer}.attn.hook_mask"
        assert torch.equal(clean[name], cut[name])
    changed = clean["blocks.1.attn.hook_mask"] != cut["blocks.1.attn.hook_mask"]
    assert torch.equal(changed, edges.to_mask()[:, None].expand_as(changed))


def test_mask_edited_in_place_in_a_bare_trace_stays_in_its_layer_and_head(rand, rx2):
    def mask(layer):
        return rand.hook(f"blocks.{layer}.attn.hook_mask")

    with torch.no_grad(), rand.trace(rx2):
        before = mask(0).output.clone().save()
        mask(1).output[:, 2, 12, 4] = False
        edited = mask(1).output.clone().save()
        after = mask(2).output.clone().save()
    assert torch.equal(before, after)
    assert (before != edited).nonzero().tolist() == [[0, 2, 12, 4], [1, 2, 12, 4]]


def test_opening_and_then_cutting_the_same_edges_is_nothing(rand, rx):
    later = EdgeSet.from_mask(torch.ones(1, rx.n_pos, rx.n_pos, dtype=torch.bool).triu(1))
    clean = rand.run(rx).logits
    both = rand.run(rx, Unmask(later), Knockout(later))
    assert torch.allclose(both.logits, clean, atol=5e-5, rtol=0)
    assert float((rand.run(rx, Unmask(later)).logits - clean).abs().max()) > 0.1
    earlier = block(rx, [0, 1], [8, 9])
    reopened = rand.run(rx, Knockout(earlier), Unmask(earlier)).logits
    assert torch.allclose(reopened, clean, atol=5e-5, rtol=0)


def test_cutting_everything_else_leaves_attention_to_self(rand, rx):
    everything = torch.ones(1, rx.n_pos, rx.n_pos, dtype=torch.bool).tril(-1)
    run = rand.run(rx, Knockout(EdgeSet.from_mask(everything)), read="blocks.*.attn.*")
    for layer in range(3):
        pattern = run[f"blocks.{layer}.attn.hook_pattern"]
        assert torch.equal(pattern, torch.eye(rx.n_pos).expand_as(pattern))
        own = run[f"blocks.{layer}.attn.hook_v"].repeat_interleave(3, dim=2)
        assert torch.allclose(run[f"blocks.{layer}.attn.hook_z"], own, atol=1e-6)


@pytest.mark.parametrize("look", ["hook_z", "{hook_z,hook_pattern}"], ids=["fused", "written out"])
def test_query_with_no_key_left_writes_zero_and_never_nan(rand, rx, look):
    sees = EdgeSet.of([(0, src, 7) for src in range(8)], 1, rx.n_pos)
    run = rand.run(
        rx, Knockout(sees, heads=[1, 2]), read=f"blocks.*.attn.{look}", allow_empty_rows=True
    )
    for layer in range(3):
        z = run[f"blocks.{layer}.attn.hook_z"]
        assert not z[0, 7, 1:3].any()
        assert z[0, 7, [0, 3, 4, 5]].all()
    assert run.logits.isfinite().all()
    assert [receipt.empty_rows for receipt in run.receipts] == [1, 1, 1]


# -- which path is taken ---------------------------------------------------------------------------


def test_attention_is_written_out_only_when_somebody_looks_inside(rand, rx, monkeypatch):
    layers = []
    written_out = interp_attention._written_out
    monkeypatch.setattr(
        interp_attention,
        "_written_out",
        lambda module, *args: layers.append(module.hook_z.name) or written_out(module, *args),
    )
    rand.run(rx, Knockout(block(rx, 0, 5)), read="*.{hook_z,hook_q,hook_resid_post,hook_mask}")
    assert not layers
    rand.run(rx, read="blocks.1.attn.hook_pattern")
    rand.run(rx, read="vision.blocks.0.attn.hook_attn_scores")
    assert layers == ["blocks.1.attn.hook_z", "vision.blocks.0.attn.hook_z"]


def test_a_trace_of_another_wrapper_does_not_stop_the_first_from_hearing(rx):
    module = random_llava()
    first, second = MLLM.load(module), MLLM.load(module)
    name = "blocks.1.attn.hook_pattern"
    assert torch.equal(first.run(rx, read=name)[name], second.run(rx, read=name)[name])
    n_hooks = len(module.model.language_model.norm._forward_hooks)
    assert n_hooks == len(MLLM.load(module).module.model.language_model.norm._forward_hooks) == 1


def test_additive_mask_is_read_as_a_mask_and_a_bias_is_refused():
    query = torch.zeros(1, 2, 3, 4)
    closed = torch.finfo(torch.float32).min
    mask = torch.tensor([[0.0, closed, -torch.inf]] * 3)[None, None]
    found = interp_attention.bool_mask(mask, query, query, True)
    assert found[0, 0].tolist() == [[True, False, False]] * 3
    with pytest.raises(TypeError, match="is a bias, not a mask; edit hook_attn_scores"):
        interp_attention.bool_mask(mask + 0.5, query, query, True)


@pytest.mark.parametrize("option", [{"position_bias": torch.zeros(1)}, {"dropout": 0.1}])
def test_attention_that_cannot_be_opened_says_so(rand, option):
    attention = rand.module.model.language_model.layers[0].self_attn
    q = torch.randn(1, 6, 4, 8)
    kwargs = {"scaling": None, "dropout": 0.0, "is_causal": True, "kwargs": {}}
    if "dropout" in option:
        kwargs |= option
    else:
        kwargs["kwargs"] = option
    with pytest.raises(NotImplementedError, match=r"blocks\.0\.attn\.hook_z: attention with"):
        interp_attention._written_out(attention, q, q, q, None, **kwargs)


def test_an_uninstrumented_tower_is_left_to_sdpa(rx):
    module = random_llava()
    expected = plain_logits(module, rx)
    module.set_attn_implementation(interp_attention.NAME)  # registered by other models before
    assert torch.equal(plain_logits(module, rx), expected)
