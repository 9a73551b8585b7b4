"""Mask edits as values, and every way in which an edit that does nothing is refused."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from interp import EdgeSet, Knockout, Unmask
from interp.edits.base import edit_from_json
from interp.edits.masks import MaskBook
from interp.errors import EdgeError, EditHadNoEffect, EmptyRow, HeadError
from tests.conftest import random_inputs

EDGES = EdgeSet.of([(0, 1, 3), (0, 0, 3)], 1, 6)
LATER = EdgeSet.of([(0, 4, 2)], 1, 6)


def book(*edits, **options) -> MaskBook:
    return MaskBook(edits, 3, 4, np.ones((1, 6), dtype=bool), **options)


def apply(*edits, base=None, layer=0, **options):
    """(mask, effects) of one layer of a 6-position causal model."""
    made = book(*edits, **options)
    result = made.mask(made.causal(torch.device("cpu")) if base is None else base, layer)
    made.require_effects()
    return result


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Knockout, Unmask])
@pytest.mark.parametrize("where", [{}, {"layers": range(1, 3)}, {"layers": 2, "heads": (3, 1, 1)}])
def test_edit_compares_hashes_and_goes_through_json(kind, where):
    edit = kind(EDGES, **where)
    again = edit_from_json(json.loads(json.dumps(edit.to_json())))
    assert again == edit
    assert hash(again) == hash(edit)
    assert repr(again) == repr(edit)
    assert edit != (Unmask if kind is Knockout else Knockout)(EDGES, **where)
    assert edit != kind(LATER, **where)


def test_edit_prints_as_the_call_that_made_it():
    edges = "EdgeSet(2 edges, 1 query, 1 x 6 positions)"
    assert (
        repr(Knockout(EDGES, layers=1, heads=[2, 0]))
        == f"Knockout({edges}, layers=[1], heads=[0, 2])"
    )


def test_edit_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Knockout(EDGES).layers = (1,)


@pytest.mark.parametrize("one", [1, np.int64(1), [1], np.array([1]), range(1, 2), {1}, iter([1])])
def test_layers_and_heads_take_any_whole_numbers(one):
    assert Knockout(EDGES, layers=one).layers == (1,)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], r"heads=\[\] edits nothing; leave heads out to mean all"),
        (-1, "heads are whole numbers from 0, not -1"),
        ([0, 1.5], "not 1.5"),
        ("12", "not '1'"),
        ([True], "not True"),
    ],
)
def test_layers_and_heads_of_the_wrong_kind_are_refused(value, says):
    with pytest.raises(HeadError, match=says):
        Knockout(EDGES, heads=value)


def test_edit_takes_an_edge_set():
    with pytest.raises(EdgeError, match=r"Knockout takes an EdgeSet, not list; x\.grid\.edges"):
        Knockout([(0, 1, 2)])


def test_unknown_edit_in_json_is_refused():
    with pytest.raises(ValueError, match=r"no edit 'Nudge'; there are \['Knockout', 'Unmask'\]"):
        edit_from_json({"edit": "Nudge"})


# -- masks -----------------------------------------------------------------------------------------


def test_mask_is_by_head_only_where_heads_differ_and_never_the_base_itself():
    base = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    untouched = base.clone()
    mask, (effect,) = apply(Knockout(EDGES), base=base)
    assert mask.shape == (1, 1, 6, 6)
    assert (base ^ mask).nonzero().tolist() == [[0, 0, 3, 0], [0, 0, 3, 1]]
    assert (effect.changed, effect.empty_rows) == (2, 0)
    mask, _ = apply(Knockout(EDGES, heads=[1, 3]), base=base)
    assert (base ^ mask).any(-1).any(-1).tolist() == [[False, True, False, True]]
    assert torch.equal(base, untouched)


def test_layers_with_the_same_edits_share_one_mask():
    made = book(Knockout(EDGES, layers=[0, 1]), Knockout(EDGES - EDGES | EDGES, layers=2))
    base = made.causal(torch.device("cpu"))
    masks = [made.mask(base, layer)[0] for layer in range(3)]
    assert masks[0] is masks[1]
    assert masks[0] is not masks[2]
    other = base.clone()
    other[..., 5, 5] = False  # a layer with another base (a sliding window, say)
    assert not made.mask(other, 1)[0][0, 0, 5, 5]


def test_edits_apply_in_the_order_given():
    closed = apply(Unmask(LATER), Knockout(LATER))[0]
    assert not closed[0, 0, 2, 4]
    reopened = apply(Knockout(EDGES), Unmask(EDGES))[0]
    assert reopened[0, 0, 3, :2].all()
    with pytest.raises(EdgeError, match="closed already"):
        apply(Knockout(LATER), Unmask(LATER))


# -- edits that do nothing -------------------------------------------------------------------------

NOTHING = EdgeSet.of([], 1, 6)


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ([Unmask(EDGES)], "every edge was open already; pass strict=False"),
        ([Unmask(LATER), Unmask(LATER)], "every edge was open already"),
        ([Knockout(NOTHING)], "it holds no edges"),
        ([Unmask(NOTHING)], "it holds no edges"),
    ],
)
def test_edit_without_effect_raises_unless_lax(edits, says):
    with pytest.raises(EditHadNoEffect, match=says):
        apply(*edits)
    _, effects = apply(*edits, strict=False)
    assert effects[-1].changed == 0


@pytest.mark.parametrize(
    ("edits", "why"),
    [
        ([Knockout(LATER)], r"src comes after dst, and edges\.causal\(\) drops"),
        ([Knockout(EDGES | LATER)], "src comes after dst"),
        ([Knockout(EDGES), Knockout(EDGES)], "an earlier edit of this run"),
        ([Knockout(EDGES, heads=0), Knockout(EDGES, heads=[0, 1])], "an earlier edit"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_cutting_a_closed_edge_raises(edits, why, strict):
    says = rf"closed already.*the first is src=\d -> dst=\d in row 0: {why}"
    with pytest.raises(EdgeError, match=says):
        apply(*edits, strict=strict)


@pytest.mark.parametrize("edit", [Knockout, Unmask])
def test_padding_can_neither_be_cut_nor_seen(rand, rx2, edit):
    into_padding = EdgeSet.of([(1, 0, 12)], 2, rx2.n_pos)  # row 1 begins with 3 padding positions
    with pytest.raises(EdgeError, match="have a src that is padding, the first in row 1"):
        rand.run(rx2, edit(into_padding))


def test_an_edit_after_everything_that_is_read_is_refused(rand, rx):
    edges = rx.grid.edges(src=1, dst=5)
    early = "blocks.0.hook_resid_post"
    with pytest.raises(EditHadNoEffect, match=r"acts from blocks\.2 on, after everything"):
        rand.run(rx, Knockout(edges, layers=2), read=early, logits=False)
    rand.run(rx, Knockout(edges, layers=[0, 2]), read=early, logits=False)
    rand.run(rx, Knockout(edges, layers=2), read=early)  # the logits see it


@pytest.mark.parametrize(
    ("where", "says"),
    [
        (
            {"layers": 3},
            r"layers=\[3\]\): the language model has no layer 3; its 3 layers are 0\.\.2",
        ),
        ({"heads": [0, 6]}, r"the language model has no head 6; its 6 heads are 0\.\.5"),
    ],
)
def test_head_or_layer_that_does_not_exist_raises(rand, rx, where, says):
    with pytest.raises(HeadError, match=says):
        rand.run(rx, Knockout(rx.grid.edges(1, 3), **where))


def test_edges_made_for_another_run_raise(rand, rx, rx2):
    one, two = rx.grid.edges(1, 3), rx2.grid.edges(1, 3)
    with pytest.raises(EdgeError, match="made for 1 x 21 positions, but this run has 2 x 24"):
        rand.run(rx2, Knockout(one))
    with pytest.raises(EdgeError, match="made for 2 x 24 positions, but this run has 1 x 21"):
        rand.run(rx, Knockout(two))


def test_edges_of_one_row_do_not_spread_over_a_batch(rand):
    """A mask of one row would broadcast over all rows without a word."""
    one, two = random_inputs(rand), random_inputs(rand, 2)
    with pytest.raises(EdgeError, match="made for 1 x 21 positions, but this run has 2 x 21"):
        rand.run(two, Knockout(one.grid.edges(1, 3)))


# -- empty rows ------------------------------------------------------------------------------------

ALL_OF_3 = EdgeSet.of([(0, src, 3) for src in range(4)], 1, 6)


def test_query_left_with_no_key_raises_unless_allowed():
    with pytest.raises(EmptyRow, match=r"leaves 1 queries with no key.* position 3 of row 0"):
        apply(Knockout(ALL_OF_3, heads=2))
    mask, (effect,) = apply(Knockout(ALL_OF_3, heads=2), allow_empty_rows=True)
    assert effect.empty_rows == 1
    assert mask[0, :, 3].any(-1).tolist() == [True, True, False, True]


def test_rows_that_were_empty_before_are_not_the_edits_doing():
    base = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].clone()
    base[..., :2] = False  # two positions of padding: they see nothing
    edges = EdgeSet.of([(0, 2, 4)], 1, 6)
    assert apply(Knockout(edges), base=base)[1][0].empty_rows == 0
