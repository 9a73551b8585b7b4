"""Minimal head sets against knockouts made by hand, one run each."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from interp import MLLM
from interp.attribution import minimal
from interp.attribution.cost import Cost
from interp.attribution.minimal import minimal_heads
from interp.attribution.targets import AnswerLogit, Score, Target
from interp.edges import EdgeSet
from interp.edits import Knockout
from interp.errors import HeadError, Untestable
from interp.stats import bootstrap
from tests import zoo
from tests.attribution.planted import planted
from tests.conftest import random_inputs

TOKEN = 34  # of whose logit attention carries something in all of the pictures below
HEADS = [(layer, head) for layer in range(3) for head in range(6)]
FOUR = [(2, 4), (1, 3), (1, 0), (2, 2)]
GROUPS = ["image", "text"]


def edges_by_hand(x, readers):
    """From image and words to each row's reader, but for the first token and the reader itself."""
    return EdgeSet.of(
        [
            (row, src, dst)
            for row, dst in enumerate(readers)
            for src in range(dst)
            if x.is_attended[row, src] and not x.is_first[row, src]
        ],
        len(x),
        x.n_pos,
    )


def lost_by_hand(model, batches, heads):
    """What the logit of the last position loses, `[n_images]`, one run a batch."""
    found = []
    for x in batches:
        edges = edges_by_hand(x, x.is_last.argmax(1))
        cuts = [
            Knockout(edges, layers=layer, heads=[h for at, h in heads if at == layer])
            for layer in {layer for layer, _ in heads}
        ]
        clean, cut = model.run(x).logits, model.run(x, *cuts).logits
        found += [float(v) for v in (clean - cut)[range(len(x)), x.is_last.argmax(1), TOKEN]]
    return np.array(found)


@pytest.fixture(scope="module")
def batches(rand):
    """Selection and held-out images of which attention carries something."""
    chosen = [random_inputs(rand, 2, seed=5, padding=2), random_inputs(rand, 2, seed=0)]
    judged = [random_inputs(rand, 3, seed=15), random_inputs(rand, 2, seed=2)]
    assert lost_by_hand(rand, [*chosen, *judged], HEADS).min() > 0.5
    return chosen, judged


OPTIONS = {"target": AnswerLogit(TOKEN), "sources": GROUPS, "n_random": 4}


@pytest.fixture(scope="module")
def found(rand, batches):
    chosen, judged = batches
    return minimal_heads(rand, chosen, held_out=judged, candidates=FOUR, share=1.0, **OPTIONS)


def share_by_hand(model, batches, heads):
    return lost_by_hand(model, batches, heads).sum() / lost_by_hand(model, batches, HEADS).sum()


# -- the search ------------------------------------------------------------------------------------


def test_each_step_is_the_best_single_addition(rand, batches, found):
    """And no more than that: the best pair of the four may be another one."""
    chosen, _ = batches
    taken: list[tuple[int, int]] = []
    for step, (head, share) in enumerate(zip(found.heads, found.steps["selection"], strict=True)):
        shares = {h: share_by_hand(rand, chosen, [*taken, h]) for h in FOUR if h not in taken}
        assert max(shares, key=shares.get) == head, step
        np.testing.assert_allclose(share, shares[head], atol=1e-4)
        taken.append(head)
    pairs = [share_by_hand(rand, chosen, pair) for pair in itertools.combinations(FOUR, 2)]
    assert found.steps["selection"][1] <= max(pairs) + 1e-4


def test_it_stops_where_the_share_is_reached(rand, batches, found):
    chosen, judged = batches
    one, two = found.steps["selection"][:2]
    options = {"held_out": judged, "candidates": FOUR, **OPTIONS}
    assert 0 < one < two < 1
    short = minimal_heads(rand, chosen, share=(one + two) / 2, **options)
    assert short.reached
    assert short.heads == found.heads[:2]
    assert minimal_heads(rand, chosen, share=one * 0.99, **options).heads == found.heads[:1]


def test_a_share_out_of_reach_is_said_and_no_error(rand, batches, found):
    assert not found.reached
    assert set(found.heads) == set(FOUR)
    assert "NOT reached with all candidates" in str(found)
    assert "not reached" in repr(found)


def test_all_heads_remove_all(rand, batches):
    chosen, judged = batches
    every = minimal_heads(rand, chosen[1], held_out=judged, candidates=18, share=1.0, **OPTIONS)
    assert every.reached
    assert len(every.candidates) == 18
    if len(every) == 18:
        np.testing.assert_allclose(every.selection, 1, atol=1e-5)
    assert "is reached there" in str(every)


def test_candidates_are_those_that_a_small_cut_tells(rand, batches):
    """The first-order effect of a cut is what a small part of it changes, times how small it is.

    Edges cut in part: z moves a little towards what it is with the edges gone, at the reader.
    """
    chosen, judged = batches
    made = minimal_heads(rand, chosen, held_out=judged, candidates=5, share=1.0, **OPTIONS)
    eps, size = 1e-2, dict.fromkeys(HEADS, 0.0)
    for x in chosen:
        last = x.is_last.argmax(1)
        edges, at = edges_by_hand(x, last), (range(len(x)), last)
        clean = rand.run(x, read="blocks.*.attn.hook_z")
        for layer, head in HEADS:
            name = f"blocks.{layer}.attn.hook_z"
            cut = rand.run(x, Knockout(edges, layers=layer, heads=head), read=name, logits=False)
            toward = eps * (cut[name] - clean[name])
            logits = rand.run_with_hooks(x, fwd_hooks=[(name, lambda z, hook, t=toward: z + t)])
            size[layer, head] += float((clean.logits - logits)[(*at, TOKEN)].sum())
    assert list(made.candidates) == sorted(size, key=size.get, reverse=True)[:5]


class Stream(Target):
    """The stream behind the last block at the last position, along a direction."""

    def __init__(self, direction):
        self.direction = direction

    def on(self, model, x):
        end, last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", x.is_last.argmax(1)
        rows = torch.arange(len(x))
        return Score(
            "stream",
            end,
            lambda run: run[end][rows, last].double() @ self.direction,
            rows,
            torch.as_tensor(last),
        )


def test_layers_with_different_masks_are_cut_together():
    """Gemma3: two of its layers see a window only."""
    module, processor = zoo.build("gemma3")
    model = MLLM.load(module, processor=processor)
    prompt = zoo.ZOO["gemma3"].prompt
    x, other = (
        model.prepare([zoo.picture(seed=i) for i in seeds], prompt) for seeds in ([0], [1, 2])
    )
    end = "blocks.2.hook_resid_post"

    def states(x, heads):
        """At the last position, all that it reads cut in some heads."""
        masks = [f"blocks.{i}.attn.hook_mask" for i in range(3)]
        clean = model.run(x, read=[end, *masks])
        assert len({int(clean[name].sum()) for name in masks}) > 1
        last = x.n_pos - 1
        every = EdgeSet.of([(r, s, last) for r in range(len(x)) for s in range(x.n_pos)],
                           len(x), x.n_pos)  # fmt: skip
        cuts = [
            Knockout(every.where(clean[masks[layer]]), layers=layer, heads=head)
            for layer, head in heads
        ]
        cut = model.run(x, *cuts, read=end, allow_empty_rows=True)
        return (clean[end] - cut[end])[:, -1].double()

    direction = states(x, HEADS).sum(0) + states(other, HEADS).sum(0)
    heads = [(0, 1), (0, 4), (1, 2), (2, 0)]
    made = minimal_heads(
        model, x, held_out=other, target=Stream(direction), sources="whole", candidates=heads,
        share=1.0,
    )  # fmt: skip
    for where, column in ((x, "selection"), (other, "held_out")):
        whole = (states(where, HEADS) @ direction).sum()
        for n, share in zip(made.steps["n"], made.steps[column], strict=True):
            by_hand = (states(where, made.heads[:n]) @ direction).sum() / whole
            np.testing.assert_allclose(share, by_hand, atol=1e-5)


# -- the judgement ---------------------------------------------------------------------------------


def test_shares_and_intervals_are_those_of_the_held_out_images(rand, batches, found):
    _, judged = batches
    whole = lost_by_hand(rand, judged, HEADS)
    for n, row in zip(found.steps["n"], found.steps.to_dict("records"), strict=True):
        mine = lost_by_hand(rand, judged, found.heads[:n])
        expected = bootstrap(lambda a, b: a / b, mine, whole)
        told = [row["held_out"], row["low"], row["high"]]
        np.testing.assert_allclose(told, list(expected.as_dict().values()), atol=1e-3)
    np.testing.assert_allclose(found.whole.estimate, whole.mean(), atol=1e-4)
    assert found.held_out.estimate == found.steps["held_out"].iloc[-1]


def test_random_sets_are_as_large_and_drawn_from_all_heads(rand, batches, found):
    _, judged = batches
    assert len(found.random_sets) == 4
    for drawn in found.random_sets:
        assert len(set(drawn)) == len(found.heads)
        assert set(drawn) <= set(HEADS)
    whole = lost_by_hand(rand, judged, HEADS)
    lost = np.stack([lost_by_hand(rand, judged, drawn) for drawn in found.random_sets])
    np.testing.assert_allclose(found.random_shares, lost.sum(1) / whole.sum(), atol=1e-4)
    mine = lost_by_hand(rand, judged, found.heads)
    pooled = lost.mean(0)
    expected = bootstrap(lambda a, b: a / b, pooled, whole)
    np.testing.assert_allclose(found.random.low, expected.low, atol=1e-3)
    expected = bootstrap(lambda a, b, c: (a - b) / c, mine, pooled, whole)
    told, by_hand = found.beyond.as_dict(), expected.as_dict()
    np.testing.assert_allclose(list(told.values()), list(by_hand.values()), atol=1e-3)


def test_the_seed_draws_the_sets(rand, batches, found):
    chosen, judged = batches
    options = {"held_out": judged, "candidates": FOUR, "share": 1.0, **OPTIONS}
    again, other = (minimal_heads(rand, chosen, seed=seed, **options) for seed in (0, 1))
    assert again.random_sets == found.random_sets
    assert other.random_sets != found.random_sets
    assert other.heads == found.heads
    drawn = {head for made in (found, other) for one in made.random_sets for head in one}
    assert drawn & set(FOUR)
    assert drawn - set(FOUR)


def test_the_second_half_of_the_batches_is_held_out(rand, batches, found):
    chosen, judged = batches
    options = {"candidates": FOUR, "share": 1.0, **OPTIONS}
    split = minimal_heads(rand, [*chosen, *judged], **options)
    assert split.about["n_selection"] == 4
    assert split.about["n_held_out"] == 5
    np.testing.assert_allclose(split.to_frame(), found.to_frame(), atol=1e-5)
    # the choice knows nothing of the second half
    others = [random_inputs(rand, 2, seed=9), random_inputs(rand, 2, seed=17)]
    other = minimal_heads(rand, [*chosen, *others], **options)
    assert other.heads == split.heads
    np.testing.assert_array_equal(other.steps["selection"], split.steps["selection"])
    assert abs(other.held_out.estimate - split.held_out.estimate) > 1e-3


def test_an_odd_batch_is_for_the_choice(rand, batches):
    chosen, judged = batches
    made = minimal_heads(rand, [*chosen, judged[0]], candidates=FOUR[:1], **OPTIONS)
    assert (made.about["n_selection"], made.about["n_held_out"]) == (4, 3)


# -- the planted model -----------------------------------------------------------------------------


def test_the_planted_heads_carry_it():
    a, b = planted(6, calm=(2,)), planted(4, seed=1)
    made = minimal_heads(
        a.model, a.x, a.bank, labels=a.labels, held_out=b.x, held_out_labels=b.labels,
        end="blocks.3.hook_resid_post", sources="same-region correct", share=0.95, candidates=6,
    )  # fmt: skip
    assert set(made.heads) == {a.head("saturated"), a.head("direct"), a.head("receiver")}
    assert made.reached
    assert made.held_out.low > 0.9
    assert made.beyond.low > 0.3
    assert (made.about["n_selection"], made.about["n_held_out"]) == (5, 4)  # one has no target
    assert made.about["groups"] == ["same-region correct"]


# -- cost, memory ----------------------------------------------------------------------------------


def test_the_cost_is_an_upper_bound_of_the_forwards(rand, batches, monkeypatch):
    chosen, judged = batches
    options = {"held_out": judged, "candidates": 4, "share": 1.0, **OPTIONS}
    planned = minimal_heads(rand, chosen, dry_run=True, **options)
    assert isinstance(planned, Cost)
    assert planned.seconds > 0
    assert planned.backwards == len(chosen)
    count = []
    handle = rand.module.model.language_model.register_forward_pre_hook(lambda *_: count.append(1))
    try:
        made = minimal_heads(rand, chosen, **options)
    finally:
        handle.remove()
    assert len(count) <= planned.forwards <= 2 * len(count)
    assert made.about["cost"]["forwards"] <= planned.forwards


def test_results_do_not_depend_on_memory(rand, batches, found):
    chosen, judged = batches
    options = {"held_out": judged, "candidates": FOUR, "share": 1.0, **OPTIONS}
    narrow = minimal_heads(rand, chosen, memory=0.002, **options)
    assert narrow.about["cost"]["batch_size"] < found.about["cost"]["batch_size"]
    np.testing.assert_allclose(narrow.to_frame(), found.to_frame(), atol=1e-5)


def test_batches_states_are_not_kept_together(rand, batches, monkeypatch):
    chosen, judged = batches
    kept = []

    def watched(question, part, edits, **options):
        kept.append(sum(len(p.clean.onsets) > 0 for p in question.parts))
        return effects(question, part, edits, **options)

    effects = minimal.effects
    monkeypatch.setattr(minimal, "effects", watched)
    minimal_heads(rand, chosen, held_out=judged, candidates=FOUR, **OPTIONS)
    assert max(kept) == 1


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"share": 0}, ValueError, "above 0 and up to 1"),
        ({"share": 1.2}, ValueError, "above 0 and up to 1"),
        ({"candidates": []}, ValueError, "no candidates"),
        ({"candidates": 0}, ValueError, "no candidates"),
        ({"candidates": [(0, 6)]}, HeadError, "no head 0.6 here.* 0.0 to 2.5"),
        ({"n_random": 0}, ValueError, "at least one random set"),
        ({"held_out_labels": np.zeros(48)}, ValueError, "held_out_labels= go together"),
    ],
)
def test_what_cannot_be_is_said(rand, batches, options, error, words):
    chosen, judged = batches
    with pytest.raises(error, match=words):
        minimal_heads(rand, chosen, held_out=judged, **{**OPTIONS, **options})


def test_something_must_be_held_out(rand, batches):
    chosen, _ = batches
    with pytest.raises(ValueError, match="one batch, and nothing held out"):
        minimal_heads(rand, chosen[0], **OPTIONS)
    with pytest.raises(ValueError, match="not given"):
        minimal_heads(rand, chosen, held_out_labels=np.zeros(3), **OPTIONS)


def test_the_same_picture_is_not_held_out(rand, batches):
    chosen, judged = batches
    twice = random_inputs(rand, 2, seed=5, padding=2)  # other objects, the same pixels
    assert twice is not chosen[0]
    with pytest.raises(ValueError, match="batch 1 of those held out, row 0"):
        minimal_heads(rand, chosen, held_out=[judged[0], twice], **OPTIONS)
    with pytest.raises(ValueError, match="batch 0 of those held out, row 0"):
        minimal_heads(rand, [*chosen, chosen[0], judged[0]], **OPTIONS)


def test_where_attention_carries_nothing_there_is_no_share(rand, batches):
    chosen, judged = batches

    class Turned(AnswerLogit):
        def on(self, model, x):
            score = super().on(model, x)
            return dataclasses.replace(score, of=lambda run: -score.of(run))

    with pytest.raises(Untestable, match=r"does not lower the target on the selection images .*-"):
        minimal_heads(rand, chosen, held_out=judged, **{**OPTIONS, "target": Turned(TOKEN)})


def test_one_image_cannot_judge(rand, batches):
    chosen, _ = batches
    with pytest.raises(Untestable, match="1 of the 1 held-out images have a target, and 2 must"):
        minimal_heads(
            rand, chosen, held_out=random_inputs(rand, 1, seed=3), target=AnswerLogit(TOKEN),
            sources="whole",
        )  # fmt: skip


# -- figure, words ---------------------------------------------------------------------------------


def test_the_plot_shows_both_curves_the_sets_and_the_goal(found):
    fig = found.plot()
    by_name = {trace.name: trace for trace in fig.data if trace.name}
    assert list(by_name) == ["selection", "held out", "random sets, held out"]
    assert list(by_name["selection"].y) == [0, *found.steps["selection"]]
    assert list(by_name["held out"].y) == [0, *found.steps["held_out"]]
    assert list(by_name["random sets, held out"].y) == list(found.random_shares)
    assert fig.layout.shapes[0].y0 == found.goal
    assert fig.layout.xaxis.ticktext[1] == "+" + ".".join(map(str, found.heads[0]))
    low, high = fig.layout.yaxis.range
    assert low <= min(found.random_shares)
    assert high >= max(*found.random_shares, 1.0)


def test_it_reads_well_in_a_terminal(found):
    text = str(found)
    assert "minimal heads: logit of 34" in text
    assert "Cutting 4 of 18 heads removes" in text
    for row in found.steps.to_dict("records"):
        assert f"{row['layer']}.{row['head']}" in text
    assert "4 random sets of 4 of all 18 heads" in text
    assert "4 selection and 5 held-out images" in text
    assert max(map(len, text.split("\n"))) <= 100


def test_the_frame_is_a_copy(found):
    frame = found.to_frame()
    frame["selection"] = 0
    assert found.steps["selection"].any()
