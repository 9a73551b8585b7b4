"""Head study: shares that add up, ranking and test held apart."""

from __future__ import annotations

import numpy as np
import pytest

from interp.studies.heads import N_TOP, heads


@pytest.fixture(scope="module")
def result(base):
    return heads(base)


def test_components_add_up_to_the_margin(result):
    table = result.tables["components"].set_index("component")["estimate"]
    assert table.drop("margin").sum() == pytest.approx(table["margin"], abs=1e-3)


def test_head_totals_are_the_sum_over_sources(result):
    by_source = result.tables["heads"].groupby(["layer", "head"])["estimate"].sum()
    totals = result.tables["head_totals"].set_index(["layer", "head"])["estimate"]
    np.testing.assert_allclose(by_source, totals.loc[by_source.index], atol=1e-9)


def test_cutting_all_heads_is_the_whole_knockout(base, result):
    """All heads by name cut the same as no heads named, on the images heads are tested on."""
    from interp.edits import Knockout
    from interp.studies.conditions import anchor_edges
    from interp.studies.knockout import share_gone

    queries, anchors = anchor_edges(base)
    queries[: len(queries) // 2] = False
    edges = base.test.edges(anchors & queries[:, :, None])
    said = base.reread(lambda i: [Knockout(edges[i])] if len(edges[i]) else [])
    share = share_gone(
        base.test, base.right(base.readout), base.hits(said[base.readout]), queries, 0
    )
    table = result.tables["head_knockout"].set_index("set")
    assert table.loc["all heads", "estimate"] == pytest.approx(share.estimate, abs=1e-9)
    assert f"top {N_TOP}" in table.index
