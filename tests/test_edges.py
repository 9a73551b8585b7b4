"""Edge sets are sets: the algebra of Python's, the controls' counts, and a small footprint."""

from __future__ import annotations

import itertools
import json
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from interp import matching
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
    assert as_set(x.without_self()) == {(r, s, d) for r, s, d in a if s != d}
    assert as_set(x.of_row(1)) == as_set(x.of_row(-1)) == {edge for edge in a if edge[0] == 1}
    assert x.of_row(0).n_batch == N_BATCH
    assert list(x) == sorted(a, key=lambda e: (e[0], e[2], e[1]))
    assert [edge in x for edge in everything()] == [edge in a for edge in everything()]


@given(TRIPLES)
@settings(max_examples=30)
def test_equal_sets_hash_and_print_alike_however_they_were_made(a):
    forwards, backwards = edge_set(sorted(a)), edge_set([*sorted(a, reverse=True), *a])
    assert forwards == backwards
    assert hash(forwards) == hash(backwards)
    assert repr(forwards) == repr(backwards)
    assert EdgeSet.from_mask(forwards.to_mask()) == forwards
    assert EdgeSet.from_json(json.loads(json.dumps(forwards.to_json()))) == forwards


@given(st.sets(st.integers(0, 6)), st.sets(st.integers(0, 6)), st.sets(st.integers(0, 6)))
@settings(max_examples=30)
def test_between_takes_every_pair_within_a_row(first, second, queries):
    src, dst = np.zeros((2, N_BATCH, N_POS), dtype=bool)
    src[0, list(first)] = src[1, list(second)] = dst[:, list(queries)] = True
    naive = {(row, s, d) for row, keys in enumerate((first, second)) for s in keys for d in queries}
    assert as_set(EdgeSet.between(src, dst)) == naive


@given(TRIPLES, st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_where_keeps_what_every_head_leaves_open(a, seed):
    mask = np.random.default_rng(seed).random((N_BATCH, 3, N_POS, N_POS)) < 0.8
    x = edge_set(a)
    assert as_set(x.where(mask)) == {(r, s, d) for r, s, d in a if mask[r, :, d, s].all()}
    assert as_set(x.where(mask[:, 1])) == {(r, s, d) for r, s, d in a if mask[r, 1, d, s]}
    assert as_set(x.where(torch.tensor(mask[:1]))) == {
        (r, s, d) for r, s, d in a if mask[0, :, d, s].all()
    }


@given(TRIPLES, st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_attention_is_the_mean_over_heads_and_mass_its_sum_a_query(a, seed):
    pattern = np.random.default_rng(seed).random((N_BATCH, 3, N_POS, N_POS))
    x, naive = edge_set(a), {(r, s, d): pattern[r, :, d, s].mean() for r, s, d in a}
    assert x.attention(pattern) == pytest.approx([naive[edge] for edge in x])
    assert x.attention(torch.tensor(pattern[:, 2])) == pytest.approx(
        [pattern[r, 2, d, s] for r, s, d in x]
    )
    queries = sorted({(r, d) for r, _, d in a})
    sums = [sum(v for e, v in naive.items() if (e[0], e[2]) == q) for q in queries]
    assert x.mass(pattern) == pytest.approx(sums)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda e: e.where(np.zeros((2, 7, 7))), r"True or False, not float64; compare first"),
        (lambda e: e.where(torch.zeros(2, 7, 7)), "not float32"),
        (lambda e: e.where(np.ones((7, 7), bool)), r"shape \[7, 7\] for .*\[2, 7, 7\] would do"),
        (lambda e: e.where(np.ones((3, 7, 7), bool)), r"shape \[3, 7, 7\]"),
        (lambda e: e.where(np.ones((2, 7, 8), bool)), r"shape \[2, 7, 8\]"),
        (lambda e: e.attention(np.ones((2, 4, 8, 8))), r"a pattern of shape \[2, 4, 8, 8\]"),
        (lambda e: e.mass(np.full((2, 7, 7), np.nan)), "no number on edge src=1 -> dst=2 in row 0"),
        (lambda e: e.of_row(2), r"row 2 of a batch whose rows are 0\.\.1"),
        (lambda e: (1, 2) in e, r"a tuple \(row, src, dst\), not \(1, 2\)"),
        (lambda e: EdgeSet.between(np.ones((2, 7)), np.ones((2, 7), bool)), r"not between float64"),
        (lambda e: EdgeSet.between(np.ones((2, 7), bool), np.ones((1, 7), bool)), r"\[1, 7\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, says):
    with pytest.raises(EdgeError, match=says):
        call(edge_set([(0, 1, 2)]))


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


# -- controls by distance --------------------------------------------------------------------------


def optimal(wanted, there, tolerance):
    """(edges served, least sum of deviations) by trying every assignment."""
    best = (0, 0.0)
    for n in range(min(len(wanted), len(there)), 0, -1):
        sums = [
            sum(abs(w - c) for w, c in zip(some, perm))
            for some in itertools.combinations(wanted, n)
            for perm in itertools.permutations(there, n)
            if all(abs(w - c) <= tolerance for w, c in zip(some, perm))
        ]
        if sums:
            return n, min(sums)
    return best


@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=4),
    st.lists(st.integers(0, 8), max_size=5),
    st.sampled_from([0, 1, 2, 20]),
    st.integers(0, 5),
)
@settings(max_examples=120)
def test_distance_serves_as_many_as_any_assignment_could_and_as_closely(
    wanted, there, tolerance, seed
):
    """Against every assignment there is; lengths are handed in, several edges may share one."""
    n = len(wanted)
    edges = EdgeSet.of([(0, i, 15) for i in range(n)], 1, 16)
    pool = EdgeSet.of([(0, n + i, 15) for i in range(len(there))], 1, 16)
    length = np.array([*wanted, *there], dtype=float)
    control = edges.random_like(
        pool,
        match="distance",
        distance=lambda e: length[e.src],
        tolerance=tolerance,
        seed=seed,
        allow_fewer=True,
    )
    drawn = [there[s - n] for s in control.src]
    count, total = optimal(wanted, there, tolerance)
    assert len(control) == count
    assert optimal(wanted, drawn, tolerance) == (count, pytest.approx(total, abs=1e-5))


@given(TRIPLES, st.integers(0, 5))
@settings(max_examples=60)
def test_distance_in_positions_keeps_counts_and_the_tolerance(a, seed):
    edges = edge_set(a)
    control = edges.random_like(
        everything(), match="distance", tolerance=3, seed=seed, allow_fewer=True
    )
    assert not as_set(control) & a
    mine, its = per_query(edges), per_query(control)
    for query, sources in its.items():
        row, dst = query
        lengths = [abs(dst - s) for s in mine[query]]
        there = [abs(dst - s) for s in range(N_POS) if (row, s, dst) not in a]
        count, total = optimal_sorted(lengths, there, 3)
        assert len(sources) == count
        found = [abs(dst - s) for s in sources]
        assert optimal_sorted(lengths, found, 3) == (count, pytest.approx(total, abs=1e-5))


def per_query(edges: EdgeSet) -> dict[tuple[int, int], list[int]]:
    out: dict[tuple[int, int], list[int]] = {}
    for row, src, dst in edges:
        out.setdefault((row, dst), []).append(src)
    return out


def optimal_sorted(wanted, there, tolerance):
    """As `optimal`, by SciPy's assignment."""
    cost = np.abs(np.subtract.outer(np.array(wanted, float), np.array(there, float)))
    cost = np.where(cost <= tolerance, cost, 1e6)
    at = linear_sum_assignment(cost)
    fits = cost[at] < 1e6
    return int(fits.sum()), float(cost[at][fits].sum())


def test_distance_in_many_queries_is_the_optimum_of_each():
    """Sizes that differ, several chunks, padding of the tables: SciPy query by query."""
    rng = np.random.default_rng(3)
    mask = np.zeros((2, 60, 60), dtype=bool)
    for row, dst in itertools.product(range(2), range(1, 60)):
        mask[row, dst, rng.choice(dst, rng.integers(0, dst // 2 + 1), replace=False)] = True
    edges = EdgeSet.from_mask(mask)
    lengths = np.round(rng.random((60, 60)) * 6, 1)
    old, matching.CHUNK = matching.CHUNK, 5000
    try:
        control = edges.random_like(
            match="distance",
            distance=lambda e: lengths[e.dst, e.src],
            tolerance=0.75,
            allow_fewer=True,
        )
    finally:
        matching.CHUNK = old
    mine, its = per_query(edges), per_query(control)
    assert len(control) > 0.8 * len(edges)
    for (row, dst), sources in mine.items():
        wanted = lengths[dst, sources]
        there = lengths[dst, np.setdiff1d(np.arange(dst), sources)]
        count, total = optimal_sorted(wanted, there, 0.75)
        drawn = its.get((row, dst), [])
        assert len(drawn) == count
        assert optimal_sorted(wanted, lengths[dst, drawn], 0.75)[1] == pytest.approx(
            total, abs=1e-4
        )


def test_equally_near_candidates_are_drawn_equally_often():
    edges = EdgeSet.of([(0, 5, 9)], 1, 10)  # 4 long: 3 and 5 are as near
    drawn = [edges.random_like(match="distance", seed=seed).src[0] for seed in range(200)]
    assert set(drawn) == {4, 6}
    assert 60 < drawn.count(4) < 140
    assert drawn[0] == edges.random_like(match="distance", seed=0).src[0]
    ring = EdgeSet.of([(0, 0, 9)], 1, 10)
    drawn = [
        int(ring.random_like(match="distance", distance=lambda e: e.src * 0.0, seed=s).src[0])
        for s in range(400)
    ]
    assert np.abs(np.bincount(drawn, minlength=9)[1:] - 50).max() < 35  # 5 standard deviations


# -- controls by attention -------------------------------------------------------------------------


def softmax_pattern(rng, n_batch, n_heads, n_pos, temperature=2.0):
    scores = rng.normal(size=(n_batch, n_heads, n_pos, n_pos)) * temperature
    scores = np.where(np.tril(np.ones((n_pos, n_pos), dtype=bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@given(st.integers(0, 10_000))
@settings(max_examples=40)
def test_no_single_exchange_brings_a_querys_attention_nearer(seed):
    rng = np.random.default_rng(seed)
    pattern = softmax_pattern(rng, 2, 3, 14)
    edges = EdgeSet.from_mask(np.tril(rng.random((2, 14, 14)) < 0.3, -1))
    control = edges.random_like(
        match="attention", pattern=pattern, tolerance=1, seed=seed, allow_fewer=True
    )
    weight = pattern.mean(1)
    mine, its = per_query(edges), per_query(control)
    for (row, dst), sources in mine.items():
        drawn = its.get((row, dst), [])
        free = [s for s in range(dst) if s not in sources and s not in drawn]
        assert len(drawn) == min(len(sources), len(drawn) + len(free))
        assert not set(drawn) & {dst, *sources}
        off = weight[row, dst, sources].sum() - weight[row, dst, drawn].sum()
        for out, into in itertools.product(drawn, free):
            after = off + weight[row, dst, out] - weight[row, dst, into]
            assert abs(after) >= abs(off) - 1e-9


def test_exchange_in_bulk_brings_sums_nearer_and_never_past_the_target():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 30)
    value = np.concatenate([np.sort(rng.random(30)) for _ in range(40)])
    taken = rng.random(len(group)) < 0.4
    missing = rng.normal(size=40) * 4
    before = np.bincount(group[taken], value[taken])
    counts = np.bincount(group[taken])
    matching._exchange_many(group, value, taken, missing)
    gained = np.bincount(group[taken], value[taken]) - before
    assert np.array_equal(np.bincount(group[taken]), counts)
    assert (gained * missing >= 0).all()
    assert (np.abs(gained) <= np.abs(missing) + 1e-9).all()
    assert (np.abs(gained)[np.abs(missing) > 1] > 0.1).all()


def test_attention_of_one_edge_a_query_is_matched_by_the_nearest_there_is():
    rng = np.random.default_rng(0)
    pattern = softmax_pattern(rng, 1, 2, 30)[:, 0]
    edges = EdgeSet.of([(0, dst // 2, dst) for dst in range(5, 30)], 1, 30)
    control = edges.random_like(match="attention", pattern=pattern, tolerance=1)
    for (_, src, dst), (_, other, _) in zip(edges, control, strict=True):
        free = np.setdiff1d(np.arange(dst), [src])
        nearest = free[np.abs(pattern[0, dst, free] - pattern[0, dst, src]).argmin()]
        assert other == nearest


def test_attention_is_matched_far_better_than_by_chance():
    rng = np.random.default_rng(1)
    pattern = softmax_pattern(rng, 2, 4, 60, temperature=1.5)
    edges = EdgeSet.from_mask(np.tril(rng.random((2, 60, 60)) < 0.15, -1))
    edges = EdgeSet(edges.table[edges.dst > 20], 2, 60)
    target = edges.mass(pattern)
    by_chance, matched = (
        np.abs(edges.random_like(match=match, seed=0, **settings).mass(pattern) - target).mean()
        for match, settings in (
            ("count", {}),
            ("attention", {"pattern": torch.tensor(pattern), "tolerance": 1}),
        )
    )
    assert matched < by_chance / 10
    one, other = (
        edges.random_like(match="attention", pattern=pattern, tolerance=1, seed=seed)
        for seed in (0, 1)
    )
    assert len(one & other) < 0.7 * len(one)  # another seed gives another control


# -- what controls refuse --------------------------------------------------------------------------

FLAT = np.tril(np.full((2, 7, 7), 1.0)) / np.arange(1, 8)[:, None]
HOT = np.where(np.arange(7) == 1, 0.9, 0.01) + np.zeros((2, 7, 7))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"match": "mass"}, "match='mass'; there are 'count', 'distance' and 'attention'"),
        ({"match": "attention"}, r'needs the pattern: pattern=run\["'),
        ({"pattern": FLAT}, 'pattern is for match="attention", and this is match="count"'),
        ({"distance": len}, 'distance is for match="distance"'),
        ({"tolerance": 1}, "tolerance=1 with match='count'"),
        ({"match": "distance", "tolerance": -1}, "tolerance=-1 with match='distance'"),
        ({"match": "distance", "tolerance": float("nan")}, "tolerance=nan"),
        ({"match": "distance", "distance": lambda e: np.zeros(3)}, r"gave \[3\] for 1 edges"),
        (
            {"match": "distance", "distance": lambda e: np.full(len(e), np.nan)},
            "src=1 -> dst=5 in row 0 has no length here",
        ),
        (
            {"match": "distance", "tolerance": 0},
            "only 0 candidate edges for a control of 1: .*within 0 of its edges' lengths, the "
            "first is position 5 of row 0; widen the candidates or the tolerance",
        ),
        (
            {"match": "attention", "pattern": HOT},
            "query 5 of row 0 gives its edges 0.900 .*nearest control 0.010: .*tolerance=0.89",
        ),
        ({"mask": np.zeros((2, 7, 7))}, "True or False"),
        ({"mask": np.zeros((2, 7, 7), bool)}, "only 0 candidate edges for a control of 1"),
    ],
)
def test_control_that_cannot_be_had_is_refused(settings, says):
    with pytest.raises(EdgeError, match=says):
        edge_set([(0, 1, 5)]).random_like(**settings)


def test_what_cannot_be_matched_is_left_out_where_fewer_will_do():
    edges = edge_set([(0, 1, 5), (1, 2, 6)])
    assert len(edges.random_like(match="distance", tolerance=0, allow_fewer=True)) == 0
    pattern = HOT.copy()
    pattern[1] = 0.1
    kept = edges.random_like(match="attention", pattern=pattern, allow_fewer=True)
    assert kept.row.tolist() == [1]


def test_nothing_has_nothing_for_a_control():
    nothing = edge_set([])
    for match, more in (("count", {}), ("distance", {}), ("attention", {"pattern": FLAT})):
        assert nothing.random_like(match=match, **more) == nothing
        assert nothing.random_like(everything(), match=match, **more) == nothing


def test_default_candidates_are_what_the_queries_see():
    edges = edge_set([(0, 1, 3), (1, 2, 4)])
    seen = {(0, 0, 3), (0, 2, 3), (1, 0, 4), (1, 1, 4), (1, 3, 4)}
    assert set().union(*(as_set(edges.random_like(seed=s)) for s in range(60))) == seen
    mask = np.zeros((2, 1, 7, 7), dtype=bool)
    mask[0, :, 3, [1, 3, 5]] = mask[1, :, 4, [2, 6]] = True
    assert as_set(edges.random_like(mask=mask)) == {(0, 5, 3), (1, 6, 4)}
    given = edges.random_like(edge_set([(0, 0, 3), (0, 5, 3), (1, 6, 4)]), mask=mask)
    assert as_set(given) == {(0, 5, 3), (1, 6, 4)}
    pattern = np.where(mask, 0.5, 0.0)
    assert edges.random_like(match="attention", pattern=pattern) == given


# -- size ------------------------------------------------------------------------------------------


def test_a_million_edges_stay_under_50_megabytes():
    rng = np.random.default_rng(0)
    table = rng.integers(0, [4, 2000, 2000], (1_000_000, 3), dtype=np.int32)
    tracemalloc.start()
    edges = EdgeSet(table, 4, 2000)
    _, peak = tracemalloc.get_traced_memory()
    edges.queries  # noqa: B018  (held after its first use)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(edges) > 900_000
    assert held < 15e6
    assert peak < 50e6  # while it is made, too


def test_controls_of_many_edges_take_seconds_at_most():
    """Of each kind, some 20,000 edges among 200 queries; a loop over edges would show."""
    rng = np.random.default_rng(0)
    edges = EdgeSet.from_mask(np.tril(rng.random((1, 500, 500)) < 0.2, -1))
    pattern = softmax_pattern(rng, 1, 1, 500)
    assert len(edges) > 20_000
    for settings_ in (
        {"match": "count"},
        {"match": "distance", "tolerance": 30},
        {"match": "attention", "pattern": pattern, "tolerance": 1},
    ):
        start = time.process_time()
        control = edges.random_like(allow_fewer=True, **settings_)
        assert time.process_time() - start < 4
        assert len(control) > 0.99 * len(edges)
