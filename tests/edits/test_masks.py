"""Mask edits as values, and every way in which an edit that does nothing is refused."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from interp import EdgeSet, Knockout, Unmask
from interp.edits.base import edit_from_json, window
from interp.edits.book import MaskBook
from interp.edits.masks import EditMask
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
@pytest.mark.parametrize(
    "where",
    [
        {},
        {"layers": range(1, 3)},
        {"layers": 2, "heads": (3, 1, 1)},
        {"layers": window(center=1, width=3)},
        {"heads": {2: [3, 1], 0: 1}},
        {"tower": "vision", "layers": 0},
    ],
)
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


def test_heads_by_layer_say_the_layers_too():
    edit = Knockout(EDGES, heads={2: [1, 3], 0: 2})
    assert edit.layers == (0, 2)
    assert [edit.heads_at(layer) for layer in (0, 2)] == [(2,), (1, 3)]
    assert [edit.applies(layer) for layer in range(3)] == [True, False, True]
    assert repr(edit).endswith("layers=[0, 2], heads={0: [2], 2: [1, 3]})")
    assert Knockout(EDGES, layers=[0, 2], heads={0: 2, 2: [1, 3]}) == edit
    with pytest.raises(HeadError, match=r"says the layers already, and layers=.1. are"):
        Knockout(EDGES, layers=1, heads={0: 2})
    for wrong, says in (({}, "edits nothing"), ({1: None}, "say which heads of layer 1")):
        with pytest.raises(HeadError, match=says):
            Knockout(EDGES, heads=wrong)
    with pytest.raises(HeadError, match="no head 4; its 4 heads"):
        book(Knockout(EDGES, heads={0: 1, 2: 4}))
    with pytest.raises(HeadError, match="no layer 3; its 3 layers"):
        book(Knockout(EDGES, heads={3: 1}))


def test_heads_by_layer_are_edited_in_their_layers():
    made = book(Knockout(EDGES, heads={0: 2, 2: [1, 3]}))
    base = made.causal(torch.device("cpu"))
    cut = {layer: (base ^ made.mask(base, layer)[0]).any(-1).any(-1).tolist() for layer in (0, 2)}
    assert cut == {0: [[False, False, True, False]], 2: [[False, True, False, True]]}


def test_edit_names_the_hooks_at_which_it_acts(rand):
    assert Knockout(EDGES, heads={2: 1}).names(rand) == ["blocks.2.attn.hook_mask"]
    on_path = [f"vision.blocks.{layer}.attn.hook_mask" for layer in (0, 1)]  # not the last
    assert Knockout(EDGES, tower="vision").names(rand) == on_path


def test_unknown_tower_is_refused():
    with pytest.raises(ValueError, match="tower='adapter'; there are 'language' and 'vision'"):
        Knockout(EDGES, tower="adapter")


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
    with pytest.raises(ValueError, match=r"no edit 'Nudge'; there are .*'EditMask', 'Knockout'"):
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


class Allocations(TorchDispatchMode):
    """Counts the tensors of a mask's size, by shape, that come out of torch's functions."""

    def __init__(self, n_pos):
        super().__init__()
        self.n_pos, self.shapes = n_pos, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape[-2:] == (self.n_pos, self.n_pos):
            known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            if out.untyped_storage().data_ptr() not in known:
                self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize(("heads", "n_heads"), [(None, 1), ([1, 3], 4)])
def test_masks_of_a_run_are_made_once_and_by_head_only_where_heads_differ(heads, n_heads):
    base = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    two = EdgeSet(EDGES.table, 2, 6)
    made = MaskBook([Knockout(two, heads=heads)], 30, 4, np.ones((2, 6), dtype=bool))
    with Allocations(6) as seen:
        masks = [made.mask(base, layer)[0] for layer in range(30)]
    assert len({id(mask) for mask in masks}) == 1
    assert seen.shapes == [(2, n_heads, 6, 6)]


def test_float_masks_come_back_as_float_masks_made_once():
    lowest = torch.finfo(torch.float32).min
    base = torch.ones(1, 1, 6, 6).tril().sub(1).mul(-lowest)
    made = book(Knockout(EDGES, layers=[0, 2]))
    masks = [made.mask(base, layer)[0] for layer in (0, 2)]
    assert masks[0] is masks[1]
    changed = (masks[0] != base).nonzero().tolist()
    assert changed == [[0, 0, 3, 0], [0, 0, 3, 1]]
    assert set(masks[0].unique().tolist()) == {0.0, lowest}
    with pytest.raises(TypeError, match="is a bias, not a mask"):
        made.mask(base + 0.5, 0)
    with pytest.raises(EmptyRow, match="attends to everything alike in eager attention"):
        book(Knockout(ALL_OF_3), allow_empty_rows=True).mask(base, 0)


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


# -- masks by a function --------------------------------------------------------------------------


def near(mask, layer):
    """Only the last two keys; in place."""
    mask &= torch.ones_like(mask).triu(-1 - layer)


def in_head_2(mask, layer):
    mask = mask.clone()
    mask[:, 2, 5, 1:] = False
    mask[:, 2, 2, 4] = True
    return mask


def test_edit_mask_in_place_or_returned():
    base = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    mask, (effect,) = apply(EditMask(near), base=base)
    assert mask.shape == (1, 1, 6, 6)  # all heads alike
    assert torch.equal(mask[0, 0], base[0, 0].triu(-1))
    assert (effect.asked, effect.changed, effect.open) == (10, 10, 10)
    mask, (effect,) = apply(EditMask(in_head_2), base=base)
    assert (mask ^ base).any(-1).any(-1).tolist() == [[False, False, True, False]]
    assert (effect.changed, effect.open) == (6, 5)  # 5 closed, 1 opened
    assert torch.equal(base, torch.ones_like(base).tril())


def test_edit_mask_is_asked_layer_by_layer():
    made = book(EditMask(near, layers=[0, 1]), Knockout(EDGES, layers=[1, 2]))
    base = made.causal(torch.device("cpu"))
    masks = [made.mask(base, layer)[0] for layer in range(3)]
    assert [int(mask[0, 0, 5].sum()) for mask in masks] == [2, 3, 6]
    assert [bool(mask[0, 0, 3, 1]) for mask in masks] == [False, False, False]
    assert [bool(mask[0, 0, 2, 0]) for mask in masks] == [False, True, True]


@pytest.mark.parametrize(
    ("fn", "error", "says"),
    [
        (lambda mask, layer: mask.float(), TypeError, r"returned torch.float32 \[1, 4, 6, 6\] in"),
        (lambda mask, layer: mask[0], TypeError, r"returned torch.bool \[4, 6, 6\] in layer 0"),
        (lambda mask, layer: 0, TypeError, "returned int in layer 0; a mask is bool"),
        (lambda mask, layer: None, EditHadNoEffect, "gave the masks back as they were"),
        (lambda mask, layer: mask.clone(), EditHadNoEffect, "gave the masks back as they were"),
        (lambda mask, layer: mask.triu(2), EmptyRow, "leaves 6 queries with no key.*position 0 of"),
    ],
)
def test_functions_that_make_no_mask_or_no_difference_are_refused(fn, error, says):
    with pytest.raises(error, match=says):
        apply(EditMask(fn))


def test_edit_mask_with_empty_rows_where_allowed():
    _, (effect,) = apply(EditMask(lambda mask, layer: mask.triu(2)), allow_empty_rows=True)
    assert effect.empty_rows == 6


def test_edit_mask_goes_through_json_by_the_name_of_its_function():
    edit = EditMask(near, layers=[0, 2], tower="vision")
    assert edit.to_json()["fn"].endswith("test_masks:near")
    again = edit_from_json(json.loads(json.dumps(edit.to_json())))
    assert again == edit
    assert hash(again) == hash(edit)
    assert repr(edit) == "EditMask(near, layers=[0, 2], tower='vision')"
    with pytest.raises(TypeError, match="define it with def at the top of a module"):
        EditMask(lambda mask, layer: None).to_json()
    with pytest.raises(TypeError, match="takes a function"):
        EditMask(EDGES)


def test_edit_mask_cuts_what_a_knockout_of_the_same_edges_cuts(rand, rx):
    edges = rx.grid.edges([0, 1, 5], [9, 12])
    at = edges.to_mask()[:, None]
    cut = rand.run(rx, Knockout(edges, layers=[0, 2]))
    made = rand.run(rx, EditMask(lambda mask, layer: mask & ~at, layers=[0, 2]))
    assert torch.equal(cut.logits, made.logits)
    for one, other in zip(cut.receipts, made.receipts, strict=True):
        assert (one.asked, one.open, one.changed) == (other.asked, other.open, other.changed)
        assert one.mass == pytest.approx(other.mass, abs=1e-7)
