"""HookPoints beside the computation: what they hold adds up, and they cost nothing unwatched."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

from interp import MLLM, points
from interp.families.base import module_at
from interp.points import Point, norm_scale, watched
from tests.conftest import random_inputs, random_llava


def parts(model, prefix):
    """ln1, ln2 and the projections to q and from z of the block called `prefix`."""
    vision = prefix.startswith("vision.")
    tower = model.family.vision if vision else model.family.language
    block = module_at(model.module, f"{tower.blocks}.{prefix.split('.')[-1]}")
    names = (tower.block.ln1, tower.block.ln2, tower.block.part("q"), tower.block.part("o"))
    return [module_at(block, name) for name in names]


@pytest.mark.parametrize("prefix", ["blocks.0", "blocks.2", "vision.blocks.0", "vision.blocks.2"])
def test_states_of_a_block_add_up(rand, rx, prefix):
    """Elhage et al.: the residual stream is a sum, heads write into it one by one, and a norm is
    `normalized * weight (+ bias)`."""
    run = rand.run(rx, read=f"{prefix}.*")
    state = {name.removeprefix(f"{prefix}."): value for name, value in run.states.items()}
    ln1, ln2, _, projection = parts(rand, prefix)

    def close(a, b):
        return torch.allclose(a, b, atol=2e-5, rtol=1e-5)

    heads = state["attn.hook_result"].sum(-2)
    bias = projection.bias if projection.bias is not None else 0
    assert close(heads + bias, state["hook_attn_out"])
    assert close(state["hook_resid_pre"] + state["hook_attn_out"], state["hook_resid_mid"])
    assert close(state["hook_resid_mid"] + state["hook_mlp_out"], state["hook_resid_post"])
    for name, norm, resid in [("ln1", ln1, "hook_resid_pre"), ("ln2", ln2, "hook_resid_mid")]:
        out = state[f"{name}.hook_normalized"] * norm.weight + getattr(norm, "bias", 0)
        assert close(out, norm(state[resid]))
        centred, _ = norm_scale(norm, state[resid])
        scaled = centred / state[f"{name}.hook_scale"]
        assert close(scaled, state[f"{name}.hook_normalized"])
    pattern = state["attn.hook_pattern"]
    assert close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
    assert (pattern[~state["attn.hook_mask"]] == 0).all()
    assert close(torch.softmax(state["attn.hook_attn_scores"], -1), pattern)


@pytest.mark.parametrize("prefix", ["blocks.1", "vision.blocks.1"])
def test_edited_norm_is_what_attention_gets(rand, rx, prefix):
    ln1, _, q_projection, _ = parts(rand, prefix)
    clean = rand.run(rx, read=f"{prefix}.ln1.hook_normalized")[f"{prefix}.ln1.hook_normalized"]
    shift = torch.linspace(-1, 1, clean.shape[-1])
    seen = {}
    rand.run_with_hooks(
        rx,
        fwd_hooks=[
            (f"{prefix}.ln1.hook_scale", lambda scale, hook: scale * 2),
            (f"{prefix}.ln1.hook_normalized", lambda normalized, hook: normalized + shift),
            (f"{prefix}.attn.hook_q", lambda q, hook: seen.update(q=q.flatten(-2).clone())),
        ],
    )
    expected = q_projection((clean / 2 + shift) * ln1.weight + getattr(ln1, "bias", 0))
    assert torch.allclose(seen["q"], expected, atol=2e-5)


def test_frozen_scale_makes_the_norm_linear(rand, rx):
    """With the scale put back to its clean value, doubling the input doubles the normalised."""
    clean = rand.run(rx, read="blocks.1.ln1.hook_{scale,normalized}")
    seen = {}
    rand.run_with_hooks(
        rx,
        fwd_hooks=[
            ("blocks.1.hook_resid_pre", lambda x, hook: x * 2),
            ("blocks.1.ln1.hook_scale", lambda s, hook: clean["blocks.1.ln1.hook_scale"]),
            ("blocks.1.ln1.hook_normalized", lambda n, hook: seen.update(n=n.clone())),
        ],
    )
    expected = clean["blocks.1.ln1.hook_normalized"] * 2
    assert torch.allclose(seen["n"], expected, atol=1e-5)


def test_heads_result_edits_equal_z_edits(rand, rx):
    def silence(value, hook):
        value[:, :, 3] = 0

    by_z = rand.run_with_hooks(rx, fwd_hooks=[("blocks.*.attn.hook_z", silence)])
    by_result = rand.run_with_hooks(rx, fwd_hooks=[("blocks.*.attn.hook_result", silence)])
    assert torch.allclose(by_z, by_result, atol=2e-5)


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (["blocks.1.hook_resid_post", "vision.blocks.0.attn.hook_q"], []),
        ("blocks.1.attn.hook_z", ["blocks.1.attn.hook_z"]),
        ("vision.blocks.0.hook_resid_mid", ["vision.blocks.0.hook_resid_mid"]),
        ("blocks.0.ln1.hook_scale", ["blocks.0.ln1.hook_scale", "blocks.0.ln1.hook_normalized"]),
    ],
)
def test_points_are_quiet_while_nobody_looks(rand, rx, read, expected):
    fired = []

    def note(module, args, output):
        if isinstance(module, HookPoint):
            fired.append(module.name)

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        rand.run(rx, read=read)
    finally:
        handle.remove()
    assert fired == expected


def test_point_is_watched_only_during_a_run_that_wants_it(rand, rx):
    point = rand.module.model.language_model.layers[1].self_attn.hook_pattern
    rand.run(rx, read="blocks.1.attn.hook_pattern")
    assert not watched(point)
    point.add_hook(lambda value, hook: None)
    assert watched(point)
    point.remove_hooks()
    assert not watched(point)


def test_point_knows_its_layer_in_both_towers():
    assert Point("blocks.11.attn.hook_z").layer() == 11
    assert Point("vision.blocks.3.hook_resid_mid").layer() == 3
    with pytest.raises(ValueError, match=r"'ln_final\.hook_scale' lies in no block"):
        Point("ln_final.hook_scale").layer()


def test_every_point_is_named_after_its_hook(rand):
    named = [m.name for m in rand.module.modules() if isinstance(m, HookPoint)]
    assert len(named) == len(set(named))
    assert set(named) <= set(rand.hooks.names)


def test_listeners_of_dropped_wrappers_are_forgotten():
    module = random_llava()
    for _ in range(3):
        model = MLLM.load(module)
        model.run(random_inputs(model))
    del model
    gc.collect()
    last = MLLM.load(module)
    point = module.model.language_model.layers[0].self_attn.hook_z
    ((reference, _),) = points._watchers(point)
    assert reference() is last.nn.interleaver


@pytest.mark.parametrize("norm", [nn.LayerNorm(6, eps=1e-3), nn.RMSNorm(6, eps=1e-3)])
def test_norm_scale_is_the_norms_own(norm):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    centred, scale = norm_scale(norm, x)
    assert torch.allclose(centred / scale, norm(x), atol=1e-6)
    assert norm_scale(norm, x.bfloat16())[1].dtype == torch.float32
