"""Edge sets are sets: the algebra of Python's, the controls' counts, and a small footprint."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.edges import EdgeSet
from interp.errors import EdgeError

N_BATCH, N_POS = 2, 7
TRIPLES = st.sets(
    st.tuples(st.integers(0, N_BATCH - 1), st.integers(0, N_POS - 1), st.integers(0, N_POS - 1))
)


def edge_set(triples) -> EdgeSet:
    return EdgeSet.of(triples, N_BATCH, N_POS)


def as_set(edges: EdgeSet) -> set[tuple[int, int, int]]:
    return {(int(r), int(s), int(d)) for r, d, s in edges.table}


def everything() -> EdgeSet:
    return EdgeSet.from_mask(np.ones((N_BATCH, N_POS, N_POS), dtype=bool))


@given(TRIPLES, TRIPLES)
@settings(max_examples=60)
def test_algebra_is_that_of_python_sets(a, b):
    x, y = edge_set(a), edge_set(b)
    assert as_set(x) == a
    assert as_set(x | y) == a | b
    assert as_set(x & y) == a & b
    assert as_set(x - y) == a - b
    assert len(x) == len(a)
    assert (x == y) == (a == b)
    assert as_set(x.causal()) == {(r, s, d) for r, s, d in a if s <= d}


@given(TRIPLES)
@settings(max_examples=30)
def test_equal_sets_hash_and_print_alike_however_they_were_made(a):
    forwards, backwards = edge_set(sorted(a)), edge_set([*sorted(a, reverse=True), *a])
    assert forwards == backwards
    assert hash(forwards) == hash(backwards)
    assert repr(forwards) == repr(backwards)
    assert EdgeSet.from_mask(forwards.to_mask()) == forwards
    assert EdgeSet.from_json(json.loads(json.dumps(forwards.to_json()))) == forwards


def test_mask_has_queries_in_rows_and_keys_in_columns():
    mask = edge_set([(1, 2, 5)]).to_mask()
    assert mask.nonzero().tolist() == [[1, 5, 2]]


def test_sets_of_other_batches_differ_and_do_not_combine():
    one, other = EdgeSet.of([(0, 1, 2)], 1, 7), EdgeSet.of([(0, 1, 2)], 1, 8)
    assert one != other
    assert one != "edges"
    for combine in (EdgeSet.__or__, EdgeSet.__and__, EdgeSet.__sub__, EdgeSet.random_like):
        with pytest.raises(EdgeError, match=r"1 x 7 positions\) and .*1 x 8 .*different batches"):
            combine(one, other)


@pytest.mark.parametrize(
    ("triple", "says"),
    [
        ((0, 7, 3), "edge src=7 -> dst=3 in row 0 is out of range.*rows 0..1 and positions 0..6"),
        ((0, 3, 7), "src=3 -> dst=7"),
        ((2, 1, 1), "in row 2 is out of range"),
        ((0, -1, 1), "src=-1"),
        ((0, 1.5, 2), "whole numbers"),
        ((0, 1), r"whole numbers \[n_edges, 3\], not int64 \[1, 2\]"),
    ],
)
def test_edge_that_does_not_exist_is_refused(triple, says):
    with pytest.raises(EdgeError, match=says):
        edge_set([triple])


@pytest.mark.parametrize(
    "mask", [torch.ones(1, 4, 4), np.ones((4, 4), bool), np.ones((1, 3, 4), bool)]
)
def test_mask_of_the_wrong_kind_is_refused(mask):
    with pytest.raises(EdgeError, match=r"bool mask \[batch, dst, src\]"):
        EdgeSet.from_mask(mask)


def test_table_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        edge_set([(0, 1, 2)]).table[0, 0] = 1


# -- controls --------------------------------------------------------------------------------------


@given(TRIPLES, st.integers(0, 5))
@settings(max_examples=60)
def test_random_like_keeps_each_querys_count_and_draws_from_candidates_only(a, seed):
    edges = edge_set(a)
    candidates = everything()
    control = edges.random_like(candidates, seed=seed)
    assert as_set(control) <= as_set(candidates)
    for mine, its in zip(edges.queries, control.queries, strict=True):
        assert np.array_equal(mine, its)


def test_random_like_is_seeded_and_uses_every_candidate():
    edges = edge_set([(0, s, 6) for s in range(3)] + [(1, 0, 4)])
    candidates = everything() - edges
    draws = [edges.random_like(candidates, seed=seed) for seed in range(300)]
    assert draws[0] == edges.random_like(candidates, seed=0)
    assert len(set(draws)) == 4 * 6  # all the controls there are
    reachable = {(r, s, d) for r, s, d in as_set(candidates) if (r, d) in {(0, 6), (1, 4)}}
    assert set().union(*map(as_set, draws)) == reachable
    assert not as_set(draws[0]) & as_set(edges)


def test_random_like_draws_every_candidate_equally_often():
    edges = EdgeSet.of([(0, 0, 9), (0, 1, 9)], 1, 10)
    candidates = EdgeSet.of([(0, s, 9) for s in range(8)], 1, 10)
    counts = np.zeros(8)
    for seed in range(800):
        counts[edges.random_like(candidates, seed=seed).src] += 1
    # 200 draws expected a candidate, standard deviation 12.2: five of them
    assert np.abs(counts - 200).max() < 61


def test_random_like_refuses_too_few_candidates_unless_allowed():
    edges = edge_set([(0, 0, 6), (0, 1, 6), (0, 0, 5)])
    candidates = edge_set([(0, 2, 6), (0, 2, 5), (0, 3, 5)])
    with pytest.raises(EdgeError, match="only 2 candidate edges for a control of 3"):
        edges.random_like(candidates)
    assert len(edges.random_like(candidates, allow_fewer=True)) == 2


def test_a_million_edges_stay_under_50_megabytes():
    rng = np.random.default_rng(0)
    table = rng.integers(0, [4, 2000, 2000], (1_000_000, 3), dtype=np.int32)
    tracemalloc.start()
    edges = EdgeSet(table, 4, 2000)
    edges.queries  # noqa: B018  (held after its first use)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(edges) > 900_000
    assert held < 50e6
