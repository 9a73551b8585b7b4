"""The figures of a probe run: each number as in its table, of deep models and many classes, too."""

from __future__ import annotations

import re

import numpy as np
import pytest

from interp.report.palette import RIGHT, WRONG
from tests.report import probed
from tests.report.reading import drawn, named
from tests.report.reading import probe_page as page

MINUS = "\N{MINUS SIGN}"
REFERENCE, READOUT = "adapter.hook_out", "blocks.3.hook_resid_post"
MODEL = ["vision", "adapter", "llm"]


@pytest.fixture(scope="module")
def frames():
    return probed.tables()


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    return page(tmp_path_factory.mktemp("probe") / "run")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """57 stages, and 150 classes of which 149 occur."""
    classes = tuple(f"class {i}" for i in range(150))
    tables, told = probed.tables(25, 30, classes), probed.summary(30, classes)
    return tables, page(tmp_path_factory.mktemp("deep") / "run", tables, told)


def test_the_curve_and_its_controls(body, frames):
    rows = frames["stages"].query("metric == 'accuracy'")
    traces = named(body, "fig-stages")
    path = rows[rows["kind"].isin(MODEL) & rows["on_path"]]
    model = traces["the model", "x"]
    assert model["x"] == path["order"].tolist()
    assert model["y"] == pytest.approx(path["estimate"].tolist())
    assert [low for _, low, _ in model["customdata"]] == pytest.approx(path["low"].tolist())
    assert traces["off the path", "x"]["x"] == [1, 2]

    shuffled = traces["shuffled labels", "x"]
    wanted = {}
    for stage, value in zip(rows["stage"], rows["estimate"], strict=True):
        if stage.endswith(", shuffled labels"):
            of = rows[rows["stage"] == stage.removesuffix(", shuffled labels")]
            wanted[int(of["order"].item())] = value
    assert len(wanted) == 9
    assert dict(zip(shuffled["x"], shuffled["y"], strict=True)) == pytest.approx(wanted)
    noise = traces["random features", "x"]
    assert noise["x"] == [9, 10]
    assert noise["mode"] == "markers"
    assert noise["y"] == pytest.approx(rows[rows["kind"] == "random_features"]["estimate"].tolist())
    layout = drawn(body, "fig-stages")["layout"]
    assert layout["xaxis"]["ticktext"][-3:] == ["LLM 3", "noise 96", "noise 128"]
    notes = {note["text"]: note.get("x") for note in layout["annotations"]}
    assert {"shuffled labels", "random features"} <= set(notes)
    assert notes["the reference stage"] == 4
    assert notes["the adapter reads this layer"] == 1
    assert "right or wrong is judged here" not in notes


def test_the_zoom_leaves_controls_out_so_that_a_drop_is_seen(body):
    assert set(named(body, "fig-zoom")) == {("the model", "x"), ("off the path", "x")}
    low, high = drawn(body, "fig-zoom")["layout"]["yaxis"]["range"]
    assert 0.4 < low < high < 0.8


def test_miou_over_tokens_and_pixels(body, frames):
    traces = named(body, "fig-miou")
    for metric, x in (("token_miou", "x"), ("pixel_miou", "x2")):
        rows = frames["stages"][frames["stages"]["metric"] == metric]
        path = rows[rows["kind"].isin(MODEL) & rows["on_path"]]
        assert traces["the model", x]["y"] == pytest.approx(path["estimate"].tolist())
        assert ("shuffled labels", x) in traces
    notes = " ".join(n["text"] for n in drawn(body, "fig-miou")["layout"]["annotations"])
    assert "floor (one class) 1.0%" in notes
    assert "ceiling 87.0%" in notes


def test_groups(body, frames):
    rows = frames["groups"]
    rows = rows[rows["kind"].isin(MODEL) & rows["on_path"]]
    traces = named(body, "fig-groups")
    assert set(traces) == {("interior", "x"), ("boundary", "x"), ("late", "x2"), ("early", "x2")}
    for (group, _), trace in traces.items():
        part = rows[rows["group"] == group]
        assert trace["x"] == part["order"].tolist()
        assert trace["y"] == pytest.approx(part["estimate"].tolist())


def iou(frames: dict, stage: str) -> dict[str, float]:
    rows = frames["classes"].query("unit == 'token' and stage == @stage")
    return dict(zip(rows["class"], rows["iou"], strict=True))


def test_classes_from_reference_to_readout(body, frames):
    before, after = iou(frames, REFERENCE), iou(frames, READOUT)
    occur = [c for c in probed.CLASSES if c != "ghost"]
    order = sorted(occur, key=lambda c: before[c] - after[c])
    shown = drawn(body, "fig-classes")
    hollow, filled = named(body, "fig-classes").values()
    assert (hollow["name"], filled["name"]) == ("adapter out", "LLM 3")
    assert shown["layout"]["yaxis"]["ticktext"] == order
    assert hollow["x"] == pytest.approx([before[c] for c in order])
    assert filled["x"] == pytest.approx([after[c] for c in order])
    colors = [RIGHT if after[c] > before[c] else WRONG for c in order]
    assert len(set(colors)) == 2
    assert filled["marker"]["color"] == colors
    gains, losses = shown["data"][:2]
    assert (gains["line"]["color"], losses["line"]["color"]) == (RIGHT, WRONG)
    at = dict(zip(order, hollow["y"], strict=True))
    for trace, sign in ((gains, 1), (losses, -1)):
        mine = [c for c in order if sign * (after[c] - before[c]) > 0]
        assert trace["x"][0::3] == pytest.approx([before[c] for c in mine])
        assert trace["x"][1::3] == pytest.approx([after[c] for c in mine])
        assert trace["x"][2::3] == [None] * len(mine)
        assert trace["y"][0::3] == trace["y"][1::3] == [at[c] for c in mine]
    texts = [note["text"] for note in shown["layout"]["annotations"]]
    assert "5 of 5 classes that occur; 1 do not occur" in texts[-1]
    change = 100 * (after[order[0]] - before[order[0]])
    assert texts[0] == f"{change:+.1f}"


def test_of_many_classes_the_largest_changes_are_shown_and_said_to_be(deep):
    frames, body = deep
    before, after = iou(frames, REFERENCE), iou(frames, "blocks.29.hook_resid_post")
    order = sorted((c for c in before if c != "class 149"), key=lambda c: before[c] - after[c])
    layout = drawn(body, "fig-classes")["layout"]
    assert layout["yaxis"]["ticktext"] == order[:25] + order[-25:]
    assert layout["yaxis"]["tickvals"] == [*range(1, 26), *range(27, 52)]
    notes = {note["text"]: note["y"] for note in layout["annotations"]}
    assert notes["<b>25 largest gains</b>"] == 0
    assert notes["<b>25 largest losses</b>"] == 26
    assert any("50 of 149 classes that occur" in text for text in notes)


def test_the_map_and_its_difference(tmp_path, frames):
    places = frames["map"]
    gone = places[(places["stage"] == READOUT) & (places["row"] == 12) & (places["col"] == 9)]
    frames = {**frames, "map": places.drop(index=gone.index)}
    data = drawn(page(tmp_path / "run", frames), "fig-map")["data"]
    one, two, change = (np.array(trace["z"], dtype=float) for trace in data)
    assert one.shape == two.shape == change.shape == (3, 4)
    for stage, grid in ((REFERENCE, one), (READOUT, two)):
        rows = frames["map"][frames["map"]["stage"] == stage]
        for row, col, value in zip(rows["row"], rows["col"], rows["accuracy"], strict=True):
            assert grid[(row - 4) // 8, (col - 3) // 6] == pytest.approx(value)
    assert np.isnan(two).sum() == np.isnan(change).sum() == 1
    assert np.isnan(change[1, 1])
    known = ~np.isnan(change)
    assert change[known] == pytest.approx(100 * (two - one)[known])
    layout = drawn((tmp_path / "run/report.html").read_text(), "fig-map")["layout"]
    shared = [trace["coloraxis"] for trace in data]
    assert shared == ["coloraxis", "coloraxis", "coloraxis2"]
    assert layout["coloraxis"]["cmin"] == pytest.approx(min(one.min(), np.nanmin(two)))
    assert layout["coloraxis2"]["cmin"] == -layout["coloraxis2"]["cmax"]
    assert layout["yaxis"]["autorange"] == layout["yaxis3"]["autorange"] == "reversed"


def test_confusions_and_what_became_of_them(body, frames):
    def counts(stage: str) -> dict[tuple[str, str], int]:
        rows = frames["confusion"].query("stage == @stage")
        return {(t, s): n for t, s, n in zip(rows["true"], rows["said"], rows["n"], strict=True)}

    def share(found: dict, pair: tuple[str, str]) -> float:
        return found.get(pair, 0) / sum(n for (true, _), n in found.items() if true == pair[0])

    before, after = counts(REFERENCE), counts(READOUT)
    wrong = sorted((p for p in before if p[0] != p[1]), key=lambda p: -before[p])[:15]
    table = body[body.index('id="fig-confusion"') :]
    table = table[: table.index("</table>")]
    heads = re.findall(r"<th.*?>(.*?)</th>", table)
    rows = [re.findall(r"<td.*?>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert heads == ["true → said", "tokens, adapter out", "share, adapter out", "share, LLM 3",
                     "change, points"]  # fmt: skip
    assert len(rows) == 15
    for pair, row in zip(wrong, rows, strict=True):
        was, becomes = share(before, pair), share(after, pair)
        change = f"{100 * (becomes - was):+.1f}".replace("-", MINUS)
        assert row == [f"{pair[0]} → {pair[1]}", f"{before[pair]:,}", f"{was:.1%}",
                       f"{becomes:.1%}", change]  # fmt: skip


def test_a_confusion_that_is_gone_at_the_readout(tmp_path, frames):
    rows = frames["confusion"]
    worst = rows.query("stage == @REFERENCE and true != said").sort_values("n").iloc[-1]
    gone = (rows["stage"] == READOUT) & (rows["true"] == worst["true"])
    gone &= rows["said"] == worst["said"]
    body = page(tmp_path / "run", {**frames, "confusion": rows[~gone]})
    row = body[body.index(f"<td>{worst['true']} → {worst['said']}</td>") :].split("</tr>")[0]
    assert '<td class="n">0.0%</td>' in row


def test_penalties_and_the_chosen_one(tmp_path, frames):
    rows = frames["penalties"].copy()
    tie = (rows["stage"] == "adapter.hook_in") & (rows["alpha"] > 1e-4)
    rows.loc[tie, "error"] = 0.1  # of equals the solver takes the first
    drawing = drawn(page(tmp_path / "run", {**frames, "penalties": rows}), "fig-penalties")
    cells, dots = drawing["data"]
    order = frames["stages"].query("metric == 'accuracy'").set_index("stage")["order"]
    alphas = list(probed.ALPHAS)
    z = np.array(cells["z"])
    assert z.shape == (3, 11)
    for stage, part in rows.groupby("stage"):
        x = cells["x"].index(order[stage])
        least = part["error"].min()
        for alpha, error in zip(part["alpha"], part["error"], strict=True):
            assert z[alphas.index(alpha), x] == pytest.approx(error / least - 1)
            assert cells["customdata"][alphas.index(alpha)][x][0] == pytest.approx(error)
        best = next(a for a, e in zip(part["alpha"], part["error"], strict=True) if e == least)
        assert dots["y"][dots["x"].index(order[stage])] == alphas.index(best)
    assert dots["y"][dots["x"].index(order["adapter.hook_in"])] == 1
    axis = drawing["layout"]["yaxis"]
    assert axis["ticktext"] == [f"10<sup>{MINUS}4</sup>", f"10<sup>{MINUS}2</sup>", "1"]
    assert axis["range"] == [-0.5, 2.5]


def test_57_stages_have_names_that_do_not_meet(deep):
    _, body = deep
    for figure, axis, width in (
        ("fig-stages", "xaxis", 690), ("fig-zoom", "xaxis", 690), ("fig-penalties", "xaxis", 690),
        ("fig-miou", "xaxis", 370), ("fig-miou", "xaxis2", 370), ("fig-groups", "xaxis2", 320),
    ):  # fmt: skip
        shown = drawn(body, figure)["layout"][axis]
        low, high = shown["range"]
        pixels = np.diff(shown["tickvals"]) * width / (high - low)
        assert len(shown["tickvals"]) == len(shown["ticktext"]) >= 11
        assert pixels.min() > 18, figure  # a slanted name is 17 pixels wide
    assert drawn(body, "fig-stages")["layout"]["xaxis"]["ticktext"][-1] == "noise"
    rooms = {n["text"]: (n["x"], n.get("yshift", 0))
             for n in drawn(body, "fig-stages")["layout"]["annotations"]
             if n.get("yref") == "y domain"}  # fmt: skip
    assert rooms["adapter"][1] != rooms["language model"][1]
    assert drawn(body, "fig-stages")["layout"]["margin"]["t"] > 40
    sizes = {t["marker"].get("size") for t in drawn(body, "fig-miou")["data"]
             if t.get("name") == "the model"}  # fmt: skip
    assert sizes == {4}


def test_a_large_run_has_a_small_page(deep):
    assert len(deep[1].encode()) < 1_000_000
