"""`model.bridge()` opens the same weights, and gives the same numbers wherever it is right.

The reference is `TransformerBridge` of transformer-lens 4.3. What it lacks or means differently is
listed in `WRONG_THERE`, and tests hold that it still is so; when one of them fails, TransformerLens
has mended it: compare it here and strike it out of `interp.lens.bridge` and `interp.lens.cache`.
"""

from __future__ import annotations

import logging
import re
from functools import cache

import pytest
import torch

from interp import MLLM
from interp.errors import NoBridge
from interp.hooks import ALIASES
from tests.record import proved
from tests.zoo import ZOO, build, picture

BRIDGED = (
    "tiny",
    "llava-clip-llama",
    "llava-siglip-mistral",
    "llava-clip-qwen2",
    "llava-next",
    "llava-onevision",
    "qwen2.5-vl",
    "qwen3-vl",
    "gemma3",
    "idefics3",
)
QWEN = ("qwen2.5-vl", "qwen3-vl")

#: What the bridge lacks or means differently, and where: pattern over our names -> cases.
WRONG_THERE = {
    r".*hook_mask": BRIDGED,  # our own hook
    r"vision\.hook_embed": BRIDGED,  # there under another name, see below
    r"vision\..*hook_resid_mid": BRIDGED,  # never fires
    r"vision\..*attn_scores": BRIDGED,  # holds the pattern
    r"vision\.ln_final\..*": BRIDGED,  # under another name (post_layernorm)
    r"blocks\..*attn_scores": QWEN,  # holds the pattern
    r"blocks\..*hook_rot_.": QWEN,  # not there
    r"vision\..*(attn\.|ln\d\.).*": QWEN,  # fused and unsplit, no hooks inside norms
    r"vision\..*mlp\.hook_.*": ("qwen3-vl",),  # under the family's own names
}


def wrong(case: str, name: str) -> bool:
    return any(case in cases and re.fullmatch(p, name) for p, cases in WRONG_THERE.items())


def theirs(case: str, name: str) -> str:
    """TransformerLens 4.3's spelling of one of our names."""
    if case in QWEN:
        name = name.replace("deepstack.", "vision.deepstack_mergers.")
        name = name.replace("vision.", "vision_encoder.").replace("adapter.", "vision_projector.")
        return name
    for their, our in ALIASES.items():
        if name.startswith(our):
            return their + name.removeprefix(our)
    return name


class Pair:
    """A model and its bridge, and the cache of each on the same input."""

    def __init__(self, case: str) -> None:
        if case == "tiny":
            from interp.datasets import scenes

            self.model = MLLM.load("tiny")
            self.x = self.model.prepare(scenes("test")[0].image, "What is in the picture?")
        else:
            module, processor = build(case)
            self.model = MLLM.load(module, processor=processor)
            self.x = self.model.prepare(picture(), ZOO[case].prompt)
        self.before = self.model.fingerprint()
        self.bridge = self.model.bridge()
        self.tensors = self.model.to_device(self.x)
        self.ids = self.tensors.pop("input_ids")
        self.logits, self.cache = self.model.run_with_cache(self.x)
        with torch.no_grad():
            self.their_logits, self.their_cache = self.bridge.run_with_cache(
                self.ids, **self.tensors
            )

    def on_bridge(self, **kwargs) -> torch.Tensor:
        """Logits (or what `stop_at_layer` gives) of the bridge."""
        with torch.no_grad():
            if "fwd_hooks" in kwargs:
                return self.bridge.run_with_hooks(self.ids, **self.tensors, **kwargs)
            return self.bridge(self.ids, **self.tensors, **kwargs)


pair = cache(Pair)


def close(made: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    if made.shape != expected.shape:
        return False
    made, expected = made.detach().float(), expected.detach().float()
    return bool((made - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))


# -- the same weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BRIDGED)
def test_bridge_runs_on_the_very_same_weights(case):
    both = pair(case)
    assert close(both.their_logits, both.logits)
    ours = {p.data_ptr() for p in both.model.module.parameters()}
    assert {p.data_ptr() for p in both.bridge.original_model.parameters()} <= ours
    assert both.model.fingerprint() == both.before
    configs = [m.config for m in both.bridge.original_model.modules() if hasattr(m, "config")]
    kinds = {getattr(config, "_attn_implementation", "eager") for config in configs}
    assert kinds == {"eager"}


def test_bridge_in_bfloat16():
    module, processor = build("llava-clip-llama", dtype=torch.bfloat16)
    model = MLLM.load(module, processor=processor)
    x = model.prepare(picture(), ZOO["llava-clip-llama"].prompt)
    tensors = model.to_device(x)
    with torch.no_grad():
        logits = model.bridge()(tensors.pop("input_ids"), **tensors)
    assert logits.dtype == torch.bfloat16
    assert close(logits, model.run(x, read="*").logits, 0.05)


def test_an_edit_of_a_weight_is_seen_on_both():
    both = Pair("llava-clip-llama")
    with torch.no_grad():
        both.model.module.lm_head.weight[7] += 1.0
        moved = both.model.run(both.x).logits
    assert close(both.on_bridge(), moved)
    assert not close(moved, both.logits)


def test_our_module_is_left_as_it_was():
    both = Pair("llava-clip-llama")
    both.bridge.enable_compatibility_mode(disable_warnings=True)  # folds norms into weights
    assert both.model.fingerprint() == both.before
    assert torch.equal(both.model.run(both.x, read="*").logits, both.logits)
    log_probs = [torch.log_softmax(logits, -1) for logits in (both.on_bridge(), both.logits)]
    assert close(*log_probs)


@pytest.mark.parametrize("case", BRIDGED)
def test_weights_by_head_are_theirs(case):
    both = pair(case)
    names = ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out", "W_E", "W_U", "b_U"]
    if case in ("llava-clip-qwen2", "llava-onevision", "qwen2.5-vl"):
        names += ["b_Q", "b_K", "b_V"]
    for name in names:
        assert torch.equal(getattr(both.model, name), getattr(both.bridge, name)), name
    assert torch.equal(both.model.OV.AB, both.bridge.OV.AB)
    assert torch.equal(both.model.QK.AB, both.bridge.QK.AB)
    ids = torch.tensor([[3, 4]])
    directions = both.bridge.tokens_to_residual_directions(ids)
    assert torch.equal(both.model.tokens_to_residual_directions(ids), directions)
    with pytest.raises(AttributeError, match="bias-free projection"):  # ours are zeros
        both.bridge.b_O  # noqa: B018
    assert not both.model.b_O.any()


# -- the same hooks --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BRIDGED)
def test_hooks_hold_what_theirs_hold(case):
    both = pair(case)
    names = [name for name in both.cache if not wrong(case, name)]
    assert len(names) > 60
    unlike = []
    for name in names:
        ours, reference = both.cache[name], both.their_cache.cache_dict[theirs(case, name)]
        if reference.ndim == ours.ndim - 1 and name.startswith(
            ("vision.", "adapter.", "deepstack.")
        ):
            reference = reference[None]  # packed pictures have no batch axis there
        if name.endswith("hook_attn_scores"):
            open_ = ours.isfinite()
            assert (reference[~open_] <= torch.finfo(torch.float32).min / 2).all()
            ours, reference = ours[open_], reference[open_]
        if not close(ours, reference):
            unlike.append(name)
    assert unlike == []
    proved(case, "TransformerBridge", f"{len(names)} hooks")


@pytest.mark.parametrize("case", BRIDGED)
def test_what_is_left_out_is_still_wrong_there(case):
    both = pair(case)
    there = both.their_cache.cache_dict
    named = {name: there.get(theirs(case, name)) for name in both.cache if wrong(case, name)}
    for name, value in named.items():
        if name.endswith("hook_attn_scores") and value is not None:
            assert close(value, both.cache[name.replace("attn_scores", "pattern")]), name
        else:
            assert value is None, name
    embedding = there["vision_encoder.hook_vision_embed"].reshape(
        both.cache["vision.hook_embed"].shape
    )
    assert close(both.cache["vision.hook_embed"], embedding)


def test_qwens_tower_is_theirs_before_it_is_split():
    """There the heads lie in one matrix with queries and keys: ours are that, split."""
    for case in QWEN:
        both = pair(case)
        fused = both.their_cache["vision_encoder.blocks.1.attn.qkv.hook_out"]
        for part, letter in zip(fused.chunk(3, -1), "qkv"):
            ours = both.cache[f"vision.blocks.1.attn.hook_{letter}"]
            assert close(ours[0].flatten(1), part)
        z = both.their_cache["vision_encoder.blocks.1.attn.proj.hook_in"]
        assert close(both.cache["vision.blocks.1.attn.hook_z"][0].flatten(1), z)


@pytest.mark.parametrize("case", ["llava-clip-llama", "gemma3", "idefics3"])
def test_functions_edit_as_theirs_do(case):
    both = pair(case)
    seen = []

    def fade(value, hook):
        seen.append(hook.name)
        return value * torch.linspace(0, 1, value.shape[-1])

    for name in (
        "blocks.1.attn.hook_pattern",
        "blocks.1.attn.hook_z",
        "blocks.0.hook_mlp_out",
        "blocks.1.hook_resid_post",
    ):
        ours = both.model.run_with_hooks(both.x, fwd_hooks=[(name, fade)])
        assert seen == [name]
        assert close(ours, both.on_bridge(fwd_hooks=[(name, fade)]), 1e-4)
        assert not close(ours, both.logits, 1e-3)
        seen.clear()


def test_edits_that_do_nothing_there():
    def nothing(value, hook):
        return value * 0

    for case, name in (
        *((case, "blocks.1.attn.hook_pattern") for case in QWEN),
        *((case, "blocks.1.attn.hook_attn_scores") for case in QWEN),
        ("llava-clip-llama", "vision.blocks.0.attn.hook_pattern"),
        ("llava-clip-llama", "vision.blocks.0.attn.hook_attn_scores"),
        ("gemma3", "vision.blocks.0.attn.hook_pattern"),
    ):
        both = pair(case)
        with pytest.warns(UserWarning, match="edit is discarded"):
            unmoved = both.on_bridge(fwd_hooks=[(theirs(case, name), nothing)])
        assert close(unmoved, both.logits)
        moved = both.model.run_with_hooks(both.x, fwd_hooks=[(name, nothing)])
        assert not close(moved, both.logits, 1e-3)


@pytest.mark.parametrize("case", BRIDGED)
def test_stopping_is_stopping_there(case):
    both = pair(case)
    for stop in (0, 1, -1):
        ours, kept = both.model.run_with_cache(both.x, stop_at_layer=stop)
        with torch.no_grad():
            stream, there = both.bridge.run_with_cache(both.ids, **both.tensors, stop_at_layer=stop)
        assert close(ours, stream)
        theirs_kept = {theirs(case, name) for name in kept if not wrong(case, name)}
        assert theirs_kept <= set(there)
        blocks = {name.split(".")[1] for name in there if name.startswith("blocks.")}
        assert blocks == {name.split(".")[1] for name in kept if name.startswith("blocks.")}
    n_layers = both.model.cfg.n_layers  # behind the last block they return the logits
    assert close(both.on_bridge(stop_at_layer=n_layers), both.logits)
    ours, _ = both.model.run_with_cache(both.x, stop_at_layer=n_layers)
    assert close(ours, both.their_cache["resid_post", -1])


# -- the same methods ------------------------------------------------------------------------------

METHODS = {
    "accumulated_resid": lambda c: c.accumulated_resid(),
    "accumulated_resid to a layer's MLP": lambda c: c.accumulated_resid(
        1, incl_mid=True, mlp_input=True
    ),
    "accumulated_resid through the final norm": lambda c: c.accumulated_resid(apply_ln=True),
    "accumulated_resid at a position": lambda c: c.accumulated_resid(pos_slice=-1),
    "stack_activation": lambda c: c.stack_activation("pattern"),
    "logit_lens": lambda c: c.logit_lens(positions=None).values,
}
BY_PART = {
    "stack_head_results": lambda c: c.stack_head_results(),
    "stack_head_results of a slice": lambda c: c.stack_head_results(2, pos_slice=(1, 5)),
    "stack_neuron_results": lambda c: c.stack_neuron_results(2),
    "get_neuron_results": lambda c: c.get_neuron_results(1, neuron_slice=[3, 4]),
}
WITH_NORMS = {
    "accumulated_resid through a layer's norm": lambda c: c.accumulated_resid(1, apply_ln=True),
    "apply_ln_to_stack": lambda c: c.apply_ln_to_stack(c.accumulated_resid()),
    "apply_ln_to_stack of an MLP": lambda c: c.apply_ln_to_stack(c.accumulated_resid(), 1, True),
    "logit_attrs": lambda c: c.logit_attrs(c.accumulated_resid(), 7),
    "logit_attrs of a difference": lambda c: c.logit_attrs(
        c.accumulated_resid(), torch.tensor([7]), torch.tensor([8])
    ),
    "heads at a layer": lambda c: c.stack_head_results(2, apply_ln=True, incl_remainder=True),
}
FROM_THE_START = {
    "decompose_resid": lambda c: c.decompose_resid(),
    "decompose_resid through the norm": lambda c: c.decompose_resid(2, apply_ln=True),
    "decompose_resid at an MLP": lambda c: c.decompose_resid(1, mlp_input=True),
    "decompose_resid without the start": lambda c: c.decompose_resid(incl_embeds=False, mode="mlp"),
    "get_full_resid_decomposition": lambda c: c.get_full_resid_decomposition(),
    "get_full_resid_decomposition of MLPs": lambda c: c.get_full_resid_decomposition(
        2, expand_neurons=False, apply_ln=True, pos_slice=-1
    ),
}


@pytest.mark.parametrize("case", BRIDGED)
def test_methods_give_what_theirs_give(case):
    both = pair(case)
    methods = METHODS if case == "gemma3" else {**METHODS, **BY_PART}
    unlike = [n for n, f in methods.items() if not close(f(both.cache), f(both.their_cache))]
    assert unlike == []


@pytest.mark.parametrize("case", BRIDGED)
def test_every_method_on_an_unmended_cache_gives_what_theirs_gives(case):
    """`on_bridge` answers all of TransformerLens's questions as the bridge does, gaps and all."""
    both = pair(case)
    unlike = [
        name
        for name, f in {**METHODS, **BY_PART, **WITH_NORMS, **FROM_THE_START}.items()
        if not close(f(both.cache.on_bridge()), f(both.their_cache))
    ]
    assert unlike == []


@cache
def folded(case: str) -> Pair:
    """A pair whose bridge has folded its norms into the weights behind them, and nothing else."""
    both = Pair(case)
    logging.disable(logging.WARNING)
    both.bridge.enable_compatibility_mode(
        disable_warnings=True,
        fold_ln=True,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    logging.disable(logging.NOTSET)
    with torch.no_grad():
        _, both.their_cache = both.bridge.run_with_cache(both.ids, **both.tensors)
    return both


@pytest.mark.parametrize(
    "case", ["tiny", "llava-clip-llama", "llava-clip-qwen2", "qwen3-vl", "gemma3", "idefics3"]
)
def test_attributions_are_those_of_a_bridge_that_folds(case):
    """Compared at text positions, where the bridge's decomposition has its right start."""
    both = folded(case)
    text = torch.as_tensor(both.x.is_text)
    stacks = [(both.cache.decompose_resid(), both.their_cache.decompose_resid())]
    if case != "gemma3":  # which normalises what heads write; see below
        stacks.append((both.cache.stack_head_results(), both.their_cache.stack_head_results()))
    for ours, there in stacks:
        n = len(there)  # deepstack terms, which are zero at text, come behind
        made = both.cache.logit_attrs(ours, 7)[:n]
        expected = both.their_cache.logit_attrs(there, 7)
        assert close(made[:, text], expected[:, text], 1e-4)
    raw = pair(case)
    unfolded = raw.their_cache.logit_attrs(raw.their_cache.accumulated_resid(), 7)
    assert not close(raw.cache.logit_attrs(raw.cache.accumulated_resid(), 7), unfolded, 1e-2)


@pytest.mark.parametrize("case", BRIDGED)
def test_their_sums_still_miss_the_pictures(case):
    both = pair(case)
    picture_tokens = torch.as_tensor(both.x.grid.is_placeholder)
    text = torch.as_tensor(both.x.is_text)
    stream = both.cache["resid_post", -1]
    theirs_, ours = (c.decompose_resid().sum(0) for c in (both.their_cache, both.cache))
    assert close(ours, stream, 1e-4)
    assert close(theirs_[text], stream[text], 1e-4)
    assert not close(theirs_[picture_tokens], stream[picture_tokens], 0.05)


def test_their_sums_still_miss_deepstack_and_post_norms():
    both = pair("qwen3-vl")
    states = dict(both.their_cache.cache_dict)
    states["hook_embed"] = states["blocks.0.hook_resid_pre"]
    mended = type(both.their_cache)(states, both.bridge)
    picture_tokens = torch.as_tensor(both.x.grid.is_placeholder)
    stream = both.cache["resid_post", -1][picture_tokens]
    assert not close(mended.decompose_resid().sum(0)[picture_tokens], stream, 0.05)
    both = pair("gemma3")
    heads = both.their_cache.stack_head_results().sum(0)
    written = sum(both.their_cache["attn_out", layer] for layer in range(3))
    assert not close(heads, written, 0.05)
    assert close(both.cache.stack_head_results().sum(0), written)


# -- what has no bridge ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted(set(ZOO) - set(BRIDGED)))
def test_families_without_a_bridge_are_told(case):
    module, processor = build(case)
    model = MLLM.load(module, processor=processor)
    name = re.escape(model.family.name)
    with pytest.raises(NoBridge, match=rf"no bridge for {name} \({type(module).__name__}\)"):
        model.bridge()
    proved(case, "TransformerBridge", "none there")


def test_weights_that_cannot_be_shared_are_told():
    module, processor = build("llava-clip-llama")
    model = MLLM.load(module, processor=processor)
    attention = module.model.language_model.layers[0].self_attn
    attention.q_proj.weight = torch.nn.Parameter(torch.zeros(24, 48))  # as when packed into codes
    with pytest.raises(NoBridge, match=r"layers.0.self_attn.q_proj' holds weight.* another shape"):
        model.bridge()
    module.hf_device_map = {"model.vision_tower": "cpu", "model.language_model": "meta"}
    with pytest.raises(NoBridge, match="spread over several devices"):
        model.bridge()


def test_a_bridge_needs_a_tokenizer(rand):
    with pytest.raises(ValueError, match="loaded without a processor"):
        rand.bridge()


def test_bridge_has_the_models_words():
    both = pair("llava-clip-llama")
    assert both.bridge.processor is both.model.processor
    assert both.bridge.to_single_token("dog") == both.model.to_single_token("dog")
    assert both.bridge.tokenizer is not both.model.tokenizer  # TransformerLens changes its own
