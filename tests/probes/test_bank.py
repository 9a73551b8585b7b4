"""The bank: right stage, right class, same bytes after a round trip, and errors that help."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.exceptions import ConvergenceWarning

from interp.labels import IGNORE
from interp.probes.bank import UNSEEN, ProbeBank
from interp.probes.linear import LinearProbe

CLASSES = ("sky", "sea", "sand", "ship", "sun")


def tokens(n: int = 400, seed: int = 0):
    """Five classes of which `ship` never occurs; three stages in two widths; some ignored."""
    g = torch.Generator().manual_seed(seed)
    y = torch.tensor([0, 1, 2, 4])[torch.randint(0, 4, (n,), generator=g)]
    features = {}
    for name, width, signal in (("vision.3", 6, 0.5), ("adapter", 9, 1.0), ("blocks.0", 6, 2.0)):
        means = torch.randn(5, width, generator=g) * signal
        features[name] = means[y] + torch.randn(n, width, generator=g) + 3
    y[::7] = IGNORE
    return features, y


@pytest.fixture(scope="module")
def fitted():
    features, y = tokens()
    return ProbeBank.fit(features, y, CLASSES), features, y


def test_stages_keep_their_order_and_their_own_probe(fitted):
    bank, features, y = fitted
    assert bank.stages == ("vision.3", "adapter", "blocks.0")
    keep = y != IGNORE
    for name, x in features.items():
        one = LinearProbe().fit(x[keep].numpy(), y[keep].numpy())
        want = torch.tensor(one.predict_proba(x.numpy()))
        got = bank.logits(name, x).softmax(-1)
        torch.testing.assert_close(got[:, [0, 1, 2, 4]], want, atol=2e-3, rtol=0)
    share = [
        float((bank.predict(n, x)[keep] == y[keep]).float().mean()) for n, x in features.items()
    ]
    assert share[0] < share[1] < share[2]


def test_ignored_tokens_have_no_say(fitted):
    bank, features, y = fitted
    spoilt = {name: x.clone() for name, x in features.items()}
    for x in spoilt.values():
        x[y == IGNORE] = 1e6
    again = ProbeBank.fit(spoilt, y, CLASSES)
    assert all(torch.equal(bank.weight(s), again.weight(s)) for s in bank.stages)


def test_logits_predict_and_margins_agree(fitted):
    bank, features, _ = fitted
    x = features["adapter"].reshape(20, 20, 9)
    logits = bank.logits("adapter", x)
    assert logits.shape == (20, 20, 5)
    assert torch.equal(bank.predict("adapter", x), logits.argmax(-1))
    assert bank.predict("adapter", x).dtype == torch.int64
    true, other = torch.tensor(4).expand(20, 20), torch.randint(0, 3, (20, 20))
    margin = (x * bank.direction("adapter", true, other)).sum(-1)
    margin = margin + bank.bias("adapter", true, other)
    want = logits.gather(-1, true[..., None]) - logits.gather(-1, other[..., None])
    torch.testing.assert_close(margin, want[..., 0], atol=1e-4, rtol=1e-4)
    # a broadcast class, and half-precision states
    assert bank.direction("adapter", 4, other).shape == (20, 20, 9)
    assert bank.logits("adapter", x.bfloat16()).dtype == torch.float32


def test_an_unseen_class_never_wins(fitted):
    bank, _, _ = fitted
    assert bank.seen == (True, True, True, False, True)
    assert bool((bank.weight("adapter")[3] == 0).all())
    assert bank.intercept("adapter")[3] == UNSEEN
    far = torch.randn(2000, 9) * torch.logspace(-2, 5, 2000)[:, None]
    logits = bank.logits("adapter", far)
    assert 3 not in logits.argmax(-1).tolist()
    # why: the fitted logits sum to zero, so one of them is never below zero
    near = bank.logits("adapter", far[:500])[:, [0, 1, 2, 4]]
    assert float(near.sum(-1).abs().max()) < 1e-2
    assert bool(torch.isfinite(logits).all())


def test_round_trip_gives_equal_bytes(fitted, tmp_path):
    bank, features, _ = fitted
    bank.save(tmp_path / "a.safetensors")
    loaded = ProbeBank.load(tmp_path / "a.safetensors")
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    for field in ("stages", "classes", "seen", "solver", "penalty", "n_iter", "converged"):
        assert getattr(loaded, field) == getattr(bank, field)
    for name, x in features.items():
        assert torch.equal(loaded.logits(name, x), bank.logits(name, x))


def test_a_file_of_the_first_format_has_one_penalty_for_all(fitted, tmp_path):
    bank, _, _ = fitted
    bank.save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        about = json.loads(file.metadata()["interp"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del about["penalty"], about["solver"]
    about |= {"format": "interp.ProbeBank/1", "C": 0.25}
    save_file(tensors, tmp_path / "old.safetensors", metadata={"interp": json.dumps(about)})
    old = ProbeBank.load(tmp_path / "old.safetensors")
    assert (old.solver, set(old.penalty.values())) == ("logistic", {4.0})
    assert list(old.penalty) == list(bank.stages)


def test_a_failed_save_leaves_the_old_file(fitted, tmp_path, monkeypatch):
    bank, _, _ = fitted
    path = tmp_path / "bank.safetensors"
    bank.save(path)
    before = path.read_bytes()

    def full(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("interp.probes.bank.save_file", full)
    with pytest.raises(OSError, match="no space"):
        bank.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_another_safetensors_file_is_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is not a file that ProbeBank"):
        ProbeBank.load(tmp_path / "other.safetensors")


def test_stages_at_once_and_order_of_stages_change_nothing_that_counts(fitted):
    bank, features, y = fitted
    calls: list[tuple[int, int]] = []
    single = ProbeBank.fit(
        features, y, CLASSES, stages_at_once=1, progress=lambda done, of: calls.append((done, of))
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]
    for name, x in features.items():
        torch.testing.assert_close(
            single.logits(name, x)[:, :3], bank.logits(name, x)[:, :3], atol=5e-3, rtol=1e-2
        )


def test_features_stay_as_they_are_and_half_precision_is_fitted_in_float32():
    features, y = tokens()
    half = {name: x.bfloat16() for name, x in features.items()}
    before = {name: x.clone() for name, x in half.items()}
    bank = ProbeBank.fit(half, y, CLASSES)
    assert all(torch.equal(half[name], before[name]) for name in half)
    assert bank.weight("adapter").dtype == torch.float32
    wide = ProbeBank.fit({n: x.double() for n, x in half.items()}, y, CLASSES)
    assert wide.weight("adapter").dtype == torch.float32
    x = half["adapter"]
    assert bool((wide.predict("adapter", x) == bank.predict("adapter", x)).float().mean() > 0.99)


def test_repr_tells_stages_and_classes(fitted):
    text = repr(fitted[0])
    assert text == (
        "ProbeBank(3 stages: 'vision.3', 'adapter', 'blocks.0'; "
        "5 classes: 'sky', 'sea', 'sand', 'ship', 'sun')"
    )


def test_unknown_stage_names_the_nearest(fitted):
    with pytest.raises(KeyError, match=r"no probe at 'blocks\.1'.*blocks\.0"):
        fitted[0].predict("blocks.1", torch.zeros(6))
    with pytest.raises(KeyError, match=r"vision\.3, adapter, blocks\.0"):
        fitted[0].weight("zzz")


def test_shape_and_label_errors_name_what_came(fitted):
    bank, features, y = fitted
    with pytest.raises(ValueError, match=r"'adapter' reads states \[..., 9\], got \[4, 6\]"):
        bank.logits("adapter", torch.zeros(4, 6))
    for wrong in (IGNORE, -1):
        with pytest.raises(ValueError, match=rf"classes are 0..4, got \[{wrong}\]"):
            bank.direction("adapter", torch.tensor([wrong]), 0)

    def fit(features=features, y=y, classes=CLASSES):
        return ProbeBank.fit(features, y, classes)

    with pytest.raises(ValueError, match=r"labels must be 0..2 or 255, got \[0, 1, 2, 4\]"):
        fit(classes=CLASSES[:3])
    with pytest.raises(ValueError, match=r"stage 'adapter' must be floats \[400, width\]"):
        fit(features | {"adapter": features["adapter"][:-1]})
    with pytest.raises(ValueError, match="labels must be integers"):
        fit(y=y.float())
    with pytest.raises(ValueError, match=r"at least two classes, got \[\] in 400 labels"):
        fit(y=torch.full_like(y, IGNORE))
    with pytest.raises(ValueError, match="features is empty"):
        fit({})
    with pytest.raises(ValueError, match="make 255"):
        fit(classes=[str(i) for i in range(256)])
    broken = features | {"adapter": features["adapter"].clone()}
    broken["adapter"][5, 2] = torch.inf
    with pytest.raises(ValueError, match="stage 'adapter' holds nan or infinite"):
        fit(broken)


def test_a_fit_cut_short_names_its_stages():
    features, y = tokens()
    with pytest.warns(ConvergenceWarning, match=r"3 of 3 .* vision.3, adapter, blocks.0"):
        bank = ProbeBank.fit(features, y, CLASSES, max_iter=1)
    assert not any(bank.converged.values())


def test_to_moves_every_tensor(fitted):
    moved = fitted[0].to("meta")
    assert moved.weight("adapter").device.type == "meta"
    assert moved.intercept("adapter").device.type == "meta"
    assert fitted[0].weight("adapter").device.type == "cpu"


def test_the_probes_of_some_stages_hold_nothing_of_the_others(fitted):
    bank, features, _ = fitted
    stage, *_ = bank.stages
    for few in (bank.only([stage]), bank.readout([stage]), bank.readout().only([stage])):
        assert few.stages == (stage,)
        assert set(few.weights) == set(few.intercepts) == {stage}
        assert torch.equal(few.logits(stage, features[stage]), bank.logits(stage, features[stage]))
    assert set(bank.only([stage]).penalty) == set(bank.only([stage]).n_iter) == {stage}
