"""LLaVA's table, and what is said about models without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    PaliGemmaConfig,
)

from interp import MLLM
from interp.errors import NotMultimodal
from interp.families import FAMILIES, family_of
from interp.families.base import module_at
from interp.families.llava import LLAVA
from tests.conftest import random_inputs, random_llava


def test_every_place_of_the_table_is_a_module(rand):
    for name in rand.hooks.names:
        module_at(rand.module, LLAVA.place(name, 8).path)


@pytest.mark.parametrize("layer", [-1, -2, 1, 3])
def test_adapter_reads_the_layer_the_table_says(layer):
    model = MLLM.load(random_llava(vision_feature_layer=layer))
    run = model.run(random_inputs(model), read=[model.adapter_reads, "adapter.hook_in"])
    assert torch.equal(run.tokens(model.adapter_reads), run["adapter.hook_in"])


def test_several_vision_layers_are_refused_by_name():
    model = MLLM.load(random_llava(vision_feature_layer=[-2, -1]))
    with pytest.raises(NotImplementedError, match=r"several vision layers \(\[-2, -1\]\)"):
        model.adapter_reads  # noqa: B018


def test_vision_tokens_drop_cls_unless_it_is_fed():
    state = torch.arange(5.0).reshape(1, 5, 1)
    for strategy, first in [("default", 1), ("full", 0)]:
        config = LlavaConfig(vision_feature_select_strategy=strategy)
        assert LLAVA.vision_tokens(config, state)[0, 0, 0] == first


def test_tokens_of_all_stages_lie_in_the_same_order(rand):
    """With attention off in both towers, one changed patch changes one token, the same in each."""
    x, marked = random_inputs(rand), random_inputs(rand)
    token = 6
    left, top, right, bottom = x.grid.box[token].astype(int)
    marked.tensors["pixel_values"][..., top:bottom, left:right] += 3
    stages = [name for name in rand.stages if not rand.off_path(name)]

    def states(inputs):
        kept = {}
        heads = ["vision.blocks.[0-1].attn.hook_z", "blocks.*.attn.hook_z"]
        off = (heads, lambda z, hook: z * 0)
        look = (stages, lambda state, hook: kept.update({hook.name: state.clone()}))
        rand.run_with_hooks(inputs, fwd_hooks=[off, look])
        return {name: rand.image_tokens(name, kept[name], x.grid)[0] for name in stages}

    before, after = states(x), states(marked)
    for name in stages:
        assert (before[name] != after[name]).any(-1).nonzero().tolist() == [[token]], name


def test_text_model_is_refused():
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    with pytest.raises(NotMultimodal, match=r"LlamaForCausalLM \(model_type 'llama'\) is no multi"):
        MLLM.load(LlamaForCausalLM(config))


def test_family_without_a_table_is_refused_with_the_tables_there_are():
    known = ", ".join(t for family in FAMILIES for t in family.model_types)
    with pytest.raises(NotMultimodal, match=f"'paligemma'.*there are tables for: {known}"):
        family_of(PaliGemmaConfig())
    module = random_llava()
    module.config.model_type = "unheard_of"
    with pytest.raises(NotMultimodal, match=r"(?s)tree begins.*model\.language_model: LlamaModel"):
        family_of(module)


def test_grid_follows_the_vision_configuration():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=48, patch_size=16), image_token_id=9
    )
    grid = LLAVA.grid(config, None, np.array([[1] + [9] * 9]), [(96, 48)])
    assert str(grid) == "3 x 3 image tokens, positions 1..9, 32 x 16 px each"
