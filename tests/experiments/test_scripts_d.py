"""The two scripts of the head study: short, and what they print and draw is what is so."""

from __future__ import annotations

import inspect
import re

import pytest
from typer.testing import CliRunner

from interp.attribution import HeadTable
from tests.experiments.test_scripts_c import script

SCRIPTS = ("head_study", "who_steers_whom")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def run(name: str, *arguments: str) -> str:
    import typer

    app = typer.Typer()
    app.command()(script(name).main)
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short(name):
    assert len(inspect.getsource(script(name)).splitlines()) < 60


def test_the_head_study_says_all_it_promises(tmp_path):
    out = tmp_path / "exact.parquet"
    said = run("head_study", "--n", "20", "--out", str(out))
    for words in (
        "exact: 62 forwards",
        "Agreement with exact effects",
        "Verified exactly: 3 of 30",
    ):
        assert words in said
    for words in ("path patching", "minimal heads", "held out"):
        assert words in said
    table = HeadTable.load(out)
    spearman = float(re.search(r"\ngradient +(\S+)", said)[1])
    assert spearman > 0.97
    best = table.top(1).iloc[0]
    assert (best["layer"], best["head"]) == (0, 1)
    assert re.search(r"\n +1 +0\.1 ", said)  # the fewest heads begin with it


def test_who_steers_whom_draws_what_it_cut(tmp_path):
    out = tmp_path / "edges.html"
    said = run("who_steers_whom", "--image", "1", "--n", "5", "--out", str(out))
    rows = re.findall(
        r"^ +(\d+) +(\d+) +(-?\d+) +(\d+) +(-?[\d.]+) +(-?[\d.]+)$", said, re.MULTILINE
    )
    assert len(rows) == 5
    screened, cut = zip(*((float(r[4]), float(r[5])) for r in rows), strict=True)
    assert sorted(map(abs, cut), reverse=True) == list(map(abs, cut))
    assert all(abs(a - b) < 0.3 * abs(b) + 0.005 for a, b in zip(screened, cut, strict=True))
    assert "image 0" in out.read_text()
