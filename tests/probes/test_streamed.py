"""Streams: the same probes wherever features are, with any number of processes.

Run as a script, this file is the processes: `python test_streamed.py FOLDER`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from interp.labels import IGNORE
from interp.probes import store, streamed
from interp.probes.bank import UNSEEN, ProbeBank
from interp.probes.moments import Frame
from interp.probes.ridge import fit_ridge
from interp.probes.stream import Held
from interp.probes.streamed import fit_logistic_stream
from interp.world import World

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
# minibatches of a few parts stop short of their bound, which only some of these tests are about
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

NAMES = [f"class {i}" for i in range(6)]


def states(n: int, n_classes: int, widths: dict[str, int], signal=0.6, seed: int = 0, power=1.0):
    """Correlated features of uneven scale, far from zero; classes from frequent to rare."""
    rng = np.random.default_rng(seed)
    share = 1.0 / (1 + np.arange(n_classes)) ** power
    y = rng.choice(n_classes, n, p=share / share.sum())
    made = {}
    for stage, d in widths.items():
        spectrum = (1.0 + np.arange(d)) ** -0.7
        turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
        means = signal * rng.normal(size=(n_classes, d))
        noise = rng.normal(size=(n, d)) * rng.uniform(0.5, 1.5, (n, 1))
        x = ((means[y] * rng.uniform(0, 2, (n, 1)) + noise) * spectrum) @ turn
        scale = np.exp(rng.normal(size=d))
        scale[0] *= 1000
        made[stage] = torch.tensor(x * scale + 20 * scale * rng.normal(size=d)).float()
    return made, torch.tensor(y)


def small():
    """Class 4 has no token; some tokens are ignored, among them a whole part."""
    x, y = states(1500, 6, {"a": 8, "b": 12, "c": 8})
    y[y == 4] = 3
    y[::11] = IGNORE
    y[200:300] = IGNORE
    return x, y, Held(x, y, NAMES, tokens_a_part=100)


def value(bank: ProbeBank, stage, x, y, C=1.0) -> float:
    """The mean objective per token in float64, from the definition."""
    seen = torch.tensor(bank.seen)
    x, w, b = x.double(), bank.weight(stage).double()[seen], bank.intercept(stage).double()[seen]
    index = (torch.cumsum(seen, 0) - 1)[y]
    loss = torch.nn.functional.cross_entropy(x @ w.T + b, index, reduction="sum")
    return float(loss + (w * x.std(0, correction=0)).square().sum() / (2 * C)) / len(y)


def accuracy(bank, stage, x, y) -> float:
    return float((bank.predict(stage, x) == y).float().mean())


def scores_agree(ours, theirs, x, atol):
    for stage in theirs.stages:
        seen = torch.tensor(theirs.seen)
        a, b = (bank.logits(stage, x[stage])[:, seen] for bank in (ours, theirs))
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


# -- kept ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_kept_features_give_the_probes_of_features_in_memory(place, tmp_path, monkeypatch):
    x, y, stream = small()
    whole = ProbeBank.fit(x, y, NAMES, tol=1e-6)
    used = []
    monkeypatch.setattr(streamed, place.title(), noted(getattr(streamed, place.title()), used))
    room = {"memory": {"budget": GIB}, "disk": {"budget": 0, "disk": GIB, "folder": tmp_path}}
    bank = fit_logistic_stream(stream, tol=1e-6, **room[place])
    assert used == [place.title()]
    assert not list(tmp_path.iterdir())
    scores_agree(bank, whole, x, 2e-3 if place == "memory" else 0.1)
    keep = y != IGNORE
    for stage in x:
        right = accuracy(whole, stage, x[stage][keep], y[keep])
        assert abs(accuracy(bank, stage, x[stage][keep], y[keep]) - right) < 0.005
    assert bank.seen == (True, True, True, True, False, True)
    assert bool((bank.weight("a")[4] == 0).all())
    assert bank.intercept("a")[4] == UNSEEN
    assert (bank.solver, bank.penalty) == ("logistic", dict.fromkeys("abc", 1.0))
    assert all(bank.converged.values())


def noted(make, used):
    def call(*args):
        used.append(make.__name__)
        return make(*args)

    return call


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("budget", [0, GIB])
def test_class_weights_and_shares_go_all_the_way(soft, budget):
    x, y, _ = small()
    shares = None
    if soft:
        shares = torch.eye(6)[y.clamp_max(5)]
        shares = 0.8 * shares + 0.2 * shares[:, [1, 0, 3, 2, 4, 5]]
    heavy = {"class 2": 4.0, "class 0": 0.5}
    whole = ProbeBank.fit(x, y, NAMES, class_weight=heavy, shares=shares, tol=1e-6, C=0.1)
    plain = ProbeBank.fit(x, y, NAMES, tol=1e-6, C=0.1)
    stream = Held(x, y, NAMES, shares, tokens_a_part=100)
    bank = fit_logistic_stream(
        stream, class_weight=heavy, budget=budget, tol=1e-6, C=0.1, epochs=30, parts_a_step=5
    )
    for stage in x:
        a, b, c = (g.logits(stage, x[stage])[:, [0, 1, 2, 3, 5]] for g in (bank, whole, plain))
        apart, far = float((a - b).abs().mean()), float((c - b).abs().mean())
        assert apart < (1e-3 if budget else 0.2 * far)


def test_components_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    x, y, stream = small()
    keep = y != IGNORE
    for budget, atol in ((GIB, 5e-3), (0, 0.15)):
        bank = fit_logistic_stream(
            stream, components=5, budget=budget, tol=1e-7, epochs=30, parts_a_step=5
        )
        for stage in x:
            scaler = StandardScaler().fit(x[stage][keep].double())
            z = scaler.transform(x[stage].double())
            z = PCA(5).fit(z[keep]).transform(z)
            model = LogisticRegression(tol=1e-9, solver="newton-cholesky").fit(z[keep], y[keep])
            want = model.decision_function(z)
            got = bank.logits(stage, x[stage])[:, [0, 1, 2, 3, 5]].numpy()
            assert np.abs(got - (want - want.mean(1, keepdims=True))).max() < atol * np.ptp(want)


def test_a_disk_that_fills_up_is_given_up(tmp_path, monkeypatch):
    _, _, stream = small()

    def add(self, z, targets, before=store.Disk.add):
        if len(self._parts) == 4:
            raise OSError(28, "No space left on device")
        before(self, z, targets)
        assert len(list(tmp_path.iterdir())) == 1

    want = fit_logistic_stream(stream, budget=0)
    left = []
    monkeypatch.setattr(store.Disk, "add", add)
    with pytest.warns(UserWarning, match="not kept, more passes .* No space left"):
        bank = fit_logistic_stream(
            stream, budget=0, disk=GIB, folder=tmp_path,
            progress=lambda turn, part: left.append((turn, part, len(list(tmp_path.iterdir())))),
        )  # fmt: skip
    # parts 0 to 3 were kept; what they took is free again before anything else is read
    assert [n for _, _, n in left] == [1] * 4 + [0] * (len(left) - 4)
    assert all(torch.equal(bank.weight(s), want.weight(s)) for s in bank.stages)


def test_a_store_that_is_given_up_takes_no_more():
    _, _, stream = small()
    kept = store.Memory()
    frame = Frame.of(next(iter(stream.read([0])))[1])
    keeping = streamed.Keeping(stream, kept, None, frame, 1500)
    list(keeping.read([0, 1]))
    assert len(kept.z) == 2
    keeping.drop()
    list(keeping.read([2]))
    assert len(kept.z) == 2


# -- minibatches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_classes", "signal", "gap"), [(10, 0.25, 0.001), (150, 0.7, 0.02)], ids=["10", "150 rare"]
)
def test_minibatches_come_close_to_the_optimum(n_classes, signal, gap):
    x, y = states(36_000, n_classes, {"a": 48}, signal, seed=1)
    names = [str(i) for i in range(n_classes)]
    fit, test = slice(0, 30_000), slice(30_000, None)
    train = {"a": x["a"][fit]}
    best = ProbeBank.fit(train, y[fit], names, tol=1e-5)
    stream = Held(train, y[fit], names, tokens_a_part=1500)
    bank = fit_logistic_stream(stream, budget=0)
    least, ours = (value(b, "a", x["a"][fit], y[fit]) for b in (best, bank))
    assert least - 1e-4 < ours < least + gap * max(1, least)
    right = accuracy(best, "a", x["a"][test], y[test])
    assert abs(accuracy(bank, "a", x["a"][test], y[test]) - right) < 0.005
    assert right > 1.3 * float(torch.bincount(y).max()) / len(y)
    # the steps are worth something: the discriminant from the first pass is further away
    one = fit_logistic_stream(stream, budget=0, epochs=1, parts_a_step=20)
    assert value(one, "a", x["a"][fit], y[fit]) - least > 2 * (ours - least)


@dataclass(frozen=True, eq=False)
class Watched(Held):
    seen: list = field(default_factory=list)

    def read(self, parts):
        for part, tokens in super().read(parts):
            self.seen.append(part)
            yield part, tokens


def test_passes_are_told_shuffled_and_the_same_again():
    x, y, _ = small()
    stream = Watched(x, y, NAMES, tokens_a_part=100)
    told = []
    first = fit_logistic_stream(stream, budget=0, epochs=3, progress=lambda *at: told.append(at))
    assert stream.seen[0] == 0  # for the units
    orders = [stream.seen[1 + 15 * i : 16 + 15 * i] for i in range(4)]
    assert orders[0] == list(range(15))
    assert all(sorted(order) == orders[0] for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert told == [(i, part) for i, order in enumerate(orders) for part in order]
    again = fit_logistic_stream(stream, budget=0, epochs=3)
    other = fit_logistic_stream(stream, budget=0, epochs=3, seed=1)
    assert all(torch.equal(first.weight(s), again.weight(s)) for s in first.stages)
    assert not torch.equal(first.weight("a"), other.weight("a"))
    assert set(first.n_iter.values()) == {3}
    kept = Watched(x, y, NAMES, tokens_a_part=100)
    fit_logistic_stream(kept, budget=GIB)
    assert kept.seen == [0, *range(15)]  # one pass, and no more


def test_a_probe_that_is_far_from_done_is_named():
    x, y, stream = small()
    x["b"][:, 0] = y.clamp_max(5) + 0.01 * torch.randn(len(y))  # one stage that is hard to finish
    with pytest.warns(ConvergenceWarning, match="probes ended with a mean gradient of up to"):
        bank = fit_logistic_stream(stream, budget=GIB, max_iter=2)
    assert not any(bank.converged.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(fit_logistic_stream(small()[2], budget=0, epochs=8).converged.values())


def test_wrong_input_is_told():
    x, y, stream = small()
    with pytest.raises(ValueError, match="more labelled tokens than n_tokens=1000"):
        fit_logistic_stream(stream, n_tokens=1000)
    with pytest.raises(ValueError, match="at least 1, got 0, 1"):
        fit_logistic_stream(stream, epochs=0)
    with pytest.raises(ValueError, match="C must be positive, got -1"):
        fit_logistic_stream(stream, C=-1.0)
    with pytest.raises(ValueError, match=r"two classes; the labels hold \['class 1'\]"):
        fit_logistic_stream(Held(x, torch.ones_like(y), NAMES, tokens_a_part=100))
    with pytest.raises(OSError, match="free in the folder"):
        fit_logistic_stream(stream, budget=0, disk=10**18, n_tokens=10**15)


# -- several processes -----------------------------------------------------------------------------


def all_ways(world: World) -> dict[str, ProbeBank]:
    _, _, stream = small()
    return {
        "memory": fit_logistic_stream(stream, world=world, budget=GIB, class_weight="balanced"),
        "disk": fit_logistic_stream(stream, world=world, budget=0, disk=GIB),
        "steps": fit_logistic_stream(stream, world=world, budget=0, parts_a_step=4),
        "one part a step": fit_logistic_stream(stream, world=world, budget=0, epochs=1),
        "ridge": fit_ridge(stream, world=world, components=6).bank,
    }


def main() -> None:
    """Five processes in two worlds: each fits, and writes what came out.

    They are forked after the imports, which take longer than everything else.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    children = []
    for size in (2, 3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in range(size):
            if pid := os.fork():
                children.append(pid)
                continue
            status = 1
            try:
                os.environ.update({**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                with World.join(timeout=60) as world:
                    for way, bank in all_ways(world).items():
                        bank.save(f"{sys.argv[1]}/of{size}.{way}.{rank}")
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
    sys.exit(any(os.waitpid(pid, 0)[1] for pid in children))


def test_two_and_three_processes_find_what_one_finds(tmp_path):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    running = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    alone = all_ways(World())
    _, said = running.communicate(timeout=120)
    assert running.returncode == 0, said
    for way, want in alone.items():
        for size in (2, 3):
            banks = [ProbeBank.load(f"{tmp_path}/of{size}.{way}.{r}") for r in range(size)]
            for stage in want.stages:
                for bank in banks:
                    assert torch.equal(bank.weight(stage), banks[0].weight(stage))
                    assert torch.equal(bank.intercept(stage), banks[0].intercept(stage))
                exact = 0 if way == "ridge" else 1e-6
                got = banks[0].weight(stage)
                torch.testing.assert_close(got, want.weight(stage), rtol=exact, atol=exact)


if __name__ == "__main__":
    main()
