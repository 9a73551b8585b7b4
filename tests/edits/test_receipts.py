"""Receipts against what the patterns say, and the runs around them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp import MLLM, EdgeSet, Knockout, Unmask
from interp.edits import receipts
from interp.edits.masks import EditMask
from interp.edits.receipts import Receipt, Receipts
from interp.execution import execute
from tests.zoo import ZOO, build, picture


def mass_by_hand(pattern, edges, heads) -> float:
    """Mean over edited (query, head) of the attention on `edges`, from `[batch, head, q, k]`."""
    shares = []
    for row, dst in sorted({(int(r), int(d)) for r, d, _ in edges.table}):
        keys = [int(s) for r, d, s in edges.table if (r, d) == (row, dst)]
        shares += [float(pattern[row, head, dst, keys].double().sum()) for head in heads]
    return float(np.mean(shares))


@pytest.mark.parametrize("heads", [None, [1, 4]])
def test_mass_of_a_knockout_is_what_the_edges_carried(rand, rx2, heads):
    edges = rx2.grid.edges([0, 1, 5], [9, 12]) | rx2.grid.edges(2, 7, image=1)
    name = "blocks.1.attn.hook_pattern"
    clean = rand.run(rx2, read=name)[name]
    (receipt,) = rand.run(rx2, Knockout(edges, layers=1, heads=heads)).receipts
    by_hand = mass_by_hand(clean, edges, range(6) if heads is None else heads)
    assert receipt.mass == pytest.approx(by_hand, abs=1e-6)
    assert 0.01 < receipt.mass < 0.99


def test_mass_of_an_opening_is_what_flows_through_it(rand, rx2):
    edges = rx2.grid.edges([9, 12], [0, 1])
    name = "blocks.1.attn.hook_pattern"
    run = rand.run(rx2, Unmask(edges, layers=1, heads=[0, 3]), read=name)
    by_hand = mass_by_hand(run[name], edges, [0, 3])
    assert run.receipts[0].mass == pytest.approx(by_hand, abs=1e-6)


def test_mass_is_taken_under_the_mask_the_edit_found(rand, rx):
    """The second cut's share is of what the first one left, renormalised."""
    first, second = rx.grid.edges(0, 9), rx.grid.edges(1, 9)
    name = "blocks.0.attn.hook_pattern"
    left = rand.run(rx, Knockout(first, layers=0), read=name)[name]
    receipts = rand.run(rx, Knockout(first, layers=0), Knockout(second, layers=0)).receipts
    assert receipts[1].mass == pytest.approx(mass_by_hand(left, second, range(6)), abs=1e-6)


def test_receipts_count_by_edit_and_layer(rand, rx):
    cut = rx.grid.edges([0, 1], [9, 12])
    block = rx.grid.image_block()
    receipts = rand.run(rx, Unmask(block), Knockout(cut, layers=[0, 2], heads=1)).receipts
    assert [(r.layer, r.edit.split("(")[0], r.asked, r.changed) for r in receipts] == [
        (0, "Unmask", 256, 120),  # 16 x 15 / 2 were closed
        (0, "Knockout", 4, 4),
        (1, "Unmask", 256, 120),
        (2, "Unmask", 256, 120),
        (2, "Knockout", 4, 4),
    ]


def test_receipts_without_mass_give_the_same_run(rand, rx):
    edit = Knockout(rx.grid.edges([0, 1], [9, 12]))
    with_mass, without = rand.run(rx, edit), rand.run(rx, edit, mass=False)
    assert [r.mass for r in without.receipts] == [None] * 3
    assert torch.equal(with_mass.logits, without.logits)
    assert [r.changed for r in with_mass.receipts] == [r.changed for r in without.receipts]


def test_edit_without_effect_has_mass_zero(rand, rx):
    nothing = EdgeSet.of([], 1, rx.n_pos)
    receipts = rand.run(rx, Knockout(nothing), strict=False).receipts
    assert [(r.changed, r.mass) for r in receipts] == [(0, 0.0)] * 3


def test_receipts_print_as_a_table():
    receipts = Receipts([Receipt("Knockout(...)", "blocks.2.attn.hook_mask", 2, 5, 4, 4, 0.25)])
    lines = str(receipts).splitlines()
    assert lines[0].split() == ["edit", "layer", "asked", "open", "changed", "mass", "empty_rows"]
    assert lines[1].split() == ["Knockout(...)", "2", "5", "4", "4", "0.2500", "0"]
    assert receipts.table().mass.tolist() == [0.25]
    assert str(Receipts()) == "no edits, no receipts"


def change_of(model, x, *edits, read=()):
    """`model.run(..., change=True)`."""
    return execute(model, x, edits=edits, read=model.hooks.expand(read), change=True)


@pytest.mark.parametrize("heads", [None, [1, 4], {1: [0, 5]}])
def test_size_is_the_change_of_z_from_the_same_queries_keys_and_values(rand, rx2, heads):
    edges = rx2.grid.edges([0, 1, 5], [9, 12]) | rx2.grid.edges(2, 7, image=1)
    name = "blocks.1.attn.hook_z"
    before = rand.run(rx2, read=name)[name]
    run = change_of(rand, rx2, Knockout(edges, layers=1, heads=heads), read=[name])
    by_hand = float((run[name] - before).norm() / before.norm())
    assert run.receipts[0].size == pytest.approx(by_hand, rel=1e-4)
    assert by_hand > 1e-2
    assert rand.run(rx2, Knockout(edges, layers=1)).receipts[0].size is None


def test_each_edits_size_is_beyond_that_of_the_edits_before_it(rand, rx):
    first, second = rx.grid.edges([0, 1], [9, 12]), rx.grid.edges([2, 3], [9, 12])
    name = "blocks.0.attn.hook_z"
    one = change_of(rand, rx, Knockout(first, layers=0), read=[name])
    two = change_of(rand, rx, Knockout(first, layers=0), Knockout(second, layers=0), read=[name])
    by_hand = float((two[name] - one[name]).norm() / one[name].norm())
    assert two.receipts[0].size == one.receipts[0].size
    assert two.receipts[1].size == pytest.approx(by_hand, rel=1e-4)


def test_size_and_mass_under_bounded_scores():
    """Gemma 2 bounds its scores: no SDPA kernel computes this."""
    module, processor = build("paligemma2")
    model = MLLM.load(module, processor=processor)
    x = model.prepare(picture(), ZOO["paligemma2"].prompt)
    names = "blocks.1.attn.{hook_pattern,hook_z}"
    clean = model.run(x, read=names)
    edges = x.grid.edges([0, 1], [9, 12])
    run = change_of(model, x, Knockout(edges, layers=1), read=[names])
    by_hand = mass_by_hand(clean["blocks.1.attn.hook_pattern"], edges, range(6))
    assert run.receipts[0].mass == pytest.approx(by_hand, abs=1e-6)
    before, after = (r["blocks.1.attn.hook_z"] for r in (clean, run))
    size = float((after - before).norm() / before.norm())
    assert run.receipts[0].size == pytest.approx(size, rel=1e-4)


def test_mass_of_a_function_is_what_it_closes_and_what_flows_through_what_it_opens(rand, rx):
    name = "blocks.1.attn.hook_pattern"

    def both(mask, layer):
        mask[:, 2, 12, 3:6] = False
        mask[:, 2, 12, 15] = True

    clean = rand.run(rx, read=name)[name]
    run = rand.run(rx, EditMask(both, layers=1), read=name)
    closed, opened = clean[0, 2, 12, 3:6].sum(), run[name][0, 2, 12, 15]
    assert run.receipts[0].mass == pytest.approx(float(closed + opened) / 6, abs=1e-6)


def test_mass_of_many_edges_is_the_same_in_small_blocks(rand, rx, monkeypatch):
    edit = Unmask(rx.grid.image_block())
    whole = [r.mass for r in rand.run(rx, edit).receipts]
    monkeypatch.setattr(receipts, "BLOCK", 1)
    assert [r.mass for r in rand.run(rx, edit).receipts] == pytest.approx(whole, rel=1e-6)


def test_receipts_of_two_towers_print_where(rand, rx):
    n = rx.patches.n_pos
    seen = EdgeSet.of([(0, 1, 2)], 1, n)
    run = rand.run(rx, Knockout(rx.grid.edges(0, 3)), Knockout(seen, tower="vision"))
    assert [r.hook for r in run.receipts] == [
        *(f"vision.blocks.{i}.attn.hook_mask" for i in range(2)),
        *(f"blocks.{i}.attn.hook_mask" for i in range(3)),
    ]
    assert "vision.blocks.1.attn.hook_mask" in str(run.receipts)
