"""The solver against scikit-learn, and the estimator against scikit-learn's own checks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from interp.probes import source
from interp.probes.linear import LinearProbe
from interp.probes.solver import fit_logistic


def states(n_stages: int, n: int, d: int, n_classes: int, seed: int = 0):
    """States like a model's: correlated features, uneven scales and classes, stages unlike."""
    rng = np.random.default_rng(seed)
    share = 1.0 / (1 + np.arange(n_classes))
    y = rng.choice(n_classes, n, p=share / share.sum())
    spectrum = (1.0 + np.arange(d)) ** -0.8
    out = np.empty((n_stages, n, d))
    for s in range(n_stages):
        turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
        means = rng.normal(size=(n_classes, d)) * (0.1 + 0.1 * s)
        noise = 0.35 * rng.normal(size=(n, d)) * rng.uniform(0.7, 1.3, (n, 1))
        x = ((means[y] * rng.uniform(0, 2, (n, 1)) + noise) * spectrum) @ turn
        out[s] = x * np.exp(rng.normal(size=d)) + rng.normal(size=d)
    out[:, :, 0] *= 300  # the few huge features that language models have
    out[:, :, 1] = 7.0
    return out.astype(np.float32), y


def penalised(weight, intercept, z, y, C):
    logits = torch.as_tensor(z @ weight.T + intercept)
    loss = torch.nn.functional.cross_entropy(logits, torch.as_tensor(y), reduction="sum")
    return float(loss) + (weight**2).sum() / (2 * C)


@pytest.mark.parametrize("C", [1.0, 0.01])
def test_every_stage_reaches_scikit_learns_objective_and_accuracy(C):
    x, y = states(4, 6000, 40, 8)
    train, test = slice(0, 3000), slice(3000, None)
    fit = fit_logistic(torch.tensor(x[:, train]), torch.tensor(y[train]), 8, C=C)
    assert bool(fit.converged.all())
    scores = []
    for s in range(4):
        scaler = StandardScaler().fit(x[s, train].astype(np.float64))
        z = scaler.transform(x[s].astype(np.float64))
        theirs = LogisticRegression(C=C, tol=1e-7, max_iter=5000).fit(z[train], y[train])
        best = penalised(theirs.coef_, theirs.intercept_, z[train], y[train], C)
        folded = fit.weight[s].double().numpy(), fit.intercept[s].double().numpy()
        ours = penalised(
            folded[0] * scaler.scale_,
            folded[1] + folded[0] @ scaler.mean_,
            z[train],
            y[train],
            C,
        )
        assert ours == pytest.approx(best, rel=1e-4)
        assert float(fit.objective[s]) == pytest.approx(best, rel=1e-4)
        said = (x[s, test] @ fit.weight[s].numpy().T + fit.intercept[s].numpy()).argmax(1)
        scores.append((said == y[test]).mean())
        assert abs(scores[-1] - theirs.score(z[test], y[test])) < 0.005
    assert max(scores) - min(scores) > 0.05  # stages differ: a mix-up of stages would show
    assert min(scores) > 1.2 * np.bincount(y).max() / len(y)


def test_binary_penalty_is_that_of_scikit_learn():
    x, y = states(1, 400, 6, 2)
    probe = LinearProbe(C=0.05, tol=1e-8).fit(x[0].astype(np.float64), y)
    z = StandardScaler().fit_transform(x[0].astype(np.float64))
    theirs = LogisticRegression(C=0.05, tol=1e-10, max_iter=5000).fit(z, y)
    np.testing.assert_allclose(probe.coef_ * probe.scale_, theirs.coef_, atol=1e-5)
    np.testing.assert_allclose(probe.predict_proba(x[0]), theirs.predict_proba(z), atol=1e-4)


def test_stages_do_not_disturb_each_other():
    x, y = map(torch.tensor, states(4, 800, 12, 5))
    x = x.double()  # rounding then is too small to change a path, so paths must be equal
    together = fit_logistic(x, y, 5, C=0.1)
    n_iter = together.n_iter.tolist()
    assert n_iter != sorted(n_iter, reverse=True)  # a stage left the stack before one after it
    for s in range(4):
        alone = fit_logistic(x[s : s + 1], y, 5, C=0.1)
        assert int(alone.n_iter) == n_iter[s]
        torch.testing.assert_close(alone.weight[0], together.weight[s], rtol=1e-6, atol=1e-9)
        assert float(alone.objective) == pytest.approx(float(together.objective[s]), rel=1e-12)


def test_same_input_same_bytes_and_features_untouched():
    x, y = map(torch.tensor, states(2, 500, 10, 4))
    before = x.clone()
    first, second = (fit_logistic(x, y, 4) for _ in range(2))
    assert torch.equal(x, before)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.intercept, second.intercept)
    fit_logistic(x, y, 4, overwrite=True)
    assert not torch.equal(x, before)


def test_chunks_change_nothing(monkeypatch):
    x, y = map(torch.tensor, states(2, 500, 10, 4))
    whole = fit_logistic(x.double(), y, 4)
    monkeypatch.setattr(source, "chunk_size", lambda z, n_classes=1: 64)
    parts = fit_logistic(x.double(), y, 4)
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-6, atol=1e-8)


def test_progress_counts_stages_up_to_all_of_them():
    x, y = map(torch.tensor, states(3, 300, 10, 4))
    for max_iter in (2, 500):
        calls: list[int] = []
        fit_logistic(x, y, 4, max_iter=max_iter, progress=calls.append)
        assert calls == sorted(set(calls))
        assert calls[-1] == 3


def test_constant_features_get_weight_zero_and_scale_one():
    x, y = map(torch.tensor, states(1, 300, 8, 3))
    # constant but for its last bit, as a feature that came out of a sum is
    x[..., 3] = 1000 + 6.1e-5 * torch.randint(0, 2, x.shape[:2])
    assert x[..., 3].std() > 0
    fit = fit_logistic(x, y, 3)
    for column in (1, 3):
        assert fit.scale[0, column] == 1
        assert bool((fit.weight[0, :, column] == 0).all())
    assert bool((fit.weight[0, :, 4] != 0).all())


def test_float64_and_wide_states_with_fewer_tokens_than_features():
    x, y = map(torch.tensor, states(2, 60, 90, 3))
    for dtype in (torch.float32, torch.float64):
        fit = fit_logistic(x.to(dtype), y, 3)
        assert fit.weight.dtype == dtype
        assert bool(fit.converged.all())


def test_bad_input_says_what_came():
    x, y = torch.randn(2, 5, 3), torch.tensor([0, 1, 0, 1, 0])
    with pytest.raises(ValueError, match=r"stages, tokens, width.*got \[5, 3\]"):
        fit_logistic(x[0], y, 2)
    with pytest.raises(ValueError, match="float16"):
        fit_logistic(x.half(), y, 2)
    with pytest.raises(ValueError, match=r"labels must be \[5\].*got \[4\]"):
        fit_logistic(x, y[:4], 2)
    with pytest.raises(ValueError, match="must be positive"):
        fit_logistic(x, y, 2, C=0)
    with pytest.raises(ValueError, match=r"labels must be 0\.\.1, got 0\.\.2"):
        fit_logistic(x, torch.tensor([0, 1, 2, 1, 0]), 2)
    x[1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match=r"stages \[1\] hold nan"):
        fit_logistic(x, y, 2)
    with pytest.raises(ValueError, match="at least two classes"):
        LinearProbe().fit([[0.0], [1.0]], [3, 3])


def test_ignored_rows_are_dropped():
    x, y = states(1, 400, 6, 3)
    marked = np.where(np.arange(400) % 3 == 0, 255, y)
    dropped = LinearProbe(ignore_label=255).fit(x[0], marked)
    plain = LinearProbe().fit(x[0][marked != 255], y[marked != 255])
    np.testing.assert_array_equal(dropped.coef_, plain.coef_)
    assert 255 in LinearProbe().fit(x[0], marked).classes_


def test_a_fit_cut_short_warns():
    x, y = states(1, 400, 20, 5)
    with pytest.warns(ConvergenceWarning, match="max_iter=2 steps"):
        probe = LinearProbe(max_iter=2).fit(x[0], y)
    assert probe.n_iter_ == 2


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([LinearProbe()])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)
