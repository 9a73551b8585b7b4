"""Soft labels, weights and units of the logistic solver, against scikit-learn in float64."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from interp.labels import IGNORE
from interp.probes import source
from interp.probes.bank import UNSEEN, ProbeBank
from interp.probes.newton import choose_start, start
from interp.probes.solver import SAMPLE, fit_logistic, minimise, penalty
from interp.probes.source import Stack
from interp.probes.units import Fold
from interp.world import World

K = 4


def tokens(n: int = 300, d: int = 7, seed: int = 0):
    """Two stages, correlated and far from zero, with hard and soft labels and weights; float64."""
    rng = np.random.default_rng(seed)
    y = rng.choice(K, n, p=[0.5, 0.25, 0.15, 0.1])
    mix = rng.normal(size=(2, d, d))
    x = (rng.normal(size=(2, n, d)) + 0.8 * rng.normal(size=(2, K, d))[:, y]) @ mix
    x = x * np.exp(rng.normal(size=d)) + 30 * rng.normal(size=d)
    shares = rng.dirichlet([0.4] * K, n)
    shares[: n // 2] = np.eye(K)[y[: n // 2]]  # some tokens are all their label's
    return x, y, shares, rng.uniform(0.2, 3, n)


def theirs(x, y, weights, C):
    """Weights [K, d] and intercepts [K] on raw features, which add up to 0 over the classes."""
    scaler = StandardScaler().fit(x, sample_weight=weights)
    model = LogisticRegression(C=C, tol=1e-11, solver="newton-cholesky")
    model.fit(scaler.transform(x), y, sample_weight=weights)
    weight = model.coef_ / scaler.scale_
    intercept = model.intercept_ - weight @ scaler.mean_
    return weight - weight.mean(0), intercept - intercept.mean()


def assert_same(fit, x, y, weights, C):
    for s in range(2):
        weight, intercept = theirs(x[s], y, weights, C)
        np.testing.assert_allclose(fit.weight[s], weight, atol=1e-6 * np.abs(weight).max())
        np.testing.assert_allclose(fit.intercept[s], intercept, atol=2e-6 * abs(intercept).max())


@pytest.mark.parametrize("C", [1.0, 0.02])
def test_token_weights_are_scikit_learns(C, monkeypatch):
    monkeypatch.setattr(source, "_FRAME", 16)  # units that are not quite the standard ones
    x, y, _, w = tokens()
    fit = fit_logistic(torch.tensor(x), torch.tensor(y), K, weights=torch.tensor(w), C=C, tol=1e-10)
    assert_same(fit, x, y, w, C)


@pytest.mark.parametrize("weighted", [False, True])
def test_soft_labels_are_repeated_tokens_with_weights(weighted):
    x, _, shares, w = tokens()
    of_token = w if weighted else np.ones_like(w)
    fit = fit_logistic(
        torch.tensor(x), None, K, shares=torch.tensor(shares),
        weights=torch.tensor(w) if weighted else None, C=0.5, tol=1e-10,
    )  # fmt: skip
    parts = (shares * of_token[:, None]).T.reshape(-1)
    there = parts > 0
    repeated = np.tile(x, (1, K, 1))[:, there]
    assert_same(fit, repeated, np.repeat(np.arange(K), len(w))[there], parts[there], 0.5)


def test_hard_labels_as_shares_change_nothing():
    x, y, _, w = tokens()
    x, w = torch.tensor(x), torch.tensor(w)
    hard = fit_logistic(x, torch.tensor(y), K, weights=w, tol=1e-9)
    soft = fit_logistic(x, None, K, shares=torch.eye(K)[y], weights=w, tol=1e-9)
    torch.testing.assert_close(hard.weight, soft.weight, rtol=1e-6, atol=1e-9)
    assert hard.objective.tolist() == pytest.approx(soft.objective.tolist(), rel=1e-12)


def test_the_objective_is_the_sum_that_is_written_down():
    x, y, _, w = tokens()
    fit = fit_logistic(torch.tensor(x), torch.tensor(y), K, weights=torch.tensor(w), C=0.3)
    for s in range(2):
        scaler = StandardScaler().fit(x[s], sample_weight=w)
        logits = torch.tensor(x[s]) @ fit.weight[s].T + fit.intercept[s]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(y), reduction="none")
        norm = ((fit.weight[s].numpy() * scaler.scale_) ** 2).sum()
        assert float(fit.objective[s]) == pytest.approx(float(loss.numpy() @ w) + norm / 0.6)


# -- units, sums, start ----------------------------------------------------------------------------


def test_sums_and_fold_standardise_exactly_and_go_back():
    x, y, _, w = tokens()
    weights = torch.tensor(w)
    stack, sums = Stack.of(torch.tensor(x), torch.tensor(y), K, weights=weights)
    fold = Fold.of(sums)
    for s in range(2):
        scaler = StandardScaler().fit(x[s], sample_weight=w)
        z = scaler.transform(x[s])
        np.testing.assert_allclose(sums.unit[s] * fold.mean[s] + sums.shift[s], scaler.mean_)
        np.testing.assert_allclose(sums.unit[s] * fold.std[s], scaler.scale_)
        np.testing.assert_allclose(fold.gram(sums, s), (z * w[:, None]).T @ z, atol=1e-8)
        centred = (np.eye(K)[y] * w[:, None]) - (w[:, None] * w @ np.eye(K)[y]) / w.sum()
        np.testing.assert_allclose(fold.cross(sums, s), z.T @ centred, atol=1e-8)
    theta = torch.randn(2, K, x.shape[2] + 1, dtype=torch.float64)
    weight, bias = fold.plain(theta)
    raw_weight, raw_bias = fold.raw(theta, sums)
    scores = stack.z @ weight.transpose(1, 2) + bias.transpose(1, 2)
    raw = torch.tensor(x) @ raw_weight.transpose(1, 2) + raw_bias[:, None]
    torch.testing.assert_close(scores - scores.mean(2, keepdim=True), raw)
    log2 = torch.log2(sums.unit)
    assert torch.equal(log2, log2.round())


@pytest.mark.parametrize("components", [None, 3])
def test_derivatives_go_back_the_way_that_weights_came(components):
    """<plain(theta), g> = <theta, back(g)>, where means are far from zero and one is constant."""
    g = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    axes = None if components is None else draw(2, 7, components)
    varies = torch.ones(2, 7, dtype=torch.bool)
    varies[:, 3] = False
    fold = Fold(draw(2, 7), draw(2, 7).exp(), varies, axes, torch.full((K,), 0.25), 1.0)
    theta, weight, bias = draw(2, K, fold.n_axes + 1), draw(2, K, 7), draw(2, K, 1)
    plain = fold.plain(theta)
    there = (plain[0] * weight).sum() + (plain[1] * bias).sum()
    assert float((theta * fold.back(weight, bias)).sum()) == pytest.approx(float(there))
    assert bool((plain[0][:, :, 3] == 0).all())


def test_principal_axes_are_those_of_standardised_features():
    x, y, _, _ = tokens()
    stack, sums = Stack.of(torch.tensor(x), torch.tensor(y), K)
    fold = Fold.of(sums, 3)
    found = minimise(stack, sums, fold, penalty(0.5, K), tol=1e-10)
    weight, intercept = fold.raw(found.theta, sums)
    for s in range(2):
        z = StandardScaler().fit_transform(x[s])
        axes = np.linalg.svd(z, full_matrices=False)[2][:3].T
        model = LogisticRegression(C=0.5, tol=1e-11, solver="newton-cholesky")
        model.fit(z @ axes, y)
        want = model.decision_function(z @ axes)
        got = (torch.tensor(x[s]) @ weight[s].T + intercept[s]).numpy()
        np.testing.assert_allclose(got, want - want.mean(1, keepdims=True), atol=1e-5)


def test_the_start_is_near_where_classes_are_gaussian():
    """The discriminant of Gaussian classes is the answer but for noise; other factors are worse."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, K, 9000)
    x = rng.normal(size=(2, 9000, 12)) + 0.7 * rng.normal(size=(2, K, 12))[:, y]
    stack, sums = Stack.of(torch.tensor(x), torch.tensor(y), K)
    fold = Fold.of(sums)
    lda = start(sums, fold)
    stride = 9000 // SAMPLE
    theta, bend = choose_start(fold, lda, 1.0, lambda: stack.chunks(stride), World())
    torch.testing.assert_close(theta, lda)
    logits = stack.z @ fold.plain(theta)[0].transpose(1, 2) + fold.plain(theta)[1].transpose(1, 2)
    p = logits.softmax(2)
    torch.testing.assert_close(bend, (p * (1 - p)).mean(1), rtol=0.05, atol=0)
    loss = torch.nn.functional.cross_entropy(logits[0], torch.tensor(y), reduction="sum")
    best = fit_logistic(torch.tensor(x), torch.tensor(y), K)
    assert float(loss) < float(best.objective[0]) * 1.005
    # weights that are far too large are brought back
    factor, _ = choose_start(fold, 40 * lda, 1.0, lambda: stack.chunks(stride), World())
    assert float(factor[..., :-1].abs().max()) == 0


def test_a_stack_takes_lists_rows_and_half_precision():
    x, y, _, _ = tokens()
    half = [torch.tensor(s).bfloat16() for s in x]
    rows = torch.arange(0, 300, 3)
    stack, sums = Stack.of(half, torch.tensor(y)[rows], K, rows=rows)
    assert stack.dtype == torch.float32
    for s in range(2):
        back = stack.z[s].double() * sums.unit[s] + sums.shift[s]
        torch.testing.assert_close(back, half[s][rows].double(), rtol=1e-6, atol=1e-5)


def test_means_a_million_spreads_away_do_no_harm():
    x, y, _, _ = tokens()
    z = np.stack([StandardScaler().fit_transform(s) for s in x]).astype(np.float32)
    near = fit_logistic(torch.tensor(z), torch.tensor(y), K, tol=1e-6)
    moved = torch.tensor(np.round(z * 64) / 64) + 2.0**14  # exact in float32
    plain = fit_logistic(moved - 2.0**14, torch.tensor(y), K, tol=1e-6)
    far = fit_logistic(moved, torch.tensor(y), K, tol=1e-6)
    assert far.objective.tolist() == pytest.approx(plain.objective.tolist(), rel=1e-5)
    torch.testing.assert_close(far.weight, plain.weight, atol=1e-3, rtol=1e-3)
    assert near.objective.tolist() == pytest.approx(plain.objective.tolist(), rel=1e-2)


def test_wrong_shares_and_weights_are_told():
    x, y, shares, w = tokens()
    x, y, shares, w = (torch.tensor(v) for v in (x, y, shares, w))
    with pytest.raises(ValueError, match=r"add up to 1; one is off by 0\.5"):
        fit_logistic(x, None, K, shares=shares / 2)
    with pytest.raises(ValueError, match=r"shares must be \[300, 4\].*got \[300, 3\]"):
        fit_logistic(x, None, K, shares=shares[:, :3])
    with pytest.raises(ValueError, match=r"weights must be \[300\] and positive.*least 0\.0"):
        fit_logistic(x, y, K, weights=w * (w > 1))
    with pytest.raises(ValueError, match="neither labels nor shares"):
        fit_logistic(x, None, K)


# -- the bank --------------------------------------------------------------------------------------


def test_a_bank_heeds_class_weights_and_shares():
    x, y, shares, _ = tokens()
    names = ["a", "b", "nobody", "c", "d"]
    code = np.array([0, 1, 3, 4])[y]
    code[::9] = IGNORE
    keep = code != IGNORE
    states = {"s": torch.tensor(x[0]), "t": torch.tensor(x[1])}
    bank = ProbeBank.fit(
        states, torch.tensor(code), names, class_weight={"b": 5.0, "d": 0.5}, tol=1e-9
    )
    of_class = np.array([1, 5, 1, 0.5])
    weight, _ = theirs(x[1][keep], y[keep], of_class[y[keep]], 1.0)
    np.testing.assert_allclose(bank.weight("t")[[0, 1, 3, 4]], weight, rtol=1e-4, atol=1e-6)
    assert bank.intercept("t")[2] == UNSEEN
    balanced = ProbeBank.fit(states, torch.tensor(code), names, class_weight="balanced", tol=1e-9)
    counts = np.bincount(y[keep])
    weight, _ = theirs(x[0][keep], y[keep], (keep.sum() / 4 / counts)[y[keep]], 1.0)
    np.testing.assert_allclose(balanced.weight("s")[[0, 1, 3, 4]], weight, rtol=1e-4, atol=1e-6)

    wide = np.insert(shares, 2, 0, axis=1)
    wide[~keep] = 7.0  # an ignored token's shares are nobody's business
    soft = ProbeBank.fit(states, torch.tensor(code), names, shares=torch.tensor(wide), tol=1e-9)
    parts = shares[keep].T.reshape(-1)
    repeated, there = np.tile(x[0][keep], (K, 1)), parts > 0
    index = np.repeat(np.arange(K), keep.sum())
    weight, _ = theirs(repeated[there], index[there], parts[there], 1.0)
    np.testing.assert_allclose(soft.weight("s")[[0, 1, 3, 4]], weight, rtol=1e-4, atol=1e-6)
    assert soft.seen == (True, True, False, True, True)
    with pytest.raises(ValueError, match=r"shares must be \[300, 5\], got \[300, 4\]"):
        ProbeBank.fit(states, torch.tensor(code), names, shares=torch.tensor(shares))
