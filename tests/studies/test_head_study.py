"""`interp heads`: a run folder that can be read again, a price beforehand, words for slips."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from interp.attribution import Cost, HeadTable, head_attribution
from interp.cli import app
from interp.probes import ProbeBank
from interp.runs import RunFolder
from interp.studies.head_study import HeadArguments, head_table, prepare

FEW = ["--n-probe", "30", "--n-test", "6", "--batch-size", "4"]


def run(*arguments: str):
    return CliRunner().invoke(app, ["heads", *FEW, *arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("heads") / "run"
    done = run("--out", str(out), "--budget", "0.1")
    assert done.exit_code == 0, done.output
    return out, done.output


def test_the_folder_is_whole_and_says_what_was_asked(folder):
    out, said = folder
    opened = RunFolder.open(out)
    opened.verify()
    assert opened.manifest["kind"] == "heads"
    table = HeadTable.load(out / "heads.parquet")
    assert table.n_images == 6
    assert table.about["start"] == "adapter.hook_out"
    assert json.loads((out / "summary.json").read_text())["about"] == table.about
    assert "Verified exactly: 15 of 150 units" in said
    assert "plotly" in (out / "heatmap.html").read_text()[:20000].lower()


def test_its_verified_numbers_are_those_of_the_library(folder, tiny):
    """The same pictures and the saved probes, every unit exact."""
    out, _ = folder
    table = HeadTable.load(out / "heads.parquet")
    arguments = HeadArguments("tiny", n_probe=30, n_test=6, batch_size=6)
    asked = prepare(tiny, arguments)
    bank = ProbeBank.load(out / "probes.safetensors")
    exact = head_attribution(tiny, asked.batches, bank, labels=asked.labels, method="exact")
    keys = ["layer", "head", "source", "image"]
    both = table.rows.merge(exact.rows, on=keys, suffixes=("", "_exact"))
    checked = both[both["verified"]]
    assert len(checked) == 30 * table.rows["image"].nunique()
    assert (checked["estimate"] - checked["estimate_exact"]).abs().max() < 1e-4


def test_a_dry_run_says_what_it_costs_and_writes_nothing(tmp_path):
    done = run("--dry-run", "--method", "exact", "--out", str(tmp_path / "none"))
    assert done.exit_code == 0
    assert "forwards" in done.output
    assert "GB beyond the weights" in done.output
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "x", "--method", "guess"], "there are screen, direct, gradient, exact"),
        (["--out", "x", "--data", "ade20k"], "says no place: ade20k:PATH"),
        (["--out", "x", "--sources", "sky"], "the kinds of groups"),
        (["--out", "x", "--end", "blocks.9.hook_resid_post"], "blocks.9"),
        ([], "--out is missing"),
    ],
)
def test_slips_are_told(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 1
    assert words in done.output
    assert not list(tmp_path.iterdir())


def test_a_method_has_a_price_of_its_own(tiny):
    asked = prepare(tiny, HeadArguments("tiny", n_probe=30, n_test=6))
    price = {
        method: head_table(tiny, asked, HeadArguments("tiny", method=method), dry_run=True)
        for method in ("direct", "gradient", "exact", "screen")
    }
    assert all(isinstance(one, Cost) for one in price.values())
    assert price["direct"].blocks < price["gradient"].blocks < price["screen"].blocks
    assert price["screen"].blocks < price["exact"].blocks
