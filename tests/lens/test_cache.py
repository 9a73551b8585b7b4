"""TransformerLens's cache methods on MLLMs: parts add up to what plain transformers computes.

The reference is transformers' own `hidden_states`, logits and norm modules, and NumPy in float64.
That the methods give what they give on `TransformerBridge` is in `test_bridge.py`.
"""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
import transformers as hf
from transformer_lens import ActivationCache, patching
from transformer_lens.model_protocol import TransformerLensModelWithWeights

from interp import EditHadNoEffect, Knockout
from interp.errors import HeadError, NotRead, SumMismatch, UnknownHook
from interp.lens.cache import StreamCache
from interp.lens.view import LensView
from interp.model import MLLM
from tests.zoo import TEXT, VISION, ZOO, build, llava, picture, randomise

CASES = [*ZOO, "biased"]


class Case:
    """A model of the zoo, one input, its cache, and what plain transformers gives."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, rows: int = 1) -> None:
        if name == "biased":  # a language model with all the biases there are
            torch.manual_seed(0)
            text = hf.LlamaConfig(**TEXT, attention_bias=True, mlp_bias=True)
            module, processor = llava(text, hf.CLIPVisionConfig(**VISION))
            randomise(module)
            module, name = module.eval().to(dtype), "llava-clip-llama"
        else:
            module, processor = build(name, dtype=dtype)
        self.plain = copy.deepcopy(module)
        self.model = MLLM.load(module, processor=processor)
        pictures = [picture(seed=seed) for seed in range(rows)]
        self.x = self.model.prepare(pictures, ZOO[name].prompt)
        self.logits, self.cache = self.model.run_with_cache(self.x)
        self.text = self.model.config.get_text_config()

    def plainly(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters and what leaves a module in plain transformers."""
        kept = []
        module = self.plain.get_submodule(path)
        handle = module.register_forward_hook(lambda module, args, out: kept.append((args[0], out)))
        with torch.no_grad():
            self.plain(**self.model.to_device(self.x), use_cache=False)
        handle.remove()
        return kept[0]

    def norm(self, layer: int, mlp_input: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters and leaves a block's norm in plain transformers; the final one's at 3."""
        if layer == 3:
            return self.plainly(self.model.family.language.final_norm)
        return self.plainly(self.model.family.block_path(layer, "ln2" if mlp_input else "ln1"))

    def plain_logits(self) -> torch.Tensor:
        """Logits of plain transformers."""
        return self.plain_output().logits

    def plain_output(self):
        """Output of plain transformers, with `hidden_states`."""
        with torch.no_grad():
            tensors = self.model.to_device(self.x)
            return self.plain(**tensors, use_cache=False, output_hidden_states=True)

    def uncapped(self, logits: torch.Tensor) -> torch.Tensor:
        cap = getattr(self.text, "final_logit_softcapping", None)
        return cap * torch.atanh(logits / cap) if cap else logits


case = cache(Case)


def close(made, expected, tolerance=1e-4):
    made, expected = (np.asarray(t.detach().float()) for t in (made, expected))
    assert made.shape == expected.shape
    assert np.abs(made - expected).max() <= tolerance * np.abs(expected).max()


def test_it_is_transformerlens_own_class():
    c = case("llava-clip-llama").cache
    assert isinstance(c, ActivationCache)
    assert torch.equal(c["resid_post", -1], c["blocks.2.hook_resid_post"])
    assert torch.equal(c["pattern", 1], c["blocks.1.attn.hook_pattern"])
    assert torch.equal(c["vision_projector.hook_out"], c["adapter.hook_out"])
    assert c.stack_activation("q").shape == (3, *c["q", 0].shape)
    sliced = c.accumulated_resid(pos_slice=-1)
    assert torch.equal(sliced, c.accumulated_resid()[:, :, -1])


@pytest.mark.parametrize("name", CASES)
def test_parts_add_up_to_the_stream_of_transformers(name):
    this = case(name)
    for layer in range(4):
        stream = this.norm(layer)[0].numpy().astype(np.float64)
        for parts, labels in (
            this.cache.decompose_resid(layer, return_labels=True),
            this.cache.get_full_resid_decomposition(layer, return_labels=True),
            this.cache.get_full_resid_decomposition(
                layer, expand_neurons=False, return_labels=True
            ),
        ):
            assert len(parts) == len(labels) == len(set(labels))
            error = np.abs(parts.numpy().astype(np.float64).sum(0) - stream).max()
            assert error < 1e-4 * np.abs(stream).max()
            assert ("0_deepstack" in labels) == (name == "qwen3-vl" and layer > 0)
        close(this.cache.accumulated_resid()[layer], this.norm(layer)[0])


@pytest.mark.parametrize("name", CASES)
def test_both_meanings_of_hidden_states(name):
    """transformers' are those that enter each block, but the last is behind the final norm.

    Those of Qwen3-VL lack what deepstack adds between blocks.
    """
    this = case(name)
    hidden = this.plain_output().hidden_states
    close(this.cache.accumulated_resid(apply_ln=True)[-1], hidden[-1])
    entering = this.cache.accumulated_resid()
    if name == "qwen3-vl":
        with pytest.raises(AssertionError):
            close(entering[1], hidden[1])
        close(this.cache["resid_post", 0], hidden[1])
    else:
        close(entering[1], hidden[1])


@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_layers_inside(name):
    this = case(name)
    mid = this.norm(1, mlp_input=True)[0].numpy().astype(np.float64)
    for parts in (
        this.cache.decompose_resid(1, mlp_input=True),
        this.cache.get_full_resid_decomposition(1, mlp_input=True),
    ):
        error = np.abs(parts.numpy().astype(np.float64).sum(0) - mid).max()
        assert error < 1e-4 * np.abs(mid).max()


@pytest.mark.parametrize("name", CASES)
def test_attributions_add_up_to_the_logit(name):
    this = case(name)
    dog, red = (this.model.to_single_token(word) for word in ("dog", "red"))
    expected = this.uncapped(this.plain_logits())
    for parts in (this.cache.decompose_resid(), this.cache.get_full_resid_decomposition()):
        close(this.cache.logit_attrs(parts, "dog").sum(0), expected[..., dog])
        difference = this.cache.logit_attrs(parts, "dog", incorrect_tokens="red").sum(0)
        close(difference, expected[..., dog] - expected[..., red], 2e-4)
    last = this.cache.decompose_resid(pos_slice=-1)
    close(this.cache.logit_attrs(last, dog, pos_slice=-1).sum(0), expected[:, -1, dog], 1e-3)


@pytest.mark.parametrize("name", CASES)
def test_norms_are_applied_with_scale_and_weight(name):
    """The parts of a block's input, normed one by one, add up to what the norm module gives."""
    this = case(name)
    for layer, mlp_input in ((1, False), (1, True), (3, False)):
        _, normed = this.norm(layer, mlp_input)
        for method in (this.cache.decompose_resid, this.cache.get_full_resid_decomposition):
            close(method(layer, mlp_input=mlp_input, apply_ln=True).sum(0), normed)
    close(this.cache.accumulated_resid(apply_ln=True)[-1], this.norm(3)[1])
    close(this.cache.accumulated_resid(layer=2, apply_ln=True)[-1], this.norm(2)[1])


@pytest.mark.parametrize("name", CASES)
def test_heads_and_neurons_are_what_was_written(name):
    this = case(name)
    heads, labels = this.cache.stack_head_results(return_labels=True)
    assert labels[7] == "L1H1"
    neurons = this.cache.stack_neuron_results(3)
    for layer in range(3):
        biases = this.model.b_O[layer], this.model.b_out[layer]
        close(heads[6 * layer : 6 * layer + 6].sum(0) + biases[0], this.cache["attn_out", layer])
        close(
            neurons[64 * layer : 64 * layer + 64].sum(0) + biases[1], this.cache["mlp_out", layer]
        )
    for method in (this.cache.stack_head_results, this.cache.stack_neuron_results):
        whole = method(2, incl_remainder=True).sum(0)
        close(whole, this.cache["resid_pre", 2])
        close(method(2, incl_remainder=True, apply_ln=True).sum(0), this.norm(2)[1])
    one = this.cache.get_neuron_results(1, neuron_slice=[5])[..., 0, :]
    close(one, neurons[64 + 5])


@pytest.mark.parametrize("name", ["llava-clip-llama", "gemma3"])
def test_cached_results_are_used(name):
    """`cache["result", l]` is what the hook holds; heads are made of it what they write."""
    this = case(name)
    kept = "blocks.*.{attn.hook_result,ln1_post.hook_scale}" if name == "gemma3" else "*hook_result"
    _, few = this.model.run_with_cache(this.x, names_filter=kept)
    close(few.stack_head_results(), this.cache.stack_head_results())
    close(
        few["result", 1], this.model.run(this.x, read="*hook_result")["blocks.1.attn.hook_result"]
    )
    computed = this.cache.apply_slice_to_batch_dim([0])
    computed.compute_head_results()
    close(computed["result", 1], few["result", 1])


@pytest.mark.parametrize("name", ["llava-clip-llama", "qwen3-vl", "gemma3", "biased"])
def test_projecting_before_is_projecting_after(name):
    this = case(name)
    to = torch.randn(48, 2, generator=torch.Generator().manual_seed(0))
    for settings in ({}, {"apply_ln": True}, {"apply_ln": True, "pos_slice": -1}):
        full = this.cache.get_full_resid_decomposition(2, **settings)
        close(
            this.cache.get_full_resid_decomposition(2, **settings, project_output_onto=to),
            full @ to,
        )
        one = this.cache.get_full_resid_decomposition(
            2, **settings, project_output_onto=to[:, 0], expand_neurons=False
        )
        close(one.sum(0), full.sum(0) @ to[:, 0])


@pytest.mark.parametrize("name", CASES)
def test_logit_lens_ends_at_the_logits(name):
    this = case(name)
    logits = this.plain_logits()
    lens = this.cache.logit_lens(positions=None)
    assert lens.labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    close(lens.values[-1], logits)
    ranks = this.cache.logit_lens(targets="dog").rank_trajectory("dog")
    dog = this.model.to_single_token("dog")
    assert int(ranks[-1]) == int((logits[0, -1] > logits[0, -1, dog]).sum())


@pytest.mark.parametrize("name", ["llava-clip-llama", "gemma3", "qwen3-vl"])
def test_bfloat16_decomposes(name):
    this = case(name, torch.bfloat16)
    parts = this.cache.decompose_resid()
    this.cache.get_full_resid_decomposition(2, apply_ln=True)
    close(parts.float().sum(0), this.cache["resid_post", 2], 0.05)


def test_an_edited_run_decomposes_too():
    this = case("llava-clip-llama")
    cut = Knockout(this.x.grid.edges([0, 1], [3, 4]))
    logits, edited = this.model.run_with_cache(this.x, cut)
    dog = this.model.to_single_token("dog")
    close(edited.logit_attrs(edited.decompose_resid(), dog).sum(0), logits[..., dog])
    assert not torch.allclose(logits, this.logits, atol=1e-3)


# -- what is refused -------------------------------------------------------------------------------


def test_parts_that_do_not_add_up_raise():
    this = case("llava-clip-llama")
    states = dict(this.cache.items())
    states["blocks.1.hook_mlp_out"] = states["blocks.1.hook_mlp_out"] * 1.01
    tampered = StreamCache(states, LensView(this.model))
    tampered.decompose_resid(1)
    with pytest.raises(SumMismatch, match=r"parts miss 'blocks.2.hook_resid_pre' by .*allowed"):
        tampered.decompose_resid(2)
    states["blocks.0.attn.hook_z"] = states["blocks.0.attn.hook_z"] * 1.01
    with pytest.raises(SumMismatch):
        StreamCache(states, LensView(this.model)).get_full_resid_decomposition(1, apply_ln=True)


def test_what_was_not_cached_is_named():
    this = case("gemma3")
    _, few = this.model.run_with_cache(this.x, names_filter="blocks.*.{hook_attn_out,attn.hook_z}")
    with pytest.raises(NotRead, match=r"'blocks.0.hook_resid_pre' is not in this cache of 6 hooks"):
        few.decompose_resid(mode="attn")
    assert few.decompose_resid(mode="attn", incl_embeds=False).shape[0] == 3
    with pytest.raises(NotRead, match=r"ln1_post.hook_scale.*names_filter="):
        few.stack_head_results()
    with pytest.raises(NotRead, match="hook_result"):
        this.cache["result", 1]
    with pytest.raises(ValueError, match="layer 4: there are 0 to 3"):
        this.cache.decompose_resid(4)


def test_biases_behind_gemmas_post_norm_are_refused():
    text = hf.Gemma2Config(**TEXT, head_dim=8, query_pre_attn_scalar=8, attention_bias=True)
    torch.manual_seed(0)
    module, processor = llava(text, hf.CLIPVisionConfig(**VISION))
    randomise(module)
    model = MLLM.load(module.eval(), processor=processor)
    _, c = model.run_with_cache(model.prepare(picture(), ZOO["llava-clip-llama"].prompt))
    c.decompose_resid()
    with pytest.raises(NotImplementedError, match="biases are no constant part of the stream"):
        c.get_full_resid_decomposition()


# -- the batch axis --------------------------------------------------------------------------------


def test_rows_are_not_pictures():
    """LLaVA-NeXT cuts a picture into tiles: the tower's first axis is not the batch's."""
    this = case("llava-next", rows=2)
    tower = this.cache["vision.blocks.0.hook_resid_post"]
    assert len(tower) > 2 == len(this.cache["resid_post", 0])
    second = this.cache.apply_slice_to_batch_dim(1)
    assert isinstance(second, StreamCache)
    assert torch.equal(second["resid_post", 0], this.cache["resid_post", 0][1])
    assert torch.equal(second["vision.blocks.0.hook_resid_post"], tower)
    close(second.decompose_resid().sum(0), this.cache["resid_post", 2][1])
    close(second.get_full_resid_decomposition().sum(0), this.cache["resid_post", 2][1])
    with pytest.raises(ValueError, match="a batch of 2 rows keeps its axis"):
        this.cache.apply_slice_to_batch_dim([0, 1]).remove_batch_dim()
    with pytest.raises(ValueError, match="no rows to slice"):
        second.apply_slice_to_batch_dim(0)


def test_a_single_row_drops_its_axis():
    this = case("llava-next")
    _, flat = this.model.run_with_cache(this.x, remove_batch_dim=True)
    assert torch.equal(flat["resid_post", 2], this.cache["resid_post", 2][0])
    tower = "vision.blocks.0.hook_resid_post"
    assert torch.equal(flat[tower], this.cache[tower])
    parts = flat.decompose_resid(pos_slice=-1)
    attributions = flat.logit_attrs(parts, "dog", pos_slice=-1, has_batch_dim=False)
    dog = this.model.to_single_token("dog")
    close(attributions.sum(0), this.logits[0, -1, dog], 1e-3)


# -- stop_at_layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava-clip-llama", "qwen3-vl", "gemma3"])
def test_stopping_gives_the_stream_that_enters_the_layer(name):
    this = case(name)
    ran = []
    norms = [
        this.model.module.get_submodule(this.model.family.block_path(i, "ln1")) for i in range(3)
    ]
    handles = [
        norm.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, norm in enumerate(norms)
    ]
    for stop, n_blocks in ((0, 0), (1, 1), (2, 2), (3, 3), (-1, 2)):
        ran.clear()
        stream, kept = this.model.run_with_cache(this.x, stop_at_layer=stop)
        assert ran == list(range(n_blocks))
        close(stream, this.norm(n_blocks)[0])
        close(this.model.run_with_hooks(this.x, stop_at_layer=stop), stream)
        blocks = {int(name.split(".")[1]) for name in kept if name.startswith("blocks.")}
        assert blocks == set(range(n_blocks))
        assert "adapter.hook_out" in kept
        assert "ln_final.hook_scale" not in kept
    for handle in handles:
        handle.remove()


def test_functions_and_edits_before_the_stop_count_and_later_ones_raise():
    this = case("llava-clip-llama")
    model, x = this.model, this.x

    def zero(value, hook):
        return value * 0

    hooks = [("blocks.*.hook_attn_out", zero), ("blocks.*.hook_mlp_out", zero)]
    stream = model.run_with_hooks(x, fwd_hooks=hooks, stop_at_layer=2)
    assert torch.equal(stream, model.run_with_hooks(x, stop_at_layer=0))
    with pytest.raises(EditHadNoEffect, match=r"'blocks.1.hook_mlp_out' acts only from"):
        model.run_with_hooks(x, fwd_hooks=[("blocks.1.hook_mlp_out", zero)], stop_at_layer=1)
    edges = x.grid.edges([0, 1], [3, 4])
    ran = []
    last = model.module.get_submodule(model.family.block_path(2, "ln1"))
    handle = last.register_forward_hook(lambda *_: ran.append(2))
    cut, _ = model.run_with_cache(x, Knockout(edges), stop_at_layer=2)
    handle.remove()
    assert not ran  # though the edit is of all layers
    assert not torch.allclose(cut, model.run_with_hooks(x, stop_at_layer=2), atol=1e-4)
    with pytest.raises(EditHadNoEffect, match="after everything that is read"):
        model.run_with_cache(x, Knockout(edges, layers=[2]), stop_at_layer=2)
    with pytest.raises(UnknownHook, match=r"matches only hooks from 'blocks.1.hook_resid_pre' on"):
        model.run_with_cache(x, names_filter="blocks.2.*", stop_at_layer=1)
    with pytest.raises(HeadError, match=r"stop_at_layer=4: the model has 3 layers"):
        model.run_with_cache(x, stop_at_layer=4)


# -- tools of TransformerLens that take a model ----------------------------------------------------


@pytest.mark.parametrize("name", ["llava-clip-llama", "qwen2.5-vl"])
def test_transformerlens_patches_activations_on_it(name):
    """`transformer_lens.patching` takes the model for its own, and `Inputs` for tokens."""
    this = case(name)
    model = this.model
    assert isinstance(model, TransformerLensModelWithWeights)
    other = model.prepare(picture(seed=3), ZOO[name].prompt)

    def metric(logits):
        return logits[0, -1, 7] - logits[0, -1, 8]

    effects = patching.get_act_patch_attn_head_out_by_pos(model, other, this.cache, metric)
    assert effects.shape == (3, other.n_pos, 6)
    row = other.n_pos - 1

    def put(z, hook):
        z[:, row, 4] = this.cache["z", 1][:, row, 4]

    one = metric(model.run_with_hooks(other, fwd_hooks=[("blocks.1.attn.hook_z", put)]))
    assert float(effects[1, row, 4]) == pytest.approx(float(one), rel=1e-4)
    assert abs(float(one - metric(model.run(other).logits))) > 1e-3
