"""The knockout protocol: who is asked, what is cut, and that controls are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from interp.edges import EdgeSet
from interp.errors import Untestable
from interp.studies import conditions as module
from interp.studies.conditions import (
    ANCHORS,
    MASS_MATCHED,
    MATCHED,
    NO_OP,
    anchor_edges,
    conflicting_pairs,
)
from interp.studies.knockout import knockout, share_gone, windows


@pytest.fixture(scope="module")
def result(base):
    return knockout(base)


@pytest.fixture(scope="module")
def conditions(base):
    queries, anchors = anchor_edges(base)
    return {c.name: c for c in module.conditions(base, queries, anchors, 0)}


def test_anchor_edges_follow_the_protocol_word_by_word(base):
    queries, anchors = anchor_edges(base)
    test = base.test
    said = base.predicted[base.reference]
    pairs = conflicting_pairs(base)
    assert queries.any()
    for image, dst, src in np.argwhere(anchors)[::97]:
        a, b = test.labels[image, dst], said[image, dst]
        assert a != b  # the query is taken for another class
        assert pairs[a, b]  # which conflicts with its own
        assert test.labels[image, src] == a == said[image, src]  # the anchor is rightly A
        assert test.regions[image, dst] == test.regions[image, src]
        assert src < dst


def test_conflict_is_mutual(base):
    pairs = conflicting_pairs(base)
    assert np.array_equal(pairs, pairs.T)
    assert not pairs.diagonal().any()


def test_controls_never_hold_an_anchors_edge_nor_more_edges(base, conditions):
    anchored = base.test.per_query(conditions[ANCHORS].edges)
    for name in (MATCHED, "other regions", "wrong, same region", "correct, unrelated class"):
        counted = base.test.per_query(conditions[name].edges)
        assert (counted <= anchored).all()
        queries, _ = anchor_edges(base)
        assert np.array_equal(conditions[name].complete, queries & (counted == anchored))
        for edges, control in zip(conditions[ANCHORS].edges, conditions[name].edges, strict=True):
            assert not len(control & edges)


def test_per_query_counts_edges(base):
    counted = base.test.per_query(base.test.edges(base.test.visible))
    assert np.array_equal(counted, np.tile(np.arange(100), (len(base.test), 1)))


def test_mass_matched_control_carries_the_anchors_attention(base, conditions):
    test = base.test
    x = test.batches[0]
    run = test.model.run(x, read="blocks.*.attn.hook_pattern", logits=False)
    mean = sum(p.mean(1) for p in run.states.values()) / len(run.states)

    def mass(edges: EdgeSet) -> dict:
        out: dict = {}
        for row, dst, src in edges.table.tolist():
            out[row, dst] = out.get((row, dst), 0.0) + float(mean[row, dst, src])
        return out

    wanted = mass(conditions[ANCHORS].edges[0])
    got = mass(conditions[MASS_MATCHED].edges[0])
    reached = [got.get(q, 0.0) >= m - 1e-6 for q, m in wanted.items()]
    assert np.mean(reached) > 0.5  # the others have too little attention elsewhere
    assert not len(conditions[MASS_MATCHED].edges[0] & conditions[ANCHORS].edges[0])


def test_cut_and_reopened_is_clean(result):
    effect = result.tables["knockout_effect"].set_index("condition")
    assert effect.loc[NO_OP, "estimate"] == 0.0


def test_share_gone_by_hand(base):
    clean = np.zeros(base.test.labels.shape, bool)
    cut, queries = clean.copy(), clean.copy()
    queries[:, :4] = True
    clean[:, :2] = True
    cut[:, 0] = True
    share = share_gone(base.test, clean, cut, queries, 0)
    assert share.estimate == pytest.approx(0.5)


def test_windows_cover_every_layer_and_neighbouring_pair():
    assert windows(3) == [[0], [1], [2], [0, 1], [1, 2]]


def test_probe_free_version_uses_marks_only(base, result):
    table = result.tables["knockout"]
    free = table[table.probe_free]
    assert set(free.condition) == {"clean", "marked -> unmarked", "unmarked -> unmarked"}
    cut = free[free.condition != "clean"].groupby("condition").edges_per_query.first()
    assert cut.iloc[0] == cut.iloc[1]


def test_nothing_to_cut_is_said(base, monkeypatch):
    monkeypatch.setattr(module, "MIN_CONFUSION", 1.1)
    with pytest.raises(Untestable, match="nothing to cut"):
        knockout(base)
