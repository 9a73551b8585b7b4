"""The probe benchmark: it compares equals, and its law is a fit. No time is judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments/benchmarks"))

import probe_costs  # noqa: E402
import probe_features  # noqa: E402
import probes  # noqa: E402


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The script's own run on tiny features, with its files."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("probes")
    page, out = folder / "page.md", folder / "numbers.json"
    page.write_text(f"before\n\n{probes.BEGIN}\nstale words\n{probes.END}\n\nafter\n")
    files = ["--json", str(out), "--docs", str(page), "--threads", str(threads)]
    report = probes.main(["--quick", *files])
    return report, page.read_text(), json.loads(out.read_text())


def test_every_way_has_times_and_the_page_its_own_words(ran):
    report, page, numbers = ran
    assert set(report.rows) == set(probes.WAYS)
    for way, row in report.rows.items():
        assert len(row.seconds) == (1 if way in probes.ONCE else 2)
        assert min(row.seconds) > 0
        ours = way in ("ridge", "logistic", "stored", "minibatch")
        assert row.stages == (2 if ours else 1)
        assert 0.75 < row.accuracy < 0.95 or way == "newcomer"
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "stale words" not in page
    assert report.markdown() in page
    assert "probes.py --quick" in page
    assert numbers["rows"]["logistic"]["seconds"] == report.rows["logistic"].seconds
    assert [cost.way for cost in report.costs] == ["ridge", "logistic"]


def test_ratios_are_of_the_fastest_rounds():
    row = probes.Row
    report = probes.Report(
        {"prepared": row([8.0, 4.0]), "newcomer": row([90.0]), "logistic": row([3.0, 0.5])}, [], {}
    )
    text = report.markdown()
    assert "8.0 (goal 4, prepared); 180.0 (goal 50, newcomer)" in text
    assert "| 4.000 to 8.000 |" in text
    del report.rows["newcomer"]  # as `--only` does
    assert "| 8.0 (goal 4, prepared) |" in report.markdown()


def test_a_way_that_is_worse_is_not_compared():
    def rows(**accuracies):
        return {way: probes.Row([1.0], accuracy) for way, accuracy in accuracies.items()}

    probes.check(rows(prepared=0.800, logistic=0.796, newcomer=0.7))
    with pytest.raises(probes.Unequal, match=r"logistic is -0\.60 points from prepared"):
        probes.check(rows(prepared=0.800, logistic=0.794))
    with pytest.raises(probes.Unequal, match=r"ridge is \+0\.60 points from classifier"):
        probes.check(rows(classifier=0.700, ridge=0.706, prepared=0.9))
    with pytest.raises(probes.Unequal, match="logistic is less accurate than newcomer"):
        probes.check(rows(prepared=0.800, logistic=0.796, newcomer=0.802))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_verdicts_are_those_of_the_way():
    data = probe_features.draw(2, 900, 8, 3)
    for way in ("prepared", "classifier", "logistic", "minibatch"):
        fitted = probes.WAYS[way][1](data)
        said = fitted.said[data.first]()
        assert said.shape == data.test_labels.shape
        assert probes.accuracy(data, fitted) == pytest.approx(
            np.mean([a == b for a, b in zip(said, data.test_labels.tolist(), strict=True)])
        )


def test_features_are_unlike_a_textbooks():
    data = probe_features.draw(2, 6000, 64, 10)
    x = data.fit["stage 1"].double()
    assert len(data.test_labels) == 2000
    assert data.test["stage 1"].shape == (2000, 64)
    assert float(x.std(0).max() / x.std(0).median()) > 300
    assert float((x.mean(0).abs() / x.std(0)).median()) > 1
    spectrum = torch.linalg.eigvalsh(torch.corrcoef(x.T))
    assert float(spectrum[-1] / spectrum[0]) > 20
    plain = probe_features.draw(1, 6000, 64, 10, power=0)
    spectrum = torch.linalg.eigvalsh(torch.corrcoef(plain.fit["stage 0"].double().T))
    assert float(spectrum[-1] / spectrum[0]) < 3
    assert not torch.equal(data.fit["stage 0"], data.fit["stage 1"])


def test_the_law_is_found_again():
    truth = [0.01, 0.002, 3e-9, 0.0, 5e-11]
    values = [probe_costs.terms(**sizes, passes=9) for sizes in probe_costs.grid()]
    seconds = [float(np.dot(truth, row)) for row in values]
    found = probe_costs.law("ours", values, seconds)
    assert found.coefficients == pytest.approx(truth, rel=1e-4, abs=1e-15)
    assert max(map(abs, found.errors)) < 1e-6
    assert found.seconds(2, 100, 8, 3, 5) == pytest.approx(
        0.01 + 0.004 + 3e-9 * 1600 + 5e-11 * 1600 * 15
    )
    noisy = probe_costs.law(
        "ours", values, [s * (1.5 if i % 2 else 1) for i, s in enumerate(seconds)]
    )
    assert max(map(abs, noisy.errors)) > 0.1
    assert min(noisy.coefficients) >= 0


def test_the_grid_varies_one_thing_at_a_time():
    first, *rest, last = probe_costs.grid()
    assert all(sum(a[k] != first[k] for k in first) == 1 for a in rest)
    assert all(last[k] != first[k] for k in first)
    assert all(len({sizes[k] for sizes in (first, *rest)}) == 4 for k in first)


def test_a_page_without_markers_is_refused_before_anything_runs(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no place here")
    with pytest.raises(ValueError, match="no place for the tables"):
        probes.main(["--quick", "--docs", str(page)])
    assert page.read_text() == "no place here"
