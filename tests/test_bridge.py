"""Our hooks hold what TransformerLens's of the same name hold, on the bundled model.

The reference is `TransformerBridge` of transformer-lens 4.3 around a copy of the same weights.
Left out, since the bridge lacks them or means something else by them:

* `attn.hook_mask` and `attn.hook_result` are not among what it caches by default;
* `attn.hook_attn_scores` of closed positions: it holds the smallest float there, we hold -inf;
* `hook_attn_scores` of the vision tower: it holds the pattern there (asserted);
* `hook_resid_mid` of the vision tower: it never fires there;
* `vision.hook_embed`: its `hook_vision_embed` is the same tensor under another name (compared).

Its *edits* of the vision tower's scores and pattern do nothing, so only values are compared.
"""

from __future__ import annotations

import copy

import pytest
import torch

from interp.hooks import ALIASES, Vocabulary

SHARED = [
    name
    for name in Vocabulary(5, 3).names
    if not name.endswith(("hook_mask", "hook_result"))
    and not (name.startswith("vision.") and name.endswith(("hook_attn_scores", "hook_resid_mid")))
    and name != "vision.hook_embed"
]


def theirs(name: str) -> str:
    """TransformerLens 4.3's spelling of one of our names."""
    for their, our in ALIASES.items():
        if name.startswith(our):
            return their + name.removeprefix(our)
    return name


@pytest.fixture(scope="module")
def bridge_cache(plain_tiny, tiny, x):
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        plain_tiny.config._name_or_path,
        hf_model=copy.deepcopy(plain_tiny),
        tokenizer=tiny.processor.tokenizer,
        device="cpu",
        dtype=torch.float32,
    )
    tensors = dict(x.tensors)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tensors.pop("input_ids"), **tensors)
    return cache.cache_dict


@pytest.fixture(scope="module")
def states(tiny, x):
    return tiny.run(x, read="*")


@pytest.mark.parametrize("name", SHARED)
def test_hook_holds_what_transformerlens_holds(states, bridge_cache, tiny, name):
    ours, reference = states[name], bridge_cache[theirs(name)]
    if name.endswith("hook_attn_scores"):
        ours, reference = (scores[ours.isfinite()] for scores in (ours, reference))
    assert torch.allclose(ours, reference, atol=1e-5, rtol=0)


def test_what_is_left_out_is_still_wrong_there(states, bridge_cache):
    """When TransformerLens mends these, compare them above."""
    scores = bridge_cache["vision_encoder.encoder_layers.0.attn.hook_attn_scores"]
    assert torch.allclose(scores, states["vision.blocks.0.attn.hook_pattern"], atol=1e-6)
    assert "vision_encoder.encoder_layers.0.hook_resid_mid" not in bridge_cache


def test_vision_embedding_goes_by_another_name(states, bridge_cache):
    ours = states["vision.hook_embed"]
    assert torch.allclose(ours, bridge_cache["vision_encoder.hook_vision_embed"], atol=1e-5)


@pytest.mark.parametrize(
    "name", ["vision_encoder.encoder_layers.1.hook_mlp_out", "vision_projector.hook_out"]
)
def test_transformerlens_spellings_are_understood(states, bridge_cache, name):
    assert torch.allclose(states[name], bridge_cache[name], atol=1e-5)
