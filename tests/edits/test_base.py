"""What all edits have in common: windows, indices, kinds, repr, JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from interp import Ablate, EdgeSet, Knockout, Patch, Scale, Steer, Unmask
from interp.edits.base import edit_from_json, indices, kinds, window
from interp.errors import HeadError


@pytest.mark.parametrize(
    ("center", "width", "layers"),
    [(10, 5, [8, 9, 10, 11, 12]), (4, 1, [4]), (1, 5, [0, 1, 2, 3]), (0, 3, [0, 1])],
)
def test_a_window_is_centred_and_cut_off_at_the_first_layer(center, width, layers):
    assert list(window(center, width)) == layers


@pytest.mark.parametrize(("center", "width"), [(3, 2), (3, 0), (3, -1), (-1, 3)])
def test_a_window_without_a_centre_is_refused(center, width):
    with pytest.raises(HeadError, match="odd number of layers"):
        window(center, width)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (3, (3,)),
        ([5, 1, 5], (1, 5)),
        (range(2, 5), (2, 3, 4)),
        (np.array([2, 0]), (0, 2)),
        (torch.tensor([4, 4]), (4,)),
        ({7, 6}, (6, 7)),
    ],
)
def test_indices_are_sorted_and_without_doubles(value, expected):
    assert indices(value, "layers") == expected


@pytest.mark.parametrize("value", [[], -1, [0, -2], 1.0, "3", [True], torch.tensor([0.5])])
def test_indices_that_are_none_are_refused(value):
    with pytest.raises(HeadError, match="heads"):
        indices(value, "heads")


def test_all_kinds_are_known_by_name():
    every = (Ablate, Knockout, Patch, Scale, Steer, Unmask)
    assert {kind.__name__: kind for kind in every}.items() <= kinds().items()
    assert not {"Edit", "ValueEdit", "MaskEdit", "EdgeEdit"} & set(kinds())


def test_edits_of_every_kind_come_back_from_json():
    edges = EdgeSet.of([(0, 1, 3)], 1, 8)
    edits = [
        Knockout(edges, layers=[1, 2], heads=0),
        Unmask(edges),
        Ablate("blocks.1.attn.hook_z", heads=[1]),
        Steer("blocks.1.hook_resid_post", torch.ones(4), 2.0),
        Scale("blocks.1.hook_resid_post", 0.5),
    ]
    back = [edit_from_json(json.loads(json.dumps(edit.to_json()))) for edit in edits]
    assert back == edits
    assert [type(edit) for edit in back] == [type(edit) for edit in edits]
    assert len(set(back) | set(edits)) == 5


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"no edit 'Ablat'; there are .*'Ablate'"):
        edit_from_json({"edit": "Ablat"})


def test_edits_are_frozen():
    with pytest.raises(AttributeError):
        Scale("blocks.1.hook_resid_post", 0.5).factor = 2.0
