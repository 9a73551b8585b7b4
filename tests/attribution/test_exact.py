"""Exact effects against single knockouts and against plain attention with edges cut by hand."""

from __future__ import annotations

from copy import copy

import numpy as np
import pytest
import torch

from interp import EdgeSet, Knockout
from interp.attribution import exact as exact_module
from interp.attribution.asking import ask
from interp.attribution.exact import all_units, cuts, effects, exact, open_edges
from interp.attribution.sources import Sources
from interp.attribution.targets import AnswerLogit
from tests.attribution.plain import Case, asked_by_hand, load, near, predicted, random_labels
from tests.conftest import plain_logits
from tests.zoo import ZOO, build

FEW = ["llava-clip-llama", "llava-siglip-mistral", "qwen3-vl", "gemma3", "paligemma2"]


@pytest.fixture(scope="module", params=[*ZOO, *(f"{name}, few wrong" for name in FEW)])
def case(request):
    name, _, few = request.param.partition(", ")
    return Case(name, few=bool(few))


@pytest.fixture(scope="module")
def llama():
    return Case("llava-clip-llama")


def cut_mask(case, question, part, units):
    """By layer, `[batch, head, q, k]`: the edges of some units, written out."""
    sources, x, inside = part.sources, case.x, case.inside(question)
    out = {}
    for layer, head, group in units:
        mask = out.setdefault(
            layer, torch.zeros(len(x), case.model.cfg.n_heads, x.n_pos, x.n_pos, dtype=torch.bool)
        )
        for n in range(len(sources)):
            row, position = int(sources.row[n]), int(sources.position[n])
            mask[row, head, position] |= inside[n, :, group]
    return out


def lost(case, question, units):
    """What the target loses, `[n_images]`, in plain transformers."""
    (part,) = question.parts
    cut = case.plain.run(case.x, cut=cut_mask(case, question, part, units))
    return case.asked.margin(case.plain.run(case.x)) - case.asked.margin(cut)


def some(question, n=6, seed=0):
    units = all_units(question)
    rng = np.random.default_rng(seed)
    return [units[i] for i in sorted(rng.choice(len(units), min(n, len(units)), replace=False))]


def values_of(question, table, units):
    first = question.layers[0]
    return torch.stack([table[:, layer - first, head, group] for layer, head, group in units], 1)


# -- the reference itself --------------------------------------------------------------------------


def test_the_reference_is_plain_transformers(case):
    """Untouched weights, transformers' own eager attention and norms."""
    stock = build(case.name)[0]
    stock.set_attn_implementation("eager")
    attended = case.x.tensors["attention_mask"].bool()
    reference = plain_logits(stock, case.x)[attended]
    ours = case.plain.run(case.x).logits[attended]
    assert torch.allclose(ours.float(), reference, atol=2e-5 * float(reference.abs().max()))


# -- knockouts -------------------------------------------------------------------------------------


def test_effects_are_those_of_edges_cut_in_plain_attention(case):
    """Six heads and groups of every family: masks that differ by layer, grouped queries, both
    directions, deepstack, norms behind attention, bounded scores."""
    question = case.ask()
    units = some(question)
    ours = values_of(question, exact(question, units), units)
    near(ours, torch.stack([lost(case, question, [unit]) for unit in units], 1), 5e-5)


def test_a_whole_head_cut_leaves_rows_that_write_nothing(case):
    """sources="whole" cuts all that a reader sees, itself included: z is zero there."""
    question = case.ask(sources="whole")
    units = [(0, 1, 0), (1, 4, 0), (2, 0, 0)]
    ours = values_of(question, exact(question, units), units)
    sources = question.parts[0].sources
    clean, found = case.plain.run(case.x), []
    for layer, head, _ in units:
        at = torch.zeros(clean.z[layer].shape[:3], dtype=torch.bool)
        at[sources.row, sources.position, head] = True
        zero = case.plain.run(
            case.x, put={layer: (at[..., None], torch.zeros_like(clean.z[layer]))}
        )
        found.append(case.asked.margin(clean) - case.asked.margin(zero))
    near(ours, torch.stack(found, 1), 5e-5)


def test_all_of_them_together_are_single_runs_one_after_the_other(llama):
    """Every unit against `model.run` with one `Knockout` of edges written out token by token."""
    question = llama.ask()
    ours = exact(question)
    assert not ours.isnan().any()
    (part,) = question.parts
    clean = llama.asked.of(llama.model.run(llama.x, read=llama.end)[llama.end].double())
    for layer, head, group in all_units(question):
        mask = cut_mask(llama, question, part, [(layer, head, group)])[layer][:, head]
        mask &= torch.ones(llama.x.n_pos, llama.x.n_pos, dtype=torch.bool).tril()
        mask &= llama.x.tensors["attention_mask"].bool()[:, None]
        if not mask.any():
            assert (ours[:, layer, head, group] == 0).all()
            continue
        knockout = Knockout(EdgeSet.from_mask(mask), layers=layer, heads=head)
        run = llama.model.run(llama.x, knockout, read=llama.end, allow_empty_rows=True)
        single = clean - llama.asked.of(run[llama.end].double())
        assert torch.allclose(ours[:, layer, head, group], single, atol=1e-6)


def test_several_edits_of_one_variant_are_made_together_and_none_is_no_effect(llama):
    question = llama.ask()
    (part,) = question.parts
    units = [(0, 1, 2), (1, 3, 3), (1, 3, 2), (2, 0, 4)]
    ours = effects(question, part, [[], cuts(question, part, units), []])
    assert (ours[0] == 0).all()
    assert (ours[2] == 0).all()
    near(ours[1], lost(llama, question, units))


@pytest.mark.parametrize("dst", ["image", "all"])
def test_other_readers_than_the_targets_own(llama, dst):
    question = llama.ask(dst=dst, sources="place")
    units = some(question, 6)
    ours = values_of(question, exact(question, units), units)
    near(ours, torch.stack([lost(llama, question, [unit]) for unit in units], 1), 2e-5)


@pytest.mark.parametrize("name", ["llava-siglip-mistral", "gemma3", "paligemma2"])
def test_the_answers_logit(name):
    """Read at the last word, behind a bound on logits in Gemma 2."""
    case = Case(name)
    dog, red = case.model.tokenizer.convert_tokens_to_ids(["dog", "red"])
    question = ask(case.model, case.x, target=AnswerLogit("dog", "red"), sources="place")
    units = some(question, 6, seed=1)
    ours = values_of(question, exact(question, units), units)
    last = [int(line.nonzero()[-1]) for line in case.x.tensors["attention_mask"]]

    def target(run):
        return torch.stack([run.logits[r, at, dog] - run.logits[r, at, red] for r, at in
                            enumerate(last)])  # fmt: skip

    (part,) = question.parts
    clean = target(case.plain.run(case.x))
    found = [
        clean - target(case.plain.run(case.x, cut=cut_mask(case, question, part, [unit])))
        for unit in units
    ]
    near(ours, torch.stack(found, 1), 5e-4)  # float32 logits are rounded at 1e-6 of some 30


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava-siglip-mistral", "gemma3", "paligemma2", "paligemma"])
def test_open_edges_are_where_plain_attention_has_weight(name):
    """Windows that differ by layer, image blocks open both ways: layer by layer, group by group."""
    case = Case(name)
    question = case.ask(dst="all", sources="place")
    (part,) = question.parts
    clean, counts = case.plain.run(case.x), []
    for layer in question.layers:
        weight = clean.pattern[layer][:, 0] > 0
        for group in range(len(question.groups)):
            by_hand = weight & cut_mask(case, question, part, [(layer, 0, group)])[layer][:, 0]
            edges = open_edges(question, part, layer, group)
            assert torch.equal(edges.to_mask(), by_hand)
            counts.append(len(edges))
    assert (counts[:4] != counts[4:8]) == (name == "gemma3")


def test_a_group_without_an_open_edge_has_no_effect_and_no_run(llama, monkeypatch):
    """What a causal mask closes: later positions."""
    (part,) = llama.ask().parts
    at = part.sources
    later = (torch.arange(llama.x.n_pos) > at.position[:, None]).to(torch.int8)
    question = llama.ask(sources=Sources(("earlier", "later"), at.row, at.position, later))
    given = []
    each_run = exact_module.each_run

    def counting(model, x, variants, **options):
        given.extend(variants)
        return each_run(model, x, variants, **options)

    monkeypatch.setattr(exact_module, "each_run", counting)
    ours = exact(question)
    assert (ours[..., 1] == 0).all()
    assert float(ours[..., 0].abs().max()) > 1e-2
    assert len(given) == 1 + 18  # the clean run and a variant a head


def test_where_images_see_both_ways_later_tokens_count():
    case = Case("paligemma")
    at = case.ask().parts[0].sources
    later = (torch.arange(case.x.n_pos) > at.position[:, None]).to(torch.int8)
    question = case.ask(sources=Sources(("earlier", "later"), at.row, at.position, later))
    units = [(0, 0, 1), (0, 3, 1), (1, 2, 1), (2, 5, 1)]
    ours = values_of(question, exact(question, units), units)
    near(ours, torch.stack([lost(case, question, [unit]) for unit in units], 1), 5e-5)


# -- images and batches ----------------------------------------------------------------------------


def test_images_with_none_one_and_many_wrong_tokens(llama):
    """NaN where nothing is asked; the others' means are over their own tokens."""
    model, x = load("llava-clip-llama", n_images=3)
    right = predicted(model, x, llama.bank)
    labels = right.copy()
    labels[16 + 5] = (right[16 + 5] + 1) % 4
    labels[32:] = (right[32:] + 1) % 4
    question = ask(model, x, llama.bank, labels=labels)
    assert torch.bincount(question.parts[0].sources.row, minlength=3).tolist() == [0, 1, 16]
    units = some(question, 6, seed=2)
    ours = values_of(question, exact(question, units), units)
    assert ours[0].isnan().all()

    three = copy(llama)
    three.model, three.x = model, x
    three.asked = asked_by_hand(model, x, llama.bank, labels, llama.end)
    near(ours, torch.stack([lost(three, question, [unit]) for unit in units], 1), 2e-5)


def test_only_the_units_asked_for_and_a_tick_for_each(llama):
    question, ticks = llama.ask(), []
    units = [(2, 5, 4), (0, 0, 2)]
    ours = exact(question, units, on_run=ticks.append)
    there = ~ours.isnan()
    assert there.sum() == 4
    assert there[:, 2, 5, 4].all()
    assert there[:, 0, 0, 2].all()
    assert sum(ticks) == 2


def test_how_many_go_together_does_not_matter(llama):
    question = llama.ask(sources="place")
    one, many = exact(question, batch_size=1), exact(question, batch_size=50)
    assert torch.allclose(one, many, atol=1e-6)


@pytest.mark.parametrize("name", ["llava-clip-llama", "gemma3"])
def test_bfloat16_is_float32_up_to_its_rounding(name):
    """The same rounded weights in float64: within 8% of the largest effect of a whole head."""
    case = Case(name, torch.bfloat16)
    question = case.ask(sources="whole")
    units = all_units(question)
    ours = values_of(question, exact(question, units), units)
    reference = torch.stack([lost(case, question, [unit]) for unit in units], 1)
    near(ours, reference, 0.08)


# -- patching --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava-clip-llama", "qwen3-vl", "gemma3"])
def test_a_patch_puts_in_what_the_head_gives_elsewhere(name):
    case = Case(name)
    pixels = case.x.tensors["pixel_values"].flip(0) * 0.7
    there = case.model.inputs(**{**case.x.tensors, "pixel_values": pixels})
    question = case.ask(sources="whole")
    units = [(0, 1, 0), (0, 5, 0), (1, 2, 0), (2, 3, 0)]
    ours = values_of(question, exact(question, units, patch=[there]), units)
    sources = question.parts[0].sources
    clean, moved = case.plain.run(case.x), case.plain.run(there)
    found = []
    for layer, head, _ in units:
        at = torch.zeros(clean.z[layer].shape[:3], dtype=torch.bool)
        at[sources.row, sources.position, head] = True
        put = case.plain.run(case.x, put={layer: (at[..., None], moved.z[layer])})
        found.append(case.asked.margin(clean) - case.asked.margin(put))
    near(ours, torch.stack(found, 1), 5e-5)


def test_a_patch_needs_whole_heads_and_the_same_shape(llama):
    with pytest.raises(ValueError, match='sources="whole" would do'):
        exact(llama.ask(), patch=[llama.x])
    shorter = load("llava-clip-llama", n_images=1)[1]
    with pytest.raises(ValueError, match="position by position"):
        exact(llama.ask(sources="whole"), patch=[shorter])


def test_random_labels_leave_some_tokens_out(llama):
    """The cases above have tokens without a class, wrong ones and right ones."""
    labels = random_labels(llama.x)
    right = labels == predicted(llama.model, llama.x, llama.bank)
    assert (labels == 255).any()
    assert right.any()
    assert 2 < len(llama.asked.row) < len(labels) - 2
