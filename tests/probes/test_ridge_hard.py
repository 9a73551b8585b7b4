"""Ridge where it is hard: features that depend on one another, parts without labels, no room."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp.labels import IGNORE
from interp.probes.moments import Frame, Moments
from interp.probes.ridge import ALPHAS, Stage, fit_ridge
from interp.probes.stream import Held, Shuffled, Tokens, label_counts

CLASSES = ("sky", "sea", "sand")


def low_rank(n: int = 4000, d: int = 512, rank: int = 128, seed: int = 0):
    """Features of a linear layer from a narrower one, with a spectrum that falls."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    inner = rng.normal(size=(n, rank)) + np.random.default_rng(9).normal(size=(3, rank))[y]
    inner *= np.arange(1, rank + 1.0) ** -1.5
    x = inner @ np.random.default_rng(8).normal(size=(rank, d))
    return torch.from_numpy(x).float(), torch.from_numpy(y)


def test_features_that_depend_on_one_another_take_a_penalty_that_does():
    x, y = low_rank()
    stream = Held({"a": x}, y, CLASSES, tokens_a_part=200)
    tokens = Tokens({"a": x}, y)
    sums = Moments.of(tokens, tokens.targets(3), Frame.of(tokens))
    assert Stage.of(sums, "a").solve(1e-12) is None  # the case is as hard as it is meant to be
    fit = fit_ridge(stream)
    assert all(error > 0 for error in fit.errors["a"].values())
    exact = fit_ridge(stream, precise=True)
    test, truth = low_rank(seed=1)
    right = [float((f.bank.predict("a", test) == truth).float().mean()) for f in (fit, exact)]
    assert right[0] == pytest.approx(right[1], abs=0.005)
    assert right[1] > 0.9
    alone = fit_ridge(stream, alphas=[1e-12])  # raised until it does, and said
    assert alone.bank.penalty["a"] > 1e-12 * len(y)
    assert bool(torch.isfinite(alone.bank.weight("a")).all())


def test_a_penalty_that_does_not_do_is_not_chosen(monkeypatch):
    x, y = low_rank()
    solve = Stage.solve
    monkeypatch.setattr(Stage, "solve", lambda self, a: None if a < 1e-2 else solve(self, a))
    fit = fit_ridge(Held({"a": x}, y, CLASSES, tokens_a_part=200))
    assert [a for a in ALPHAS if fit.errors["a"][a] == float("inf")] == [1e-6, 1e-5, 1e-4, 1e-3]
    assert fit.bank.penalty["a"] >= 1e-2 * len(y) * 0.99


def test_parts_without_labels_add_nothing():
    x, y = low_rank(1000, 16, 8)
    y[200:400] = IGNORE
    fit = fit_ridge(Held({"a": x}, y, CLASSES, tokens_a_part=100), shuffled=True, alphas=[0.1])
    kept = y != IGNORE
    plain = fit_ridge(Held({"a": x[kept]}, y[kept], CLASSES, tokens_a_part=100), alphas=[0.1])
    torch.testing.assert_close(fit.bank.weight("a"), plain.bank.weight("a"), atol=1e-6, rtol=1e-4)
    stream = Held({"a": x}, y, CLASSES, tokens_a_part=100)
    control = dict(Shuffled(stream, label_counts(stream)).read([2]))[2]
    assert bool((control.labels == IGNORE).all())


@pytest.mark.parametrize("where", [slice(400, 500), slice(0, 400)])
def test_nothing_to_choose_by_or_to_fit_on_is_said(where):
    x, y = low_rank(500, 16, 8)
    y[where] = IGNORE
    with pytest.raises(ValueError, match=r"\d+ labelled tokens to fit on and \d+ to choose"):
        fit_ridge(Held({"a": x}, y, CLASSES, tokens_a_part=100))


def test_too_many_classes_for_the_ignored_label_are_refused():
    x, y = low_rank(500, 16, 8)
    names = [str(k) for k in range(256)]
    with pytest.raises(ValueError, match="256 classes would make 255, the ignored label, a class"):
        fit_ridge(Held({"a": x}, y, names, tokens_a_part=100))


def test_any_seed_will_do():
    x, y = low_rank(500, 16, 8)
    fit_ridge(Held({"a": x}, y, CLASSES, tokens_a_part=50), shuffled=True, seed=2**60)
