"""The bootstrap: equal to scipy's, covers what it should, and pairing pays."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
import torch

from interp.probes.metrics import mean_iou
from interp.stats import Interval, bootstrap, bootstrap_columns, ratio


def test_interval_prints_formats_and_excludes():
    iv = Interval(0.0684, 0.056, 0.08)
    assert str(iv) == "0.068 [0.056, 0.080]"
    assert f"{iv}" == str(iv)
    assert f"{iv:+.2f}" == "+0.07 [+0.06, +0.08]"
    assert iv.excludes()
    assert iv.excludes(0.081)
    assert not iv.excludes(0.08)
    assert json.loads(json.dumps(iv.as_dict())) == {"estimate": 0.0684, "low": 0.056, "high": 0.08}


def test_agrees_with_scipy_on_a_paired_mean_difference():
    rng = np.random.default_rng(0)
    a = rng.normal(0.5, 1.0, 150)
    b = a + rng.normal(0.2, 0.3, 150)
    ours = bootstrap(lambda x, y, n: (y - x) / n, a, b, np.ones(150), n_boot=20000)
    theirs = scipy.stats.bootstrap(
        (a, b),
        lambda x, y, axis: (y - x).mean(axis),
        paired=True,
        method="percentile",
        n_resamples=20000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.estimate == pytest.approx((b - a).mean(), abs=1e-12)
    assert ours.low == pytest.approx(theirs.low, abs=0.04 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.04 * width)


def test_equals_resampling_image_by_image():
    # The matrix product must be what a reader expects: pick images, add up, score.
    rng = np.random.default_rng(3)
    conf = rng.integers(0, 9, (12, 3, 3))
    got = bootstrap(mean_iou, conf, n_boot=50, seed=7)
    again = np.random.default_rng(7)
    picks = [again.integers(12, size=12) for _ in range(50)]
    draws = [float(mean_iou(conf[pick].sum(0))) for pick in picks]
    assert got.estimate == pytest.approx(float(mean_iou(conf.sum(0))))
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_covers_the_truth_as_often_as_it_says(level):
    rng = np.random.default_rng(2)
    trials = 400
    hits = 0
    for seed in range(trials):
        data = rng.normal(1.0, 2.0, 60)
        iv = bootstrap(ratio, data, np.ones(60), n_boot=400, level=level, seed=seed)
        hits += not iv.excludes(1.0)
    # 3 standard errors of a share of 400, and 0.02 for the known narrowness at n = 60
    slack = 3 * (level * (1 - level) / trials) ** 0.5
    assert level - slack - 0.02 < hits / trials < level + slack


def test_pairing_narrows_a_difference_and_images_widen_a_token_interval():
    rng = np.random.default_rng(4)
    hard = rng.beta(2, 2, 100)
    n = np.full(100, 200)
    a, b = rng.binomial(200, hard), rng.binomial(200, hard * 0.95)
    paired = bootstrap(lambda x, y, m: (x - y) / m, a, b, n)
    alone = [bootstrap(ratio, x, n, seed=s) for s, x in enumerate((a, b))]
    unpaired = sum((iv.high - iv.low) ** 2 for iv in alone) ** 0.5
    assert paired.high - paired.low < 0.4 * unpaired

    binomial = 2 * 1.96 * (alone[0].estimate * (1 - alone[0].estimate) / n.sum()) ** 0.5
    assert alone[0].high - alone[0].low > 3 * binomial  # what resampling tokens would have said


def test_same_seed_same_bytes_and_other_seed_not():
    x, n = np.arange(30.0), np.ones(30)
    assert bootstrap(ratio, x, n, seed=1) == bootstrap(ratio, x, n, seed=1)
    assert bootstrap(ratio, x, n, seed=1) != bootstrap(ratio, x, n, seed=2)
    assert bootstrap(ratio, torch.arange(30), torch.ones(30)) == bootstrap(ratio, x, n)


def test_undefined_draws_are_left_out_or_refused():
    # 4 of 20 images hold the class: about 1 draw in 87 holds none of them
    n = np.zeros(20)
    n[:4] = 10
    iv = bootstrap(ratio, n * 0.5, n, n_boot=4000)
    assert (iv.estimate, iv.low, iv.high) == (0.5, 0.5, 0.5)
    empty = bootstrap(lambda m: m == 0, n, n_boot=4000, level=0.999)
    assert empty.high == 1  # else no draw was undefined, and this test shows nothing

    def mostly_nan(m):
        out = np.full(len(m), np.nan)
        out[::3] = 1.0
        return out

    with pytest.raises(ValueError, match=r"not a finite number in \d+ of 1000 draws"):
        bootstrap(mostly_nan, np.ones(10), n_boot=1000)
    assert np.isnan(ratio(1.0, 0.0))  # not inf, which would pull a mean along
    with pytest.raises(ValueError, match="all 10 images is nan"):
        bootstrap(ratio, np.zeros(10), np.zeros(10))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((np.ones(5), np.ones(4)), r"same number of images, got \[5, 4\]"),
        ((np.ones(1), np.ones(1)), "at least 2 images, got 1"),
        ((), "same number of images"),
    ],
)
def test_bad_input_says_what_came(arrays, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(lambda *sums: sums[0], *arrays)


def test_a_statistic_that_is_not_vectorised_is_refused():
    with pytest.raises(ValueError, match="one value a draw"):
        bootstrap(lambda x: x.sum(), np.ones(5))
    with pytest.raises(ValueError, match="level"):
        bootstrap(lambda x: x, np.ones(5), level=95)


@pytest.mark.parametrize("shared", [False, True])
def test_many_columns_at_once_are_what_they_are_one_by_one(shared, monkeypatch):
    rng = np.random.default_rng(5)
    values = rng.normal(0.1, 1.0, (17, 3, 4))
    per = rng.integers(0, 5, 17) if shared else None
    monkeypatch.setattr("interp.stats._BLOCK", 5 * 300)  # 12 columns, 5 at a time
    got = bootstrap_columns(values, per, n_boot=300, level=0.9, seed=3)
    under = np.ones(17) if per is None else per
    for at in np.ndindex(3, 4):
        one = bootstrap(ratio, values[(slice(None), *at)], under, n_boot=300, level=0.9, seed=3)
        assert [g[at] for g in got] == pytest.approx([one.estimate, one.low, one.high], abs=1e-12)


def test_columns_leave_out_draws_without_a_denominator():
    n = np.zeros(20)
    n[:4] = 10
    estimate, low, high = bootstrap_columns(np.stack([n, 0.5 * n], 1), n, n_boot=4000)
    assert (estimate, low, high) == (pytest.approx([1, 0.5]),) * 3
    n[1:] = 0  # one image of 20: no draw of it in about 36% of draws
    assert bootstrap_columns(n[:, None], n)[0] == 1
    with pytest.raises(ValueError, match="0 in 2 of 2 draws: too few of the 20 images"):
        bootstrap_columns(n[:, None], n, n_boot=2, seed=4)


@pytest.mark.parametrize(
    ("values", "per", "message"),
    [
        (np.ones((5, 2)), np.ones(4), r"per is \[4\]; one number an image is \[5\]"),
        (np.ones((1, 2)), None, "at least 2 images, got 1"),
        (np.full((3, 1), np.nan), None, "must be finite"),
        (np.ones((3, 1)), np.zeros(3), "all 3 images are divided by adds up to 0"),
        (np.float64(3), None, "at least 2 images, got 0"),
    ],
)
def test_bad_columns_say_what_came(values, per, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_columns(values, per)
    with pytest.raises(ValueError, match="level"):
        bootstrap_columns(np.ones((3, 1)), level=95)
