"""Positions: every way to say them means the same set, where it fits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp.edits.positions import Positions
from interp.errors import PositionError

ALL = np.ones((3, 6), dtype=bool)
PAIRS = st.sets(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=1)


@given(PAIRS)
def test_pairs_masks_and_arrays_select_the_same(pairs):
    dense = torch.zeros(3, 6, dtype=torch.bool)
    for row, position in pairs:
        dense[row, position] = True
    for said in (list(pairs), np.array(sorted(pairs)), torch.tensor(sorted(pairs)), dense):
        assert torch.equal(Positions.of(said).mask(ALL), dense)
    assert Positions.of(sorted(pairs)) == Positions.of(sorted(pairs, reverse=True))
    assert Positions.of(dense) == Positions.of(dense.numpy())


@given(st.sets(st.integers(0, 5), min_size=1))
def test_numbers_are_meant_in_every_row(numbers):
    mask = Positions.of(list(numbers)).mask(ALL)
    assert mask.any(0).nonzero()[:, 0].tolist() == sorted(numbers)
    assert torch.equal(mask, mask[:1].expand(3, -1))
    assert Positions.of(range(6)) == Positions.of(np.arange(6)) == Positions.of(tuple(range(6)))


def test_a_grid_selects_its_tokens_and_remembers_its_extent(rx2):
    positions = Positions.of(rx2.grid)
    assert torch.equal(
        positions.mask(np.ones((2, 24), dtype=bool)), torch.from_numpy(rx2.grid.is_image)
    )
    with pytest.raises(PositionError, match=r"made for 2 x 24 positions, but .* has 3 x 6"):
        positions.mask(ALL)


@pytest.mark.parametrize("said", [[4, 2], 3, [(1, 2), (0, 4)], np.eye(3, 6) > 0])
def test_positions_come_back_from_json(said):
    positions = Positions.of(said)
    back = Positions.from_json(json.loads(json.dumps(positions.to_json())))
    assert back == positions
    assert hash(back) == hash(positions)
    assert torch.equal(back.mask(ALL), positions.mask(ALL))


def test_positions_that_differ_are_not_equal():
    made = [Positions.of(s) for s in ([1], [(0, 1)], [2], [(1, 1)], np.eye(2, 6, 1) > 0)]
    assert len(set(made)) == len(made)
    assert Positions.of([(0, 1), (1, 2)]) != Positions.of(np.eye(2, 6, 1) > 0)  # fits only 2 x 6


def test_positions_print_short():
    assert repr(Positions.of(range(100))) == "<100 positions in every row, 0..99>"
    assert repr(Positions.of(np.ones((1, 9)) > 0)) == "<9 positions in 1 row, 0..8>"


def test_padding_is_refused_and_left_out_of_nothing():
    attended = ALL.copy()
    attended[1, :2] = False
    with pytest.raises(PositionError, match=r"1 of these .* padding, the first is position 1 of r"):
        Positions.of([1, 3]).mask(attended)
    assert Positions.of([(0, 1), (1, 3)]).mask(attended).sum() == 2
    assert Positions.of(None) is None
