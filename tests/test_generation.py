"""Generating under mask edits, with a KV cache, against plain transformers without one.

The reference is transformers' own eager attention and `generate(use_cache=False)`: for every token
the whole sequence runs again, with the edges written into its float masks by hand.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp import MLLM, EdgeSet, Knockout, Unmask
from interp.edits.masks import EditMask
from interp.edits.values import ValueEdit
from interp.errors import EdgeError, EditHadNoEffect, EmptyRow
from interp.families.base import module_at
from interp.generation import answer_edges, generate
from tests.conftest import random_inputs
from tests.zoo import ZOO, build, picture

N_NEW = 4
FAST = {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW}  # nobody stops early


@pytest.fixture(scope="module", params=list(ZOO))
def case(request):
    """(model, plain copy, a batch of two rows, the first padded on the left)."""
    module, processor = build(request.param)
    processor.tokenizer.padding_side = "left"
    model = MLLM.load(module, processor=processor)
    prompt = ZOO[request.param].prompt
    x = model.prepare([picture(40, 32), picture(36, 50, seed=1)], [prompt, f"{prompt} a red dog"])
    plain = build(request.param)[0]
    plain.set_attn_implementation("eager")
    return model, plain, x


def by_hand(model, plain, x, edits, **settings):
    """(ids, logits) of plain transformers without a cache."""
    blocks = module_at(plain, model.family.language.blocks)
    handles = []
    for layer, block in enumerate(blocks):

        def write(module, args, kwargs, layer=layer):
            mask = kwargs["attention_mask"]
            n_pos = mask.shape[-1]
            heads = module.config.num_attention_heads
            mask = mask.expand(len(x), heads, -1, -1).clone()
            for edit in edits:
                if edit.layers is not None and layer not in edit.layers:
                    continue
                value = 0.0 if isinstance(edit, Unmask) else torch.finfo(mask.dtype).min
                for row, dst, src in edit.edges.table.tolist():
                    if dst < n_pos:
                        for head in edit.heads or range(heads):
                            mask[row, head, dst, src] = value
            return args, {**kwargs, "attention_mask": mask}

        handles.append(block.self_attn.register_forward_pre_hook(write, with_kwargs=True))
    try:
        with torch.no_grad():
            out = plain.generate(
                **x.tensors,
                use_cache=False,
                return_dict_in_generate=True,
                output_logits=True,
                do_sample=False,
                **settings,
            )
    finally:
        for handle in handles:
            handle.remove()
    return out.sequences[:, x.n_pos :], torch.stack(out.logits, 1)


def widened(edges, n_new):
    return EdgeSet(edges.table, edges.n_batch, edges.n_pos + n_new)


def cut_edges(model, x):
    """From every other position that is no padding to all that answer, and image to image."""
    attended = x.tensors["attention_mask"].numpy().astype(bool)
    src = attended & (np.arange(x.n_pos) % 2 == 0)
    src[:, -1] = False
    read = model.run(x, read="blocks.1.attn.hook_mask", logits=False)
    inside = read["blocks.1.attn.hook_mask"][:, 0] & x.grid.image_block().to_mask()
    inside &= ~torch.eye(x.n_pos, dtype=torch.bool)
    return answer_edges(src, N_NEW) | widened(EdgeSet.from_mask(inside), N_NEW)


def within_reach(model, edges):
    """Mistral's window is seven positions in every layer; elsewhere some layer sees everything."""
    text = model.config.text_config
    window = (text.model_type == "mistral" and text.sliding_window) or edges.n_pos
    near = edges.dst - edges.src < window
    return EdgeSet(edges.table[near], edges.n_batch, edges.n_pos)


def test_generating_with_edits_is_running_again_for_every_token(case):
    model, plain, x = case
    edges = within_reach(model, cut_edges(model, x))
    edits = [Knockout(edges, heads=[0, 3, 4])]
    made = generate(model, x, edits, logits=True, **FAST)
    ids, logits = by_hand(model, plain, x, edits, **FAST)
    assert torch.equal(made.ids, ids)
    assert torch.allclose(made.logits, logits, atol=1e-4)
    clean = generate(model, x, logits=True, **FAST)
    assert float((clean.logits[:, 0] - logits[:, 0]).abs().max()) > 1e-2
    assert len(made.receipts) == model.cfg.n_layers
    assert max(r.changed for r in made.receipts) > len(edges) // 2
    assert made.texts == model.processor.batch_decode(ids, skip_special_tokens=True)


def test_a_position_that_is_generated_later_can_be_dst(case):
    """Edges that end only in what is generated: the first token's logits stay, later ones move."""
    model, plain, x = case
    src = np.zeros((len(x), x.n_pos), dtype=bool)
    src[:, -2:-1] = True
    edges = answer_edges(src, N_NEW)
    later = EdgeSet(edges.table[edges.dst >= x.n_pos], edges.n_batch, edges.n_pos)
    edits = [Knockout(later)]
    made = generate(model, x, edits, logits=True, **FAST)
    ids, logits = by_hand(model, plain, x, edits, **FAST)
    clean = generate(model, x, logits=True, **FAST)
    assert torch.equal(made.ids, ids)
    assert torch.allclose(made.logits, logits, atol=1e-4)
    assert torch.equal(made.logits[:, 0], clean.logits[:, 0])
    assert float((made.logits[:, 1] - clean.logits[:, 1]).abs().max()) > 1e-3
    # the last token that is generated asks nothing: N_NEW - 1 queries in each row
    assert all(r.changed == 2 * (N_NEW - 1) for r in made.receipts)


def test_prompt_edges_opened_and_cut_in_the_vision_tower(case):
    """Edges of the prompt alone: what the cache holds is that of the edited run."""
    model, _, x = case
    row, at = x.patches.row, x.patches.position
    seen = EdgeSet.of([(int(row[0]), int(at[0]), int(at[1]))], x.patches.n_batch, x.patches.n_pos)
    edits = [Knockout(seen, tower="vision")]
    made = generate(model, x, edits, logits=True, **FAST)
    run = model.run(x, *edits)
    assert torch.allclose(made.logits[:, 0], run.logits[:, -1], atol=1e-5)
    assert not torch.equal(made.logits[:, 0], model.run(x).logits[:, -1])


# -- on one model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one():
    module, processor = build("llava-clip-llama")
    model = MLLM.load(module, processor=processor)
    return model, model.prepare(picture(), ZOO["llava-clip-llama"].prompt)


def blind(x):
    return Knockout(answer_edges(x.grid.is_placeholder, N_NEW))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_stock_kernels_generate_the_same(one, kernel):
    from interp import attention

    model, x = one
    edits = [Unmask(x.grid.image_block(), layers=[0, 1]), blind(x)]
    ours = generate(model, x, edits, logits=True, **FAST)
    try:
        attention.register(model.module, model.family, kernel)
        stock = generate(model, x, edits, logits=True, **FAST)
    finally:
        attention.register(model.module, model.family)
    assert torch.equal(ours.ids, stock.ids)
    assert torch.allclose(ours.logits, stock.logits, atol=1e-5)
    assert [(r.layer, r.changed) for r in ours.receipts] == [
        (r.layer, r.changed) for r in stock.receipts
    ]


def test_sampling_with_a_seed_repeats_and_leaves_the_random_state_alone(one):
    model, x = one
    state = torch.random.get_rng_state()
    first, again, other = (
        generate(model, x, [blind(x)], seed=s, do_sample=True, max_new_tokens=N_NEW).ids.tolist()
        for s in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="seed=3 without do_sample=True draws nothing"):
        generate(model, x, seed=3)


def test_no_hook_stays_behind(one):
    model, x = one
    before = generate(model, x, logits=True, **FAST).logits
    with pytest.raises(RuntimeError):
        generate(model, x, [blind(x)], max_new_tokens=N_NEW, stopping_criteria=[_fail])
    assert torch.equal(before, generate(model, x, logits=True, **FAST).logits)


def _fail(*_args, **_kwargs):
    raise RuntimeError("stopped")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_beams": 2}, "num_beams=2 with edits: beams change places"),
        ({"num_return_sequences": 2, "do_sample": True}, "rows are repeated"),
        ({"use_cache": False}, "use_cache=False with edits: leave it out"),
    ],
)
def test_settings_that_move_rows_about_are_refused(one, settings, says):
    model, x = one
    with pytest.raises(ValueError, match=says):
        generate(model, x, [blind(x)], **{"max_new_tokens": N_NEW, **settings})


def test_edits_that_say_nothing_of_later_positions_are_refused(one):
    model, x = one
    for edit in (EditMask(lambda mask, layer: None), ValueEdit("blocks.0.hook_resid_post")):
        with pytest.raises(TypeError, match="cannot act while a model generates"):
            generate(model, x, [edit])


def test_edges_that_do_nothing_while_generating_are_refused(one):
    model, x = one
    n = x.n_pos
    last = EdgeSet.of([(0, 3, n + N_NEW - 1)], 1, n + N_NEW)
    with pytest.raises(EditHadNoEffect, match="ended before any dst of its edges was computed"):
        generate(model, x, [Knockout(last)], max_new_tokens=N_NEW)
    generate(model, x, [Knockout(last)], max_new_tokens=N_NEW, strict=False)
    ahead = EdgeSet.of([(0, n + 1, n)], 1, n + N_NEW)
    with pytest.raises(EdgeError, match="src comes after dst"):
        generate(model, x, [Knockout(ahead)], **FAST)
    with pytest.raises(EdgeError, match="this key is not there"):
        generate(model, x, [Unmask(ahead)], **FAST)
    beyond = EdgeSet.of([(0, 3, n)], 1, n + N_NEW + 1)
    with pytest.raises(EdgeError, match=rf"but this run has 1 x {n} to {n + N_NEW}"):
        generate(model, x, [Knockout(beyond)], max_new_tokens=N_NEW)


def test_a_generated_token_left_with_no_key_is_refused(one):
    model, x = one
    everything = EdgeSet.of([(0, src, x.n_pos) for src in range(x.n_pos + 1)], 1, x.n_pos + N_NEW)
    with pytest.raises(EmptyRow, match=f"the first is position {x.n_pos} of row 0"):
        generate(model, x, [Knockout(everything)], **FAST)
    allowed = generate(model, x, [Knockout(everything)], allow_empty_rows=True, **FAST)
    assert [r.empty_rows for r in allowed.receipts] == [1] * 3


def test_answer_edges_end_where_answers_come_from():
    edges = answer_edges(np.array([[False, True, False], [True, False, False]]), 2)
    assert edges == EdgeSet.of([(0, 1, 2), (0, 1, 3), (1, 0, 2), (1, 0, 3)], 2, 5)
    with pytest.raises(EdgeError, match="answer_edges takes bool"):
        answer_edges(np.zeros((1, 3)), 2)


def test_without_a_processor_there_are_ids_and_no_words(rand):
    made = generate(rand, random_inputs(rand), max_new_tokens=2)
    assert made.texts is None
    assert made.ids.shape == (1, 2)
