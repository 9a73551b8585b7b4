"""Weights by head, held against what runs hold: `x @ W` is the hook, in every family and tower."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers as hf
from torch import nn

from interp import MLLM
from interp.errors import UnreadableWeight
from tests.zoo import TEXT, VISION, ZOO, build, llava, picture, randomise


def loaded(name: str):
    """A model of the zoo, or one whose language model has all the biases there are."""
    if name == "biased":
        torch.manual_seed(0)
        biases = {"attention_bias": True, "mlp_bias": True}
        module, processor = llava(hf.LlamaConfig(**TEXT, **biases), hf.CLIPVisionConfig(**VISION))
        randomise(module)
        module, name = module.eval(), "llava-clip-llama"
    else:
        module, processor = build(name)
    model = MLLM.load(module, processor=processor)
    return model, model.prepare(picture(), ZOO[name].prompt)


@cache
def case(name: str):
    """A model, its input, and a run with the hooks that these tests look at."""
    model, x = loaded(name)
    hooks = "{ln1.*,ln2.*,attn.hook_q,attn.hook_k,attn.hook_v,attn.hook_z,attn.hook_result,mlp.*}"
    read = [f"blocks.1.{hooks}", f"vision.blocks.1.{hooks}", "hook_embed", "ln_final.*"]
    return model, x, model.run(x, read=read)


@pytest.mark.parametrize("tower", ["", "vision."])
@pytest.mark.parametrize("name", [*ZOO, "biased"])
def test_weights_make_the_hooks(name, tower):
    model, _, run = case(name)
    weights = model.vision if tower else model
    block = weights.blocks[1]

    def close(suffix, made):
        expected = run[f"{tower}blocks.1.{suffix}"]
        assert made.shape == expected.shape
        assert torch.allclose(made, expected, atol=2e-4 * float(expected.abs().max()), rtol=0)

    def normed(ln):
        norm = getattr(block, ln)
        return run[f"{tower}blocks.1.{ln}.hook_normalized"] * norm.w + norm.b

    stacked = {n: getattr(weights, n)[1] for n in ("W_Q", "W_K", "W_V", "b_Q", "b_K", "b_V")}
    for letter in "QKV":
        made = torch.einsum("bpm,hmd->bphd", normed("ln1"), stacked[f"W_{letter}"])
        close(f"attn.hook_{letter.lower()}", made + stacked[f"b_{letter}"])
    z = run[f"{tower}blocks.1.attn.hook_z"]
    close("attn.hook_result", torch.einsum("bphd,hdm->bphm", z, weights.W_O[1]))
    if getattr(model.family, "vision" if tower else "language").names.gated:
        close("mlp.hook_pre", normed("ln2") @ weights.W_gate[1] + weights.b_gate[1])
        close("mlp.hook_pre_linear", normed("ln2") @ weights.W_in[1] + weights.b_in[1])
    else:
        close("mlp.hook_pre", normed("ln2") @ weights.W_in[1] + weights.b_in[1])
        with pytest.raises(AttributeError, match="no gated MLP, so no W_gate"):
            weights.W_gate  # noqa: B018


@pytest.mark.parametrize("name", [*ZOO, "biased"])
def test_both_ends_of_the_vocabulary(name):
    model, x, run = case(name)
    # Gemma multiplies what it looks up
    scale = getattr(model.module.get_submodule(model.family.language.embed), "embed_scale", 1.0)
    text = torch.as_tensor(x.is_text)
    ids = x.tensors["input_ids"][text]
    assert torch.allclose(run["hook_embed"][text], model.W_E[ids] * scale, atol=1e-5)
    normalized = run["ln_final.hook_normalized"]
    made = normalized * model.ln_final_weights.w @ model.W_U + model.b_U
    if cap := getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        made = cap * torch.tanh(made / cap)
    assert torch.allclose(made, run.logits, atol=1e-4)
    directions = model.tokens_to_residual_directions(torch.tensor([[5, 6], [7, 8]]))
    made = normalized * model.ln_final_weights.w @ directions[1, 0]
    if not cap:
        assert torch.allclose(made, run.logits[..., 7], atol=1e-4)


@pytest.mark.parametrize("name", ["llava-clip-llama", "biased"])
def test_what_is_written_is_results_plus_biases(name):
    model, x = loaded(name)
    run = model.run(x, read="blocks.*.{attn.hook_result,mlp.hook_post,hook_attn_out,hook_mlp_out}")
    for layer in range(3):
        heads = run[f"blocks.{layer}.attn.hook_result"].sum(-2) + model.b_O[layer]
        assert torch.allclose(heads, run[f"blocks.{layer}.hook_attn_out"], atol=1e-4)
        mlp = run[f"blocks.{layer}.mlp.hook_post"] @ model.W_out[layer] + model.b_out[layer]
        assert torch.allclose(mlp, run[f"blocks.{layer}.hook_mlp_out"], atol=1e-3)
    assert bool(model.b_O.any()) == bool(model.b_out.any()) == (name == "biased")
    layers = [layer.self_attn.o_proj.bias for layer in model.module.model.language_model.layers]
    mlps = [layer.mlp.down_proj.bias for layer in model.module.model.language_model.layers]
    if name == "biased":
        assert torch.allclose(model.accumulated_bias(2), sum(layers[:2]) + sum(mlps[:2]))
        both = sum(layers[:2]) + mlps[0]
        assert torch.allclose(model.accumulated_bias(1, mlp_input=True), both)
        assert torch.allclose(model.accumulated_bias(3, include_mlp_biases=False), sum(layers))
    assert not model.accumulated_bias(0).any()


def test_ov_carries_a_source_to_a_result():
    """A head's result is its pattern times what OV makes of the normalised stream."""
    model, x = loaded("llava-clip-llama")
    run = model.run(x, read="blocks.1.{attn.hook_pattern,attn.hook_result,ln1.hook_normalized}")
    source = run["blocks.1.ln1.hook_normalized"] * model.blocks[1].ln1.w
    carried = torch.einsum("bkm,hmn->bhkn", source, model.OV.AB[1])
    result = (run["blocks.1.attn.hook_pattern"] @ carried).transpose(1, 2)
    expected = run["blocks.1.attn.hook_result"]
    assert torch.allclose(result, expected, atol=1e-4 * float(expected.abs().max()))


def test_qk_makes_the_scores_where_nothing_rotates():
    model, x = loaded("llava-clip-llama")
    with torch.no_grad():  # CLIP's tower does not rotate; without biases QK is the whole score
        for layer in model.module.model.vision_tower.encoder.layers:
            layer.self_attn.q_proj.bias.zero_()
            layer.self_attn.k_proj.bias.zero_()
    read = "vision.blocks.1.{attn.hook_attn_scores,ln1.hook_normalized}"
    run = model.run(x, read=read)
    norm = model.vision.blocks[1].ln1
    states = run["vision.blocks.1.ln1.hook_normalized"] * norm.w + norm.b
    scores = torch.einsum("bqm,hmn,bkn->bhqk", states, model.vision.QK.AB[1], states) / 8**0.5
    assert torch.allclose(scores, run["vision.blocks.1.attn.hook_attn_scores"], atol=1e-3)


def test_blocks_are_views_and_stacks_are_copies():
    model, _, _ = case("llava-clip-llama")
    o_proj = model.module.model.language_model.layers[1].self_attn.o_proj.weight
    assert model.blocks[1].attn.W_O.data_ptr() == o_proj.data_ptr()
    stack = model.W_O
    stack.zero_()
    assert o_proj.any()
    assert not model.blocks[1].attn.W_Q.requires_grad


def test_a_weight_that_is_no_matrix_is_refused():
    model, _ = loaded("llava-clip-llama")
    q_proj = model.module.model.language_model.layers[1].self_attn.q_proj
    codes = torch.zeros(48, 48, dtype=torch.int8)
    q_proj.weight = nn.Parameter(codes, requires_grad=False)
    with pytest.raises(UnreadableWeight, match=r"weight of a Linear is torch.int8 .*quantised"):
        model.W_Q  # noqa: B018
    assert model.W_K.shape == (3, 2, 48, 8)


# -- words -----------------------------------------------------------------------------------------


def test_words_to_tokens_and_directions():
    model, _, _ = case("llava-clip-llama")
    dog = model.tokenizer.convert_tokens_to_ids("dog")
    assert model.to_single_token("dog") == dog
    assert model.to_tokens("red dog").tolist() == [
        model.tokenizer.convert_tokens_to_ids(["red", "dog"])
    ]
    column = model.module.lm_head.weight[dog]
    for tokens in ("dog", dog, torch.tensor(dog), torch.tensor([dog])):
        assert torch.equal(model.tokens_to_residual_directions(tokens), column)
    assert model.tokens_to_residual_directions(torch.tensor([1, 2])).shape == (2, 48)
    with pytest.raises(ValueError, match=r"'red dog' is 2 tokens, \['red', 'dog'\]; give one"):
        model.to_single_token("red dog")
    with pytest.raises(ValueError, match="does not know 'zebra'"):
        model.to_single_token("zebra")


def test_words_need_a_tokenizer(rand):
    with pytest.raises(ValueError, match="loaded without a processor"):
        rand.to_single_token("dog")
    assert rand.tokens_to_residual_directions(3).shape == (48,)
