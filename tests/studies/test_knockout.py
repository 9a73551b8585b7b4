"""The knockout protocol: who is asked, what is cut, and that controls are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from interp.edges import EdgeSet
from interp.studies import knockout as study
from interp.studies.knockout import (
    ANCHORS,
    MATCHED,
    anchor_edges,
    conflicting_pairs,
    knockout,
    share_gone,
    windows,
)


@pytest.fixture(scope="module")
def result(base):
    return knockout(base)


@pytest.fixture(scope="module")
def conditions(base):
    queries, anchors = anchor_edges(base)
    return {c.name: c for c in study._conditions(base, queries, anchors, 0)}


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


def test_controls_cut_as_many_edges_of_the_same_queries(conditions):
    for edges, control in zip(conditions[ANCHORS].edges, conditions[MATCHED].edges, strict=True):
        for a, b in zip(edges.queries, control.queries, strict=True):
            assert np.array_equal(a, b)
    for name in ("other regions", "wrong, same region", "correct, unrelated class"):
        for edges, control in zip(conditions[ANCHORS].edges, conditions[name].edges, strict=True):
            most = dict(zip(*edges.queries, strict=True))
            assert all(n <= most[q] for q, n in zip(*control.queries, strict=True))
            assert not len(control & edges)


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
    got = mass(conditions["random, same attention mass"].edges[0])
    reached = [got.get(q, 0.0) >= m - 1e-6 for q, m in wanted.items()]
    assert np.mean(reached) > 0.5  # the others have too little attention elsewhere
    assert not len(
        conditions["random, same attention mass"].edges[0] & conditions[ANCHORS].edges[0]
    )


def test_cut_and_reopened_is_clean(result):
    effect = result.tables["knockout_effect"].set_index("condition")
    assert effect.loc["no-op (cut and reopened)", "estimate"] == 0.0


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
    monkeypatch.setattr(study, "MIN_CONFUSION", 1.1)
    with pytest.raises(ValueError, match="nothing to cut"):
        knockout(base)
