"""The overhead benchmark: it compares equals, and its arithmetic is right. No time is judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments/benchmarks"))

import measure  # noqa: E402
import overhead  # noqa: E402
import tables  # noqa: E402
from peers import PEERS, QUICK, Bench, count_forwards, plain  # noqa: E402
from settings import SETTINGS, Setting  # noqa: E402

MIB = 2**20


@pytest.fixture(scope="module")
def bench():
    return Bench.build(QUICK, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The script's own run on the tiny model, with both of its files."""
    folder = tmp_path_factory.mktemp("overhead")
    page = folder / "page.md"
    page.write_text(f"before\n\n{tables.BEGIN}\nold\n{tables.END}\n\nafter\n")
    out = folder / "numbers.json"
    arguments = ["--quick", "--rounds", "2", "--json", str(out), "--docs", str(page)]
    report = overhead.main(arguments)
    return report, json.loads(out.read_text()), page.read_text()


def with_call(call, **more) -> Setting:
    """A setting in which plain sdpa is one peer and `call` the other."""
    return Setting("made up", lambda b: {"sdpa": lambda: (_clean(b), []), "eager": call}, **more)


def _clean(bench) -> torch.Tensor:
    return plain(bench.sdpa, bench.tensors)


def checked(bench, setting) -> float:
    calls = {(setting.title, peer): call for peer, call in setting.make(bench).items()}
    return overhead.check(bench, setting, calls)


# -- the whole script ------------------------------------------------------------------------------


def test_every_peer_has_a_number_or_a_reason_in_every_setting(ran):
    report, numbers, _ = ran
    cells = {(cell["setting"], cell["peer"]): cell for cell in numbers["cells"]}
    assert set(cells) == {(s.title, peer) for s in SETTINGS for peer in PEERS}
    for (title, peer), cell in cells.items():
        assert ("why_not" in cell) != ("ratios" in cell), (title, peer)
        if "why_not" in cell:
            assert len(cell["why_not"]) > 10
        else:
            assert len(cell["ratios"]) == 2
            assert all(ratio > 0 for ratio in cell["ratios"])
    assert all((s.title, "interp") in report.times for s in SETTINGS)


def test_all_peers_compute_the_same(ran):
    report, _, _ = ran
    assert 0 < report.difference < 1e-4  # 0 would mean that nothing was compared


def test_what_is_kept_is_counted(ran, bench):
    report, _, _ = ran
    cfg, n = bench.ours.cfg, QUICK.n_pos
    language = cfg.n_layers * cfg.n_heads * n**2
    vision = cfg.n_vision_layers * cfg.n_vision_heads * (QUICK.side**2 + 1) ** 2
    memory = report.memory["all patterns read", "interp"]
    assert memory.kept == memory.held == 4 * (language + vision)
    assert memory.peak > memory.kept
    assert ("idle", "interp") not in report.memory


def test_the_page_keeps_its_own_words(ran):
    report, _, page = ran
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "old" not in page
    assert report.markdown() in page
    assert "overhead.py --quick" in page


def test_a_page_without_markers_is_refused_before_anything_runs(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no place here")
    with pytest.raises(ValueError, match="no place for the tables"):
        overhead.main(["--quick", "--docs", str(page)])
    assert page.read_text() == "no place here"


def test_the_documented_page_has_markers():
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert tables.into_page(page, "block") != page


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit):
        overhead.main(["--quick", "--only", "no such row"])
    assert "'all patterns read'" in capsys.readouterr().err


# -- the check that the peers are equal ------------------------------------------------------------


def test_other_logits_are_unequal(bench):
    def skewed():
        logits = plain(bench.eager, bench.tensors)
        return logits + 2e-4 * (torch.arange(logits.shape[-1]) == 7), []

    with pytest.raises(overhead.Unequal, match="logits of eager and sdpa differ by 2"):
        checked(bench, with_call(skewed))


def test_other_states_are_unequal(bench):
    with pytest.raises(overhead.Unequal, match="eager keeps 1 tensors, sdpa keeps 0"):
        checked(bench, with_call(lambda: (_clean(bench), [torch.ones(1)])))


def test_a_second_forward_is_noticed(bench):
    with pytest.raises(overhead.Unequal, match="2 times instead of once"):
        checked(bench, with_call(lambda: (_clean(bench) + 0 * _clean(bench), [])))
    assert count_forwards(lambda: None) == 0


def test_an_edit_that_edits_nothing_is_noticed(bench):
    with pytest.raises(overhead.Unequal, match="does not move the logits"):
        checked(bench, with_call(lambda: (_clean(bench), []), edits=True))


# -- time and memory -------------------------------------------------------------------------------


def test_ratios_are_to_the_runs_before_and_after(monkeypatch):
    """On a clock that we hold: a machine that gets slower and slower still gives the ratios."""
    clock = {"now": 0.0, "slow": 1.0}

    def takes(seconds):
        def call():
            clock["now"] += seconds * clock["slow"]
            clock["slow"] *= 1.01

        return call

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)  # slow, and of no matter here
    calls = {"same": takes(1.0), "double": takes(2.0), "triple": takes(3.0), "half": takes(0.5)}
    times, plain_seconds = measure.interleaved(calls, takes(1.0), rounds=21, warmup=1)
    assert plain_seconds[-1] > 2 * plain_seconds[0]
    for key, true in {"same": 1, "double": 2, "triple": 3, "half": 0.5}.items():
        assert len(times[key].ratios) == 21
        assert times[key].median == pytest.approx(true, rel=0.02)
        low, high = times[key].quartiles
        assert low <= times[key].median <= high


def test_peak_is_the_most_that_was_there_at_once():
    def call():
        first = torch.ones(3 * MIB // 4)  # 3 MiB
        second = torch.ones(MIB // 4)  # 1 MiB
        del first
        third = torch.ones(2 * MIB // 4)
        return second, third

    assert measure.peak_bytes(call, "cpu") / MIB == pytest.approx(4, abs=0.01)


def test_a_view_keeps_all_of_its_memory():
    whole = torch.ones(1000)
    assert measure.kept_bytes([whole[:10], whole[:30]]) == (120, 4000)
    assert measure.kept_bytes([whole, torch.ones(5)]) == (4020, 4020)
