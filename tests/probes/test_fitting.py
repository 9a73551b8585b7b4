"""Two solvers behind one word; what they keep of a stream; memory that does not grow."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pytest
import torch

from interp.labels import IGNORE
from interp.probes.fitting import Fitting
from interp.probes.ridge import fit_ridge
from interp.probes.stream import Held, Shuffled, Tokens, label_counts
from interp.probes.streamed import fit_logistic_stream

CLASSES = ("sky", "sea", "sand")


def held(n: int = 1500, seed: int = 0) -> Held:
    rng = np.random.default_rng(seed)
    y = rng.choice(3, n, p=[0.5, 0.3, 0.2])
    features = {
        name: torch.from_numpy(
            np.random.default_rng(d).normal(size=(3, d))[y] + rng.normal(size=(n, d))
        ).float()
        for name, d in (("early", 5), ("late", 12))
    }
    labels = np.where(rng.random(n) < 0.1, IGNORE, y)
    return Held(features, torch.from_numpy(labels), CLASSES, tokens_a_part=100)


class Counting:
    """A stream of many parts that counts how many of them are alive, and how often each was read.

    Every part is made when it is asked for. What a solver keeps of it, it must have copied.
    """

    def __init__(self, n_parts: int) -> None:
        self.n_parts, self.classes = n_parts, CLASSES
        self.widths: Mapping[str, int] = {"early": 5, "late": 12}
        self.alive = self.most = 0
        self.reads = 0

    def read(self, parts: Iterable[int]) -> Iterator[tuple[int, Tokens]]:
        for part in parts:
            tokens = dict(held(100, seed=part).read([0]))[0]
            self.alive += 1
            self.reads += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(tokens.features["late"], self.gone)
            yield part, tokens
            del tokens

    def labels(self, parts: Iterable[int]) -> Iterator[tuple[int, Tokens]]:
        for part in parts:
            tokens = dict(held(100, seed=part).read([0]))[0]
            yield part, Tokens({}, tokens.labels)

    def gone(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize(
    ("fitting", "reads"),
    [
        (Fitting("ridge"), 60),  # one pass
        (Fitting("logistic"), 61),  # kept, as copies; one part more for the units
        (Fitting("logistic", memory=0, epochs=2), 181),
    ],
)
def test_parts_are_let_go_and_read_as_often_as_was_planned(fitting, reads):
    stream = Counting(60)
    fitting.fit(stream)
    assert stream.most <= 2
    assert stream.reads == reads
    n_tokens = int(label_counts(stream).sum())
    assert fitting.passes(n_tokens, stream.widths) == reads // 60


@pytest.mark.parametrize("solver", ["ridge", "logistic"])
def test_both_solvers_read_what_is_there_and_not_what_is_shuffled(solver):
    train, test = held(), held(seed=1)
    fitted = Fitting(solver).fit(train, shuffled=True)
    assert fitted.bank.solver == solver
    counts = np.bincount(train.token_labels[train.token_labels != IGNORE], minlength=3)
    np.testing.assert_array_equal(fitted.counts, counts)
    keep = test.token_labels != IGNORE
    truth = test.token_labels[keep]
    assert fitted.shuffled is not None
    for stage, x in test.features.items():
        real = (fitted.bank.predict(stage, x[keep]) == truth).float().mean()
        drawn = (fitted.shuffled.predict(stage, x[keep]) == truth).float().mean()
        assert real > 0.65
        assert drawn < 0.55  # half of the tokens are sky


@pytest.mark.parametrize(
    "option",
    [{"class_weight": "balanced"}, {"class_weight": {"sand": 5.0}}, {"components": 2}],
    ids=["balanced", "by name", "components"],
)
@pytest.mark.parametrize("solver", ["ridge", "logistic"])
def test_what_a_probe_may_use_reaches_the_solver(solver, option):
    stream = held(600)
    found = Fitting(solver, **option).fit(stream).bank
    if solver == "ridge":
        direct, without = fit_ridge(stream, **option).bank, fit_ridge(stream).bank
    else:
        direct, without = fit_logistic_stream(stream, **option), fit_logistic_stream(stream)
    for stage in stream.widths:
        torch.testing.assert_close(found.weight(stage), direct.weight(stage), atol=1e-6, rtol=0)
        torch.testing.assert_close(
            found.intercept(stage), direct.intercept(stage), atol=1e-6, rtol=0
        )
        assert (found.weight(stage) - without.weight(stage)).abs().max() > 1e-3


@pytest.mark.parametrize("solver", ["ridge", "logistic"])
def test_the_control_is_of_the_seed_and_the_probe_is_not(solver):
    stream = held(600)
    one, again, other = (Fitting(solver).fit(stream, shuffled=True, seed=s) for s in (1, 1, 2))
    for stage in stream.widths:
        assert torch.equal(one.shuffled.weight(stage), again.shuffled.weight(stage))
        apart = one.shuffled.weight(stage) - other.shuffled.weight(stage)
        assert apart.abs().max() > 1e-3
        torch.testing.assert_close(
            one.bank.weight(stage), other.bank.weight(stage), atol=1e-6, rtol=0
        )


def test_weights_of_classes_do_not_change_what_is_counted():
    fitted = Fitting("ridge", class_weight="balanced").fit(held())
    labels = held().token_labels
    np.testing.assert_array_equal(fitted.counts, np.bincount(labels[labels != IGNORE]))


def test_shuffled_labels_are_drawn_once_and_for_all():
    stream = held()
    often = label_counts(stream)
    shuffled = Shuffled(stream, often, seed=3)
    first, again = (dict(shuffled.read([0, 4])) for _ in range(2))
    plain = dict(stream.read([0, 4]))
    for part in (0, 4):
        assert torch.equal(first[part].labels, again[part].labels)
        ignored = plain[part].labels == IGNORE
        assert torch.equal(first[part].labels == IGNORE, ignored)
        assert 0.2 < (first[part].labels == plain[part].labels)[~ignored].float().mean() < 0.6
    ((_, other),) = Shuffled(stream, often, seed=4).read([0])
    assert not torch.equal(first[0].labels, other.labels)
    many = torch.cat([t.labels for _, t in shuffled.read(range(15))])
    often = np.bincount(many[many != IGNORE]) / (many != IGNORE).sum().item()
    np.testing.assert_allclose(often, [0.5, 0.3, 0.2], atol=0.05)


def test_where_features_go_is_said_beforehand():
    widths = {"adapter": 4096, "end": 4096}
    assert Fitting("ridge").where(10**6, widths) == "stream"
    assert Fitting("logistic", memory=40).where(10**6, widths) == "memory"
    assert Fitting("logistic", memory=4, disk=40).where(10**6, widths) == "disk"
    assert Fitting("logistic", memory=4, disk=4).where(10**6, widths) == "stream"
    assert Fitting("logistic", memory=4, epochs=7).passes(10**6, widths) == 8


def test_an_unknown_solver_is_named():
    with pytest.raises(ValueError, match="solver='svm'; there are logistic and ridge"):
        Fitting("svm")
