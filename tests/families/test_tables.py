"""The tables: every place in them is there, and what they say of the path is so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import CLIPConfig, LlamaConfig, LlamaForCausalLM

from interp import MLLM
from interp.errors import NotMultimodal
from interp.families import FAMILIES, family_of
from interp.families.base import module_at
from interp.families.blocks import TEXT
from tests.conftest import random_inputs, random_llava
from tests.record import proved
from tests.zoo import ZOO, build, inputs


@pytest.fixture(scope="module", params=list(ZOO))
def case(request):
    module, processor = build(request.param)
    model = MLLM.load(module, processor=processor)
    return request.param, model, inputs(model, request.param)


def test_every_table_is_built_in_the_tests():
    built = {build(name)[0].config.model_type for name in ZOO}
    assert built == {kind for family in FAMILIES for kind in family.model_types}
    texts = {build(name)[0].config.text_config.model_type for name in ZOO}
    assert texts == set(TEXT) - {"qwen3"}  # which is Qwen2 with a norm on queries and keys


def test_every_place_of_the_table_is_a_module(case):
    _, model, _ = case
    for name in model.hooks.names:
        module_at(model.module, model.family.place(name, 8).path)


def test_what_the_path_says_is_so(case):
    """Edits at each vision block move the logits but for those that are said to be off the path."""
    family, model, x = case
    path = model.path()
    clean = model.run(x).logits
    for layer in range(model.cfg.n_vision_layers):
        name = f"vision.blocks.{layer}.hook_resid_post"
        with torch.no_grad(), model.trace(x):
            model.hook(name).output.mul_(torch.linspace(0.5, 1.5, model.cfg.d_vision))
            logits = model.nn.output.logits.save()
        assert torch.equal(logits, clean) == (layer in path.off_path), name
    assert str(path).startswith(f"the adapter reads {' and '.join(path.adapter_reads)}")
    proved(family, "path")


def test_deepstack_is_added_behind_the_block_that_the_path_names():
    module, processor = build("qwen3-vl")
    model = MLLM.load(module, processor=processor)
    x = inputs(model, "qwen3-vl")
    path, run = model.path(), model.run(x, read="*{hook_resid_post,hook_resid_pre,hook_out}")
    assert [vision for vision, _, _ in path.deepstack] == [
        "vision.blocks.0.hook_resid_post",
        "vision.blocks.1.hook_resid_post",
    ]
    for layer in range(model.cfg.n_layers - 1):
        after, before = (
            run[f"blocks.{layer}.hook_resid_post"],
            run[f"blocks.{layer + 1}.hook_resid_pre"],
        )
        added = {name: hook for _, hook, name in path.deepstack}.get(
            f"blocks.{layer}.hook_resid_post"
        )
        expected = after.clone()
        if added:
            expected[torch.tensor(x.grid.is_image)] += run[added][0]
        assert torch.equal(before, expected)


@pytest.mark.parametrize("layer", [-1, -2, 1, 3, [-2, -1], [1, 3]])
def test_adapter_reads_the_layers_the_table_says(layer):
    model = MLLM.load(random_llava(vision_feature_layer=layer))
    names = model.path().adapter_reads
    run = model.run(random_inputs(model), read=[*names, "adapter.hook_in"])
    read = torch.cat([run.tokens(name) for name in names], dim=-1)
    assert torch.equal(read, run["adapter.hook_in"])


def test_tokens_of_all_stages_lie_in_the_same_order(case):
    """With attention off in both towers, one changed image token's pixels change that token alone,
    in every stage: as one vector, or as the patches that are merged into it."""
    _, model, x = case
    token = len(x.grid.of_view(0)) // 2
    box = x.grid.box[x.grid.of_view(0)[token]]
    stages = [name for name in model.stages if not model.off_path(name)]

    def states(edit):
        kept = {}
        heads = ["vision.blocks.*.attn.hook_z", "blocks.*.attn.hook_z"]
        heads = [
            n for pattern in heads for n in model.hooks.expand(pattern) if not model.off_path(n)
        ]
        off = (heads, lambda z, hook: z * 0)
        look = (stages, lambda state, hook: kept.update({hook.name: state.clone()}))
        model.run_with_hooks(x, fwd_hooks=[off, (model.stages[0], edit), look])
        return kept

    # the patches under the token, in the tower's states
    under = [
        patch
        for patch in range(len(x.patches))
        if x.patches.view[patch] == 0 and _inside(x.patches.box[patch], box)
    ]
    assert under

    def edit(embed, hook):
        for patch in under:
            embed[x.patches.row[patch], x.patches.position[patch]] += 3

    before, after = states(lambda embed, hook: None), states(edit)
    for name in stages:
        grid = model.grid_of(name, x)
        changed = (before[name] != after[name]).any(-1)
        where = {(r, p) for r, p in changed.nonzero().tolist()}
        inside = [t for t in range(len(grid)) if grid.view[t] == 0 and _inside(grid.box[t], box)]
        assert where == {(int(grid.row[t]), int(grid.position[t])) for t in inside}, name


def _inside(box, outer):
    return (box[:2] >= outer[:2] - 1e-6).all() and (box[2:] <= outer[2:] + 1e-6).all()


# -- what has no table -----------------------------------------------------------------------------


def test_text_model_is_refused():
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    with pytest.raises(NotMultimodal, match=r"LlamaForCausalLM \(model_type 'llama'\) is no multi"):
        MLLM.load(LlamaForCausalLM(config))


def test_family_without_a_table_is_refused_with_the_tables_there_are():
    known = ", ".join(t for family in FAMILIES for t in family.model_types)
    with pytest.raises(NotMultimodal, match=f"'clip'.*there are tables for: {known}"):
        family_of(CLIPConfig())


def test_text_tower_without_a_table_is_refused():
    module = random_llava()
    module.config.text_config.model_type = "unheard_of"
    with pytest.raises(NotMultimodal, match=r"text_config is of type 'unheard_of'.*blocks\.py"):
        family_of(module)


def test_model_without_its_head_or_with_other_names_is_refused():
    module = random_llava()
    family = family_of(module)
    with pytest.raises(NotMultimodal, match=r"LlavaModel has no 'model\.multi_modal_projector'"):
        family.check(module.model)
    wrong = replace(family, language=replace(family.language, block=TEXT["gemma2"]))
    with pytest.raises(NotMultimodal, match=r"has no .*pre_feedforward_layernorm"):
        wrong.check(module)
    MLLM.load(module)
