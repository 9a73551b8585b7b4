"""Bidirectional study: positions partition, dose bins, and the opened model is really open."""

from __future__ import annotations

import numpy as np
import pytest

from interp.studies.bidirectional import CAUSAL, THIRDS, bidirectional, opened, thirds


@pytest.fixture(scope="module")
def result(base):
    return bidirectional(base)


def test_opened_tokens_see_later_ones(base):
    x = base.test.batches[0]
    run = base.test.model.run(x, *opened(base.test)(0), read="blocks.*.attn.hook_mask")
    first, last = x.grid.position.min(), x.grid.position.max()
    for mask in run.states.values():
        assert mask[:, :, first, last].all()  # image to image, both ways
        assert not mask[:, :, first - 1, last].any()  # text before the image stays causal


def test_rows_average_to_the_accuracy_of_the_stage(base, result):
    rows = result.tables["positions"]
    causal = rows[rows.condition == CAUSAL].estimate
    assert causal.mean() == pytest.approx(base.right(base.readout).mean(), abs=1e-9)


def test_thirds_partition_the_raster(base):
    which = thirds(base.test)
    assert list(np.unique(which)) == [0, 1, 2]
    assert (np.diff(which) >= 0).all()


def test_gain_is_opened_minus_causal(base, result):
    gains = result.tables["thirds"].set_index(["third", "comparison"]).estimate
    said = base.reread(opened(base.test))[base.readout]
    for i, third in enumerate(THIRDS):
        at = thirds(base.test) == i
        gain = (base.hits(said)[:, at].mean()) - base.right(base.readout)[:, at].mean()
        assert gains[third, "frozen - causal"] == pytest.approx(gain, abs=1e-9)


def test_doses_hold_every_wrong_token_once(base, result):
    dose = result.tables["dose"]
    counted = dose[dose.condition == CAUSAL].n_tokens.sum()
    assert counted <= base.wrong(base.reference).sum()
    assert counted >= 0.9 * base.wrong(base.reference).sum()
