"""Ridge probes against scikit-learn's, and the penalty against an honest split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from interp.labels import IGNORE
from interp.probes.bank import UNSEEN
from interp.probes.ridge import fit_ridge
from interp.probes.stream import Held, draw_labels
from interp.probes.weighting import class_weights

CLASSES = ("sky", "sea", "sand", "snow")
N = 1200


def data(seed: int = 0, n: int = N) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Correlated features of unequal means and scales; labels; soft shares."""
    rng = np.random.default_rng(seed)
    y = rng.choice(4, n, p=[0.5, 0.3, 0.15, 0.05])
    found = {}
    for name, d in (("early", 6), ("late", 20)):
        centres = np.random.default_rng(d).normal(size=(4, d))
        mix = np.random.default_rng(d + 1).normal(size=(d, d))
        x = (centres[y] + 0.9 * rng.normal(size=(n, d))) @ mix
        found[name] = x * np.logspace(-1, 2, d) + np.linspace(-50, 50, d)
    shares = rng.dirichlet(np.ones(4), n) * 0.4
    shares[np.arange(n), y] += 0.6
    return found, y, shares


def held(features: dict[str, np.ndarray], y: np.ndarray, **options: object) -> Held:
    tensors = {name: torch.from_numpy(x) for name, x in features.items()}
    return Held(tensors, torch.from_numpy(y), CLASSES, tokens_a_part=100, **options)


def test_scores_are_scikit_learns_up_to_targets_of_minus_one_and_one():
    features, y, _ = data()
    bank = fit_ridge(held(features, y), alphas=[0.01], precise=True).bank
    for stage, x in features.items():
        theirs = RidgeClassifier(alpha=0.01 * N).fit(StandardScaler().fit_transform(x), y)
        scores = theirs.decision_function(StandardScaler().fit(x).transform(x)) / 2
        ours = bank.logits(stage, torch.from_numpy(x)).double().numpy()
        scores -= scores.mean(1, keepdims=True)
        np.testing.assert_allclose(ours, scores, atol=2e-4)  # the bank keeps float32
        assert (ours.argmax(1) == scores.argmax(1)).mean() > 0.999
    assert bank.solver == "ridge"
    assert bank.penalty == {"early": pytest.approx(12), "late": pytest.approx(12)}


def test_soft_targets_and_class_weights_are_those_of_a_weighted_regression():
    features, y, shares = data()
    soft = held(features, y, shares=torch.from_numpy(shares))
    names = {"sky": 0.5, "sea": 1.0, "sand": 3.0, "snow": 9.0}
    bank = fit_ridge(soft, alphas=[0.05], class_weight=names, precise=True).bank
    weights = shares.astype(np.float32).astype(float) @ np.array(list(names.values()))
    for stage, x in features.items():
        mean = np.average(x, axis=0, weights=weights)
        z = (x - mean) / np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights))
        theirs = Ridge(alpha=0.05 * weights.sum()).fit(z, shares, sample_weight=weights)
        scores = theirs.predict(z)
        scores -= scores.mean(1, keepdims=True)
        ours = bank.logits(stage, torch.from_numpy(x)).double().numpy()
        np.testing.assert_allclose(ours, scores, atol=2e-4)


def test_balanced_weights_are_scikit_learns():
    features, y, _ = data()
    found = class_weights(held(features, y), "balanced")
    assert found is not None
    counts = np.bincount(y, minlength=4)
    np.testing.assert_allclose(found, N / (4 * counts))
    some = np.where(y == 3, 0, y)  # nobody says snow
    found = class_weights(held(features, some), "balanced")
    assert found is not None
    np.testing.assert_allclose(found[:3], N / (3 * np.bincount(some)))


def test_the_penalty_is_the_one_with_the_least_error_on_the_shards_left_out():
    features, y, _ = data()
    alphas = (1e-4, 1e-2, 1.0)
    fit = fit_ridge(held(features, y), alphas=alphas, precise=True)
    # 12 parts are 12 shards; the 5th and the 10th choose
    out = np.isin(np.arange(N) // 100, [4, 9])
    for stage, x in features.items():
        scaler = StandardScaler().fit(x[~out])
        hot = np.eye(4)[y]
        errors = {}
        for alpha in alphas:
            theirs = Ridge(alpha=alpha * (~out).sum())
            theirs.fit(scaler.transform(x[~out]), hot[~out])
            left = hot[out] - theirs.predict(scaler.transform(x[out]))
            errors[alpha] = (left**2).sum() / ((hot[out] - hot[out].mean(0)) ** 2).sum()
        assert fit.errors[stage] == pytest.approx(errors, rel=1e-6)
        best = min(errors, key=lambda a: errors[a])
        assert fit.bank.penalty[stage] == pytest.approx(best * N)


def test_principal_components_are_scikit_learns():
    features, y, _ = data()
    bank = fit_ridge(held(features, y), alphas=[0.01], components=5, precise=True).bank
    for stage, x in features.items():
        z = StandardScaler().fit_transform(x)
        few = PCA(5).fit_transform(z)
        scores = Ridge(alpha=0.01 * N).fit(few, np.eye(4)[y]).predict(few)
        scores -= scores.mean(1, keepdims=True)
        ours = bank.logits(stage, torch.from_numpy(x)).double().numpy()
        np.testing.assert_allclose(ours, scores, atol=2e-4)


def test_the_penalty_is_chosen_at_the_capacity_that_the_probe_has():
    features, y, _ = data()
    alphas = (1e-4, 1e-2, 1.0)
    fit = fit_ridge(held(features, y), alphas=alphas, components=3, precise=True)
    out = np.isin(np.arange(N) // 100, [4, 9])  # as above
    hot = np.eye(4)[y]
    for stage, x in features.items():
        scaler = StandardScaler().fit(x[~out])
        few = PCA(3).fit(scaler.transform(x[~out]))
        z = few.transform(scaler.transform(x))
        errors = {}
        for alpha in alphas:
            theirs = Ridge(alpha=alpha * (~out).sum()).fit(z[~out], hot[~out])
            left = hot[out] - theirs.predict(z[out])
            errors[alpha] = (left**2).sum() / ((hot[out] - hot[out].mean(0)) ** 2).sum()
        assert fit.errors[stage] == pytest.approx(errors, rel=1e-6)


@pytest.mark.parametrize("precise", [False, True])
def test_features_that_never_vary_have_no_weight(precise):
    features, y, _ = data()
    # most are no float32, so that they lie beside their shift by what was rounded
    constants = np.tile([0.0, 7.0, *np.random.default_rng(5).normal(0, 100, 20)], (N, 1))
    padded = {name: np.hstack([x, constants]) for name, x in features.items()}
    plain, wider = (
        fit_ridge(held(x, y), alphas=[0.01], precise=precise) for x in (features, padded)
    )
    for stage, x in features.items():
        d, weight = x.shape[1], wider.bank.weight(stage)
        assert torch.isfinite(weight).all()
        assert torch.isfinite(wider.bank.intercept(stage)).all()
        assert not weight[:, d:].any()
        loose = 1e-4 if precise else 1e-2
        torch.testing.assert_close(weight[:, :d], plain.bank.weight(stage), atol=1e-6, rtol=loose)


def test_ignored_tokens_change_nothing_and_classes_without_tokens_never_win():
    features, y, _ = data()
    keep = y != 2
    padded = np.where(keep, y, IGNORE)
    bank = fit_ridge(held(features, padded), alphas=[0.01], precise=True).bank
    assert bank.seen == (True, True, False, True)
    for stage, x in features.items():
        z = StandardScaler().fit(x[keep]).transform(x)
        theirs = RidgeClassifier(alpha=0.01 * keep.sum()).fit(z[keep], y[keep])
        ours = bank.predict(stage, torch.from_numpy(x))
        assert (ours.numpy() == theirs.predict(z)).mean() > 0.999
        assert bank.intercept(stage)[2] == UNSEEN
        assert not bank.weight(stage)[2].any()


def test_shuffled_labels_teach_no_more_than_frequencies():
    features, y, _ = data()
    test, truth, _ = data(seed=1)
    fit = fit_ridge(held(features, y), shuffled=True)
    assert fit.shuffled is not None
    for stage in features:
        said = fit.shuffled.predict(stage, torch.from_numpy(test[stage])).numpy()
        real = fit.bank.predict(stage, torch.from_numpy(test[stage])).numpy()
        assert (real == truth).mean() > 0.75
        # a probe that learned nothing says the most frequent class
        assert (said == truth).mean() < (truth == 0).mean() + 0.03


def test_shuffled_labels_are_drawn_anew_in_every_part():
    often = torch.tensor([5.0, 3.0, 1.5, 0.5])
    first, second = (draw_labels(often, 100, 3, part) for part in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, draw_labels(often, 100, 3, 0))
    features, y, _ = data()
    fit = fit_ridge(held(features, y), alphas=[0.01], shuffled=True, seed=3, precise=True)
    counts = torch.from_numpy(np.bincount(y)).double()
    drawn = torch.cat([draw_labels(counts, 100, 3, part) for part in range(N // 100)])
    hot, frame = np.eye(4)[drawn], fit.moments.frame
    for stage, x in features.items():
        z = (x - frame.shift[stage].numpy()) / frame.unit[stage].numpy()
        np.testing.assert_allclose(fit.moments.xy[stage][:, 4:], z.T @ hot, atol=1e-8)
        np.testing.assert_allclose(fit.moments.xy[stage][:, :4], z.T @ np.eye(4)[y], atol=1e-8)


def test_single_precision_products_give_the_same_classes():
    features, y, _ = data()
    exact, quick = (fit_ridge(held(features, y), precise=p).bank for p in (True, False))
    for stage, x in features.items():
        a, b = (bank.logits(stage, torch.from_numpy(x)) for bank in (exact, quick))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alphas": [0.1, 0.0]}, "positive"),
        ({"components": 0}, "at least 1"),
        ({"class_weight": {"sun": 2.0}}, "names sun, which are no classes"),
        ({"class_weight": {"sky": 0.0}}, "positive"),
        ({"class_weight": "equal"}, '"balanced", a dict or None'),
    ],
)
def test_bad_arguments_are_refused_with_what_would_do(options, words):
    features, y, _ = data()
    with pytest.raises(ValueError, match=words):
        fit_ridge(held(features, y), **options)


def test_streams_that_cannot_be_fitted_say_why():
    features, y, _ = data(n=90)
    with pytest.raises(ValueError, match="1 parts: choosing a penalty needs 2"):
        fit_ridge(held(features, y))
    with pytest.raises(ValueError, match=r"at least two classes; the labels hold \['sea'\]"):
        fit_ridge(held(features, np.ones_like(y)), alphas=[0.1])
