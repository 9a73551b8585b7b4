"""The head benchmark: its loops compute what is asked, it compares equals, its law is a fit.

The arbiter is a loop of its own, on plain transformers: eager attention in double precision and
torch's own hooks; no nnsight, no bridge, and nothing of this library's. No time is judged.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments/benchmarks"))

import head_fit  # noqa: E402
import head_loops  # noqa: E402
import head_report  # noqa: E402
import heads  # noqa: E402
from peers import QUICK, Bench, hooked, text_blocks  # noqa: E402

N_HEADS = QUICK.n_heads


@pytest.fixture(scope="module")
def bench():
    return Bench.build(QUICK, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def made(bench):
    """Cases, and the bank."""
    return head_loops.cases(bench.ours, bench.x.prompts[0], QUICK.side, 2)


@pytest.fixture(scope="module")
def arbiter(bench, made):
    """The effects of every head of each case, `[layer, head]` in double precision."""
    module = copy.deepcopy(bench.eager).double()
    return [by_hand(module, case) for case in made[0]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The script's own run on the tiny model, with its page."""
    page = tmp_path_factory.mktemp("heads") / "page.md"
    page.write_text(f"before\n\n{head_report.BEGIN}\nstale words\n{head_report.END}\n\nafter\n")
    report = heads.main(["--quick", "--images", "3", "--rounds", "2", "--docs", str(page)])
    return report, page.read_text()


def by_hand(module, case) -> torch.Tensor:
    """The naive loop once more: plain transformers, eager, double precision."""
    blocks = text_blocks(module)
    tensors = {k: v.double() if v.is_floating_point() else v for k, v in case.x.tensors.items()}
    kept = []

    def margin(layer=None, head=0):
        def close(_module, args, kwargs):
            mask = kwargs["attention_mask"].repeat(1, N_HEADS, 1, 1)
            for dst, src in zip(case.dst.tolist(), case.src.tolist(), strict=True):
                mask[0, head, dst, src] = torch.finfo(mask.dtype).min
            return args, {**kwargs, "attention_mask": mask}

        at = [] if layer is None else [blocks[layer].self_attn]
        read = [blocks[len(case.layers) - 1]]

        def keep(_module, _args, output):
            kept.append(output)

        with torch.no_grad(), hooked(at, close, before=True), hooked(read, keep):
            module(**tensors, use_cache=False)
        state = kept.pop()[0, case.queries]
        by_token = (state * case.direction.double()).sum(-1) + case.bias.double()
        return by_token.mean()

    clean = margin()
    return torch.tensor([[clean - margin(i, h) for h in range(N_HEADS)] for i in case.layers])


# -- what is asked ---------------------------------------------------------------------------------


def test_a_case_asks_about_wrong_tokens_and_their_anchors(bench, made):
    cases, bank = made
    for case in cases:
        run = bench.ours.run(case.x, read=[head_loops.START, case.end], logits=False)
        said = bank.predict(head_loops.START, run.tokens(head_loops.START)[0]).numpy()
        first = int(case.x.grid.position[0])
        tokens = case.queries.numpy() - first
        assert len(tokens)
        assert (said[tokens] != case.labels[tokens]).all()
        region = case.x.grid.regions(case.labels)
        expected = {
            (int(dst), src)
            for dst in tokens
            for src in range(int(dst))
            if region[src] == region[dst] and said[src] == case.labels[src]
        }
        edges = zip((case.dst - first).tolist(), (case.src - first).tolist(), strict=True)
        assert set(edges) == expected
        assert len(case.dst) == len(expected) > 0
        # the margin in the probe's own words
        logits = bank.logits(case.end, run.tokens(case.end)[0])[tokens]
        rows = np.arange(len(tokens))
        own = logits[rows, case.labels[tokens]] - logits[rows, said[tokens]]
        assert float(case.margin(run[case.end])) == pytest.approx(float(own.mean()), abs=1e-5)


def test_a_picture_has_regions_and_wrong_patches():
    picture, labels = head_loops.scene(24, 0)
    assert picture.size == (24 * 14, 24 * 14)
    again, same = head_loops.scene(24, 0)
    assert again.tobytes() == picture.tobytes()
    assert (labels == same).all()
    pixels = np.asarray(picture, dtype=float).reshape(24, 14, 24, 14, 3).mean((1, 3))
    colour = {c: np.median(pixels.reshape(-1, 3)[labels == c], 0) for c in np.unique(labels)}
    off = [np.abs(p - colour[c]).max() > 30 for p, c in zip(pixels.reshape(-1, 3), labels)]
    assert 0.05 < np.mean(off) < 0.15


# -- the loops -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [False, True])
def test_the_bridge_loop_is_right(bench, made, arbiter, stop):
    for case, expected in zip(made[0], arbiter, strict=True):
        effects = head_loops.by_bridge(bench, case, stop=stop)
        assert_equal(effects, expected)


def test_the_nnsight_loop_is_right(bench, made, arbiter):
    for case, expected in zip(made[0], arbiter, strict=True):
        assert_equal(head_loops.by_nnsight(bench, case), expected)


def test_ours_is_right(bench, made, arbiter):
    cases, bank = made
    study = heads.Study(bench.ours, bank, budget=0.3, memory=0.5)
    for case, expected in zip(cases, arbiter, strict=True):
        assert_equal(heads.matrix(study.exact(case), case, N_HEADS), expected)
        table = study.screened(case)
        verified = heads.matrix(table, case, N_HEADS, verified=True)
        known = ~verified.isnan()
        assert 0 < known.sum() < known.numel()
        assert_equal(verified[known], expected[known])
        assert not heads.matrix(table, case, N_HEADS).isnan().any()


def assert_equal(effects, expected):
    assert expected.abs().max() > 1e-4  # or equal would mean nothing
    torch.testing.assert_close(effects.double(), expected, atol=2e-6, rtol=1e-3)


# -- only equals are compared ----------------------------------------------------------------------


def test_other_effects_are_unequal(bench, made):
    study, case = heads.Study(bench.ours, made[1], 0.3, 0.5), made[0][0]
    ways = {
        "bridge": lambda case: head_loops.by_bridge(bench, case),
        "nnsight": lambda case: 1.002 * head_loops.by_nnsight(bench, case),
    }
    with pytest.raises(heads.Unequal, match="effects of nnsight and bridge differ by 2"):
        heads.check(study, case, ways, {})
    ways["nnsight"] = lambda case: head_loops.by_nnsight(bench, case) * torch.nan
    with pytest.raises(heads.Unequal, match="nnsight gives 0 effects of 6"):
        heads.check(study, case, ways, {})
    nothing = {"bridge": lambda case: torch.zeros(1, N_HEADS)}
    with pytest.raises(heads.Unequal, match="no head has any effect"):
        heads.check(study, case, nothing, {})


def test_forwards_are_counted(ran):
    report, _ = ran
    one_a_head = report.heads + 1
    assert all(report.forwards[way] == one_a_head for way in ("bridge", "stopped", "nnsight"))
    assert 0 < report.forwards["exact"] < one_a_head
    assert 0 < report.forwards["screened"] < one_a_head


def test_recall_is_of_the_largest_of_either_sign():
    exact = torch.zeros(4, 8)
    exact.view(-1)[:10] = torch.tensor([9.0, -8, 7, -6, 5, -4, 3, -2, 1, -0.5])
    screened = exact.clone()
    screened[0, 1] = 0.1  # one of the ten is overlooked
    screened[3, 7] = 4.0
    assert heads.recall(screened, exact) == 0.9
    assert heads.recall(-exact, exact) == 1.0


# -- the whole script ------------------------------------------------------------------------------


def test_every_way_has_times_and_the_page_its_own_words(ran):
    report, page = ran
    assert set(report.times) == {"stopped", "nnsight", "exact", "screened"}
    for way, timing in report.times.items():
        assert len(timing.ratios) == len(timing.seconds) == 2 * heads.REPEATS.get(way, 1)
        assert min(timing.ratios) > 0
    assert len(report.recalls) == 3
    assert 0 <= report.recall <= 1
    assert 0 < report.difference < heads.TOLERANCE
    assert all(0 < report.peaks[way] < report.memory * 1e9 for way in head_report.GOALS)
    assert [law.method for law in report.laws] == ["exact", "gradient"]
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "stale words" not in page
    assert report.markdown() in page
    assert "heads.py --quick" in page


def test_the_table_says_how_many_times_as_fast():
    from measure import Timing

    times = {way: Timing([2.0, 2.0], [0.1, 0.3]) for way in head_report.TITLES if way != "bridge"}
    report = head_report.Report(
        times=times,
        bridge_seconds=[10.0, 10.0, 10.0],
        forwards=dict.fromkeys(head_report.TITLES, 7),
        difference=1e-5,
        recalls=[1.0, 0.8],
        peaks={"exact": 2 * 10**8},
        memory=0.5,
        budget=0.05,
        heads=32,
        laws=[],
        about={"tokens": 600},
    )
    text = report.markdown()
    assert "| loop on TransformerBridge |  | 1 | 10.00 | 7 |" in text
    assert "| loop on nnsight |  | 5.0 (4.0-6.7) | 2.00 | 7 |" in text
    assert "hold 90.0% of the exact ones" in text
    assert "200.0 MB (exact)" in text


def test_a_page_without_markers_is_refused_before_anything_runs(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no place here")
    with pytest.raises(ValueError, match="no place for the tables"):
        heads.main(["--quick", "--docs", str(page)])
    assert page.read_text() == "no place here"


# -- the law ---------------------------------------------------------------------------------------


def test_a_power_law_is_found_again():
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 50, (20, 4)).astype(float).tolist()
    seconds = [0.01 * a**2 * b * c**1.5 * d**0.5 for a, b, c, d in rows]
    law = head_fit.power_law("exact", rows, seconds)
    assert law.coefficient == pytest.approx(0.01)
    assert list(law.exponents.values()) == pytest.approx([2, 1, 1.5, 0.5])
    assert law.r2 == pytest.approx(1)
    noisy = [s * np.exp(rng.normal(0, 2)) for s in seconds]
    assert head_fit.power_law("exact", rows, noisy).r2 < 0.9
    with pytest.raises(ValueError, match="never varies by itself"):
        head_fit.power_law("exact", [[a, a, c, d] for a, _, c, d in rows], seconds)


@pytest.mark.parametrize("quick", [False, True])
def test_the_grid_varies_one_thing_at_a_time(quick):
    points = [
        (max(1, size.n_layers // 2), size.n_heads, size.n_pos, n)
        for size, n in head_fit.grid(quick)
    ]
    first = points[0]
    assert len(set(points)) == len(points)
    for point in points[1:-1]:
        assert sum(a != b for a, b in zip(point, first)) == 1
    assert all(a != b for a, b in zip(points[-1], first))
    assert all(len({point[i] for point in points}) == 3 for i in range(4))
    assert all(size.n_pos == size.side**2 + 24 for size, _ in head_fit.grid(quick))
