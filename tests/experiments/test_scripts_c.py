"""The three scripts of the edits: short, runnable on any model, and their tables say what is so."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from interp import Knockout
from interp.datasets import scenes
from interp.errors import EditHadNoEffect
from interp.probes.fitting import Fitting
from interp.studies import Split
from interp.studies.bidirectional import opened
from interp.studies.conditions import anchor_edges
from interp.studies.knockout import share_gone
from interp.studies.recovery import Baseline, recovery
from interp.studies.result import difference, points
from tests.zoo import build

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SCRIPTS = ("knockout_global", "knockout_windows", "look_ahead")
QUESTION = "What is in the picture?"


def script(name: str):
    """The script as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(text: str) -> dict[str, list[tuple[float, float, float]]]:
    """The printed table: name of the row -> (estimate, low, high) of each cell."""
    number = r"([+-]?[\d.]+)%?"
    cell = re.compile(rf"{number} \[{number}, {number}\]")
    found = {}
    for line in text.splitlines():
        if cells := list(cell.finditer(line)):
            name = line[: cells[0].start()].strip()
            found[name] = [tuple(map(float, c.groups())) for c in cells]
    return found


@pytest.fixture(scope="module")
def splits(tiny):
    return {
        "probe": Split.prepare(tiny, scenes("probe"), 60, QUESTION),
        "test": Split.prepare(tiny, scenes("test"), 10, QUESTION),
    }


@pytest.fixture(scope="module")
def base(splits, tiny):
    """What `recovery` gives, at the two stages that the scripts look at: its controls take long."""
    probe, test = splits["probe"], splits["test"]
    adapter, end = "adapter.hook_out", tiny.stages[-1]
    bank = probe.fit([adapter, end])
    states, seen = probe.read([adapter, end]), test.read([adapter, end])
    said = {stage: bank.predict(stage, state).numpy() for stage, state in seen.items()}
    on_probe = bank.predict(adapter, states[adapter]).numpy()
    return Baseline(probe, test, bank, Fitting(), said, on_probe, adapter, end)


@pytest.fixture
def run(splits, base, monkeypatch, capsys):
    """Run a script on the tiny model, with the images and the baseline from above."""

    def recovered(*args, **options):
        inspect.signature(recovery).bind(*args, **options)
        assert args[:2] == (base.probe, base.test)
        return base, []

    def prepared(model, data, n, question, *, batch_size):
        assert question == QUESTION
        return splits[data.split]

    def run_script(name, **patches):
        module = script(name)
        monkeypatch.setattr(module, "Split", SimpleNamespace(prepare=prepared))
        if hasattr(module, "recovery"):
            monkeypatch.setattr(module, "recovery", recovered)
        for patched, value in patches.items():
            monkeypatch.setattr(module, patched, value)
        module.main()
        return rows(capsys.readouterr().out)

    return run_script


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_short_and_takes_a_model(name):
    text = (EXPERIMENTS / f"{name}.py").read_text()
    assert len(text.splitlines()) < 40
    assert text.startswith('"""')
    app = typer.Typer()
    app.command()(script(name).main)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100", "NO_COLOR": "1"}).output
    assert all(option in shown for option in ("--model", "--n", "--seed"))


def test_global_knockout_by_its_table(run, base):
    table = run("knockout_global")
    assert list(table) == ["none", "right -> wrong", "as many random"]
    (none,), (cut,), (control,) = table.values()
    assert cut[2] < none[1]  # the anchors' cut is below the clean run, beyond both intervals
    assert cut[2] < control[1]
    assert abs(control[0] - none[0]) < 10
    queries, _ = anchor_edges(base)
    share = 100 * base.right(base.readout)[queries].mean()
    assert none[0] == pytest.approx(share, abs=3)  # a few have no control and are left out


def test_windows_that_hold_every_layer_are_the_global_knockout(run, base, tiny):
    table = run("knockout_windows")
    assert list(table) == [f"{w} around" for w in (1, 3, 5)] + [f"head {h}" for h in range(6)]
    assert all(len(cells) == tiny.cfg.n_layers for cells in table.values())
    queries, anchors = anchor_edges(base)
    cuts = [[Knockout(edges)] if len(edges) else [] for edges in base.test.edges(anchors)]
    right = base.hits(base.reread(cuts.__getitem__)[base.readout])
    gone = share_gone(base.test, base.right(base.readout), right, queries, 0)
    assert table["5 around"][2][0] == pytest.approx(100 * gone.estimate, abs=0.5)
    # one layer, and in it one head, hold nearly all of it: in the bundled model it is so
    layer = max(range(5), key=lambda at: table["1 around"][at])
    assert table["1 around"][layer][0] > 0.7 * 100 * gone.estimate
    assert table["5 around"][4][0] == pytest.approx(table["3 around"][3][0], abs=3)
    by_head = [table[f"head {h}"][layer][0] for h in range(6)]
    assert sorted(by_head)[-2] < 0.3 * max(by_head)


def test_look_ahead_runs_from_causal_to_the_whole_image_block(run, tiny):
    few = {s: Split.prepare(tiny, scenes(s), n, QUESTION) for s, n in (("probe", 12), ("test", 6))}
    table = run("look_ahead", Split=SimpleNamespace(prepare=lambda m, d, *a, **k: few[d.split]))
    assert list(table) == [f"{r} rows ahead" for r in (0, 1, 2, 4, 9)]
    assert set(table["0 rows ahead"]) == {(0.0, 0.0, 0.0)}
    probe, test = few["probe"], few["test"]
    end = test.model.stages[-1]
    said = {}
    for name, edits in (("causal", [None, None]), ("block", [opened(probe), opened(test)])):
        bank = probe.fit([end], edits[0])
        said[name] = bank.predict(end, test.read([end], edits[1])[end]).numpy() == test.labels
    counts = {name: test.counts(hits, test.labelled) for name, hits in said.items()}
    gain = rows("all " + points(difference(counts["block"], counts["causal"], 0)))["all"][0]
    assert table["9 rows ahead"][0] == gain
    assert len({tuple(cells) for cells in table.values()}) == 5


def test_a_model_of_another_family_from_a_folder(tmp_path, capsys):
    module, processor = build("qwen2.5-vl")
    module.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    script("look_ahead").main(model=str(tmp_path), n=4)
    assert len(rows(capsys.readouterr().out)["1 rows ahead"]) == 4


def test_a_picture_seen_both_ways_is_told(tmp_path):
    module, processor = build("gemma3")
    module.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(EditHadNoEffect, match="every edge was open already"):
        script("look_ahead").main(model=str(tmp_path), n=4)


def test_nothing_to_cut_is_told(run, base):
    none = [np.zeros_like(array) for array in anchor_edges(base)]
    with pytest.raises(SystemExit, match="try a larger --n"):
        run("knockout_global", anchor_edges=lambda base: none)
