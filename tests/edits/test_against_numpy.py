"""Mask edits against attention written out in float64 NumPy, edit by edit and edge by edge.

hypothesis draws a model (grouped-query heads), a padded batch, and a list of mask edits with layers
and heads. A mask is kept here by hand, one entry at a time; attention under it is computed from the
run's own queries, keys and values, and the run's `hook_z` and `hook_pattern` must be that, in
*every* layer: where an edit acts, and where none does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from interp import MLLM, EdgeSet, Knockout, Unmask
from interp.errors import EdgeError, EditHadNoEffect
from interp.inputs import Inputs
from tests.conftest import random_inputs, random_llava

N_LAYERS, N_HEADS, D_HEAD = 3, 6, 8
ATOL = 1e-5


@cache
def model_with(n_kv_heads: int) -> MLLM:
    return MLLM.load(random_llava(n_kv_heads=n_kv_heads))


@cache
def batch(n_kv_heads: int, n_batch: int, padding: int) -> Inputs:
    return random_inputs(model_with(n_kv_heads), n_batch, padding=padding)


def clean_masks(x: Inputs) -> np.ndarray:
    """`[layer, batch, head, query, key]` bool: causal, and nobody sees padding."""
    attended = x.tensors["attention_mask"].numpy().astype(bool)
    causal = np.tril(np.ones((x.n_pos, x.n_pos), dtype=bool))
    mask = causal & attended[:, None, :]
    return np.tile(mask[None, :, None], (N_LAYERS, 1, N_HEADS, 1, 1))


def attention(q, k, v, mask):
    """(pattern, z) in float64: `[batch, head, query, key]` and `[batch, query, head, d_head]`."""
    q, k, v = (np.asarray(t, dtype=np.float64) for t in (q, k, v))
    group = q.shape[2] // k.shape[2]
    pattern = np.zeros(mask.shape)
    z = np.zeros(q.shape)
    for b, h, i in np.ndindex(mask.shape[:3]):
        keys = np.flatnonzero(mask[b, h, i])
        if not len(keys):
            continue  # a query with no key attends to nothing
        scores = k[b, keys, h // group] @ q[b, i, h] / np.sqrt(D_HEAD)
        weights = np.exp(scores - scores.max())
        pattern[b, h, i, keys] = weights / weights.sum()
        z[b, i, h] = pattern[b, h, i, keys] @ v[b, keys, h // group]
    return pattern, z


@dataclass
class Drawn:
    """Edits, and the masks that they must leave, made by hand."""

    edits: list
    masks: np.ndarray


@st.composite
def worlds(draw):
    """A model, a batch, and one to three edits that each change something."""
    n_kv_heads = draw(st.sampled_from([1, 2, 3, 6]))
    n_batch = draw(st.integers(1, 2))
    x = batch(n_kv_heads, n_batch, draw(st.integers(0, 4)))
    masks = clean_masks(x)
    attended = x.tensors["attention_mask"].numpy().astype(bool)
    position = st.integers(0, x.n_pos - 1)
    edits = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from([Knockout, Unmask]))
        layers = draw(st.none() | st.lists(st.integers(0, N_LAYERS - 1), min_size=1))
        heads = draw(st.none() | st.lists(st.integers(0, N_HEADS - 1), min_size=1))
        triples = draw(
            st.lists(st.tuples(st.integers(0, n_batch - 1), position, position), max_size=30)
        )
        where = [
            (layer, head)
            for layer in (range(N_LAYERS) if layers is None else set(layers))
            for head in (range(N_HEADS) if heads is None else set(heads))
        ]
        kept = []
        for b, src, dst in triples:
            state = [masks[layer, b, head, dst, src] for layer, head in where]
            fits = all(state) if kind is Knockout else not all(state)
            if fits and attended[b, src] and attended[b, dst]:
                kept.append((b, src, dst))
        if not kept:
            continue
        for b, src, dst in kept:
            for layer, head in where:
                masks[layer, b, head, dst, src] = kind is Unmask
        edits.append(kind(EdgeSet.of(kept, n_batch, x.n_pos), layers, heads))
    assume(edits)
    return model_with(n_kv_heads), x, Drawn(edits, masks)


@settings(max_examples=40)
@given(worlds())
def test_run_is_attention_under_the_mask_kept_by_hand(world):
    model, x, drawn = world
    lenient = {"allow_empty_rows": True, "strict": False}
    given_by = "blocks.*.attn.hook_{rot_q,rot_k,v,z}"
    clean = model.run(x, read=given_by)
    opened = [given_by, "blocks.*.attn.hook_{mask,pattern}"]
    run = model.run(x, *drawn.edits, read=opened, **lenient)
    quick = model.run(x, *drawn.edits, read=given_by, mass=False, **lenient)  # SDPA's own kernel
    attended = x.tensors["attention_mask"].bool().numpy()
    first = min(min(edit.layers or [0]) for edit in drawn.edits)
    for layer in range(N_LAYERS):
        at, mask = f"blocks.{layer}.attn.hook_", drawn.masks[layer]
        for edited in (run, quick):
            # up to the first edited layer, nothing that goes in has changed
            source = clean if layer <= first else edited
            pattern, z = attention(*(source[at + n] for n in ("rot_q", "rot_k", "v")), mask)
            assert np.abs(edited[at + "z"].numpy() - z)[attended].max() < ATOL
        found = {
            n: run[at + n].numpy().transpose(0, 2, 1, 3)[attended] for n in ("mask", "pattern")
        }
        assert np.array_equal(found["mask"], mask.transpose(0, 2, 1, 3)[attended])
        assert np.abs(found["pattern"] - pattern.transpose(0, 2, 1, 3)[attended]).max() < ATOL


# -- laws ------------------------------------------------------------------------------------------

Z, MASK, PATTERN = (f"blocks.*.attn.hook_{name}" for name in ("z", "mask", "pattern"))


def same(a, b, atol=ATOL) -> bool:
    """All states and the logits of two runs, to `atol` (0: to the last bit)."""
    assert set(a.states) == set(b.states)
    pairs = [(a[name], b[name]) for name in a] + [(a.logits, b.logits)]
    return all(torch.allclose(one.float(), two.float(), atol=atol, rtol=0) for one, two in pairs)


def drawn_edges(x: Inputs, opens: bool, seed: int = 0, n: int = 40) -> EdgeSet:
    """Random edges between tokens of the first row, all closed (to open) or all open (to cut)."""
    rng = np.random.default_rng(seed)
    low, high = np.sort(rng.integers(0, x.n_pos, (2, n)), axis=0)
    low, high = low[low < high], high[low < high]
    src, dst = (high, low) if opens else (low, high)
    return EdgeSet.of([(0, int(s), int(d)) for s, d in zip(src, dst)], len(x), x.n_pos)


@pytest.mark.parametrize("opens", [False, True])
def test_the_full_set_of_heads_or_layers_is_none_at_all(rand, rx, opens):
    edges, kind = drawn_edges(rx, opens), Unmask if opens else Knockout
    read = [Z, MASK]
    every = rand.run(rx, kind(edges), read=read)
    by_head = rand.run(rx, kind(edges, heads=range(N_HEADS)), read=read)
    by_layer = rand.run(rx, kind(edges, layers=range(N_LAYERS)), read=read)
    apart = rand.run(rx, *(kind(edges, heads=head) for head in range(N_HEADS)), read=read)
    assert same(every, by_head)
    assert same(every, by_layer)
    assert same(every, apart)
    assert not same(every, rand.run(rx, kind(edges, heads=range(N_HEADS - 1)), read=read))


@pytest.mark.parametrize("n_kv_heads", [1, 2, 6])
def test_cutting_everything_but_self_is_attention_to_self(n_kv_heads):
    """z is then the token's own value, of the key-value head that serves the query head."""
    model, x = model_with(n_kv_heads), batch(n_kv_heads, 1, 0)
    others = np.tril(np.ones((1, x.n_pos, x.n_pos), dtype=bool), k=-1)
    run = model.run(
        x, Knockout(EdgeSet.from_mask(others), layers=[0, 2]), read="*.attn.hook_{v,z,pattern}"
    )
    for layer in (0, 2):
        v = run[f"blocks.{layer}.attn.hook_v"].repeat_interleave(N_HEADS // n_kv_heads, dim=2)
        assert torch.allclose(run[f"blocks.{layer}.attn.hook_z"], v, atol=ATOL)
        pattern = run[f"blocks.{layer}.attn.hook_pattern"]
        assert torch.allclose(pattern, torch.eye(x.n_pos).expand_as(pattern), atol=ATOL)
    assert run["blocks.1.attn.hook_pattern"].diagonal(dim1=-2, dim2=-1).mean() < 0.9


def test_opened_and_cut_again_is_the_clean_run(rand, rx):
    edges = drawn_edges(rx, opens=True)
    read = [Z, MASK, PATTERN]
    run = rand.run(rx, Unmask(edges, heads=[1, 4]), Knockout(edges, heads=[1, 4]), read=read)
    assert same(run, rand.run(rx, read=read))
    assert not same(rand.run(rx, Unmask(edges, heads=[1, 4]), read=read), run)
    assert [r.changed for r in run.receipts] == [len(edges)] * 2 * N_LAYERS


def test_cut_and_opened_again_is_the_clean_run(rand, rx):
    edges = drawn_edges(rx, opens=False)
    read = [Z, MASK, PATTERN]
    run = rand.run(rx, Knockout(edges, layers=1), Unmask(edges, layers=1), read=read)
    assert same(run, rand.run(rx, read=read))


def test_an_edit_stays_in_its_layer(rand, rx):
    """transformers hands one mask to all layers: an edit of one must not show in the others."""
    cut, more = drawn_edges(rx, opens=False), drawn_edges(rx, opens=True)
    clean = rand.run(rx, read=MASK)
    run = rand.run(rx, Knockout(cut, layers=1, heads=3), Unmask(more, layers=1), read=MASK)
    for layer in (0, 2):
        name = f"blocks.{layer}.attn.hook_mask"
        assert torch.equal(run[name], clean[name])
    changed = run["blocks.1.attn.hook_mask"] ^ clean["blocks.1.attn.hook_mask"]
    assert changed.flatten(2).sum(-1).tolist() == [
        [len(more)] * 3 + [len(more) + len(cut)] + [len(more)] * 2
    ]
    assert same(rand.run(rx, read=MASK), clean, atol=0)  # nor in the next run


def test_the_last_edit_of_an_edge_decides(rand, rx):
    """Of edges that are half open, half closed: Unmask, Knockout closes all; Knockout, Unmask
    opens all, and may only cut what is open."""
    half_open, half_closed = drawn_edges(rx, opens=False), drawn_edges(rx, opens=True)
    edges = half_open | half_closed
    at = edges.to_mask()[0]
    run = rand.run(rx, Unmask(edges), Knockout(edges), read=MASK)
    assert not any(run[name][0][:, at].any() for name in run)
    run = rand.run(rx, Knockout(half_open), Unmask(edges), read=MASK)
    assert all(run[name][0][:, at].all() for name in run)
    with pytest.raises(EdgeError, match="closed already"):
        rand.run(rx, Knockout(edges), Unmask(edges))
    with pytest.raises(EditHadNoEffect, match="every edge was open already"):
        rand.run(rx, Unmask(half_closed), Knockout(half_open), Unmask(half_open), Unmask(edges))
