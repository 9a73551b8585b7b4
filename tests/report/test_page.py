"""The page: self-contained, whole, true to its tables, and clear about what does not hold."""

from __future__ import annotations

import io
import json
from html import unescape

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from plotly.offline import get_plotlyjs

from interp.errors import RunNotFound, TableError
from interp.report import write_report
from interp.report.pictures import MAX_SIDE, strips
from interp.report.study_page import STUDY
from interp.report.tables import COLUMNS, load_summary, load_tables
from interp.runs import RunFolder
from tests.report import golden, probed
from tests.report.reading import Tags, assert_nothing_is_fetched, drawn
from tests.report.synthetic import summary, tables, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("report") / "run")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def html(folder):
    return (folder.path / "report.html").read_text()


@pytest.fixture(scope="module")
def body(html):
    """The page without plotly.js: what is ours."""
    return html.replace(get_plotlyjs(), "")


def small_run(path, **frames: pd.DataFrame) -> RunFolder:
    folder = RunFolder.create(path, arguments={"model": "tiny", "data": "scenes"})
    for name, table in frames.items():
        folder.write_table(name, table)
    folder.write_json("summary.json", summary())
    return folder


def test_nothing_is_fetched(html, body):
    assert html.count(get_plotlyjs()) == 1
    assert_nothing_is_fetched(body)


def test_every_figure_is_there_with_its_caption(body):
    ids = {attributes.get("id") for _, attributes in Tags(body).tags}
    for figure in STUDY.figures:
        assert figure.name in ids
        data = drawn(body, figure.name)
        assert data["data"], figure.name
        assert data["layout"]["height"] > 100
        assert figure.caption in unescape(body)
    assert "Not measured" not in body


def test_it_fits_the_size_that_results_may_have(html, body):
    assert len(body.encode()) < 1_000_000
    assert len(html.encode()) < 6_500_000


def test_figures_show_what_the_tables_say(body):
    all_tables = tables()
    clean = all_tables["knockout"].query("condition == 'clean' and not probe_free")
    trace = next(t for t in drawn(body, "fig-knockout")["data"] if t.get("name") == "clean")
    assert trace["y"] == pytest.approx(clean["estimate"].tolist())
    assert [low for _, low, _ in trace["customdata"]] == pytest.approx(clean["low"].tolist())

    heads = all_tables["head_totals"].query("layer == 2 and head == 4")
    cells = drawn(body, "fig-heads")["data"][0]["z"]
    assert cells[2][4] == pytest.approx(heads["share"].item())

    off = next(t for t in drawn(body, "fig-stages")["data"] if t.get("name") == "off the path")
    path = next(t for t in drawn(body, "fig-stages")["data"] if t.get("name") == "the model")
    assert "vision.blocks.2.hook_resid_post" not in path["text"]
    assert len(off["y"]) == 2  # from the layer that is read to the one that is not
    assert off["marker"]["color"] == "white"


def test_groups_are_drawn_with_the_stages_of_the_path(body):
    """The study's table tells neither kind nor path of a stage; the table `stages` does."""
    rows = tables()["groups"].query("stage != 'vision.blocks.2.hook_resid_post'")
    traces = {t["name"]: t for t in drawn(body, "fig-groups")["data"] if "name" in t}
    assert set(traces) == {"interior", "boundary", "early", "late"}
    for group, trace in traces.items():
        part = rows[rows["group"] == group].sort_values("order")
        assert trace["x"] == part["order"].tolist()
        assert trace["y"] == pytest.approx(part["estimate"].tolist())
        assert [high for _, _, high in trace["customdata"]] == pytest.approx(part["high"].tolist())
    panels = {name: trace["xaxis"] for name, trace in traces.items()}
    assert panels["interior"] == panels["boundary"] != panels["early"] == panels["late"]


def test_what_the_page_says_and_draws_is_what_it_was(body):
    """Against the digests of `study_page.json`; `tests.report.golden` says how to renew them."""
    assert golden.digests(body) == json.loads(golden.FILE.read_text())


def test_the_layer_that_the_adapter_reads_is_marked(body):
    layout = drawn(body, "fig-stages")["layout"]
    notes = {note["text"]: note["x"] for note in layout["annotations"]}
    assert notes["the adapter reads this layer"] == 2
    assert notes["right or wrong is judged here"] == 5
    assert any(text.startswith("floor") and "13.1%" in text for text in notes)


def test_findings_carry_interval_control_and_verdict(body):
    text = unescape(body)
    assert "\N{MINUS SIGN}2.3 [\N{MINUS SIGN}3.1, \N{MINUS SIGN}1.4] points" in text
    assert "46% [43, 49]" in text
    assert "as many random edges:<br>4% [1, 7]" in text
    findings = body[body.index('id="findings"') : body.index('id="recovery"')]
    assert findings.count(">holds<") == 4
    assert findings.count(">does not hold<") == 1


def test_a_finding_that_does_not_hold_is_said_not_to(tmp_path):
    told = summary()
    told["findings"]["recovery"]["holds"] = False
    folder = RunFolder.create(tmp_path / "run")
    folder.write_json("summary.json", told)
    body = write_report(folder).read_text().replace(get_plotlyjs(), "")
    row = body[body.index("Recovery in the language model") :]
    assert row.index("does not hold") < row.index("Correct neighbours")


def test_pictures_show_the_verdicts(folder):
    scenes = strips(folder, load_tables(folder), load_summary(folder))
    assert len(scenes) == 6
    tokens = tables()["tokens"]
    for scene in scenes:
        one = tokens[tokens["name"] == scene.name]
        labelled = one[one["label"] != 255]
        for panel, column in zip(
            scene.panels[2:], ("adapter", "final", "knockout", "bidirectional"), strict=True
        ):
            right = int((labelled[column] == labelled["label"]).sum())
            assert panel.below == f"{right} of {len(labelled)} right"
            assert panel.svg.count('class="r k') == right
            assert panel.svg.count('class="w k') == len(labelled) - right
            assert panel.svg.count("l.4 -.4") == len(labelled) - right
        assert scene.panels[0].svg.count("data:image/png;base64,") == 1
    t = tokens[(tokens["token"] == 13) & (tokens["image"] == 0)].iloc[0]
    names = summary()["classes"]
    said = f"<title>row 1, column 3: {names[t['final']]}: "
    assert said in scenes[0].panels[3].svg


def test_a_large_picture_is_scaled_down(tmp_path):
    folder = small_run(tmp_path, tokens=tables()["tokens"].query("image == 0"))
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    folder.write_bytes("pictures/test-0.png", buffer.getvalue())
    [scene] = strips(folder, load_tables(folder), load_summary(folder))
    assert "data:image/jpeg;base64," in scene.panels[0].svg
    assert len(scene.panels[0].svg) < 1.5 * MAX_SIDE**2


@pytest.mark.parametrize("name", [n for n in tables() if n != "references"])
def test_a_missing_table_is_named_as_not_measured(tmp_path, name):
    frames = {n: t for n, t in tables().items() if n != name}
    body = write_report(small_run(tmp_path, **frames)).read_text().replace(get_plotlyjs(), "")
    assert "Not measured in this run" in body
    for figure in STUDY.figures:
        assert (f'id="{figure.name}"' in body) == (name not in figure.needs)


def test_an_empty_table_is_no_measurement(tmp_path):
    frames = {**tables(), "dose": tables()["dose"].iloc[:0]}
    frames["knockout"] = frames["knockout"].query("not probe_free").reset_index(drop=True)
    body = write_report(small_run(tmp_path, **frames)).read_text()
    assert 'id="fig-dose"' not in body
    assert 'id="fig-probe-free"' not in body
    assert 'id="fig-knockout"' in body


@pytest.mark.parametrize("name", COLUMNS)
def test_a_missing_column_is_an_error_that_names_it(tmp_path, name):
    column = COLUMNS[name][-1]
    folder = small_run(
        tmp_path, **{name: {**probed.tables(), **tables()}[name].drop(columns=column)}
    )
    with pytest.raises(TableError, match=f"table {name} has no column {column}; it has "):
        write_report(folder)
    assert not (tmp_path / "report.html").exists()


def test_a_summary_without_a_key_is_an_error_that_names_it(tmp_path):
    told = summary()
    del told["colors"], told["findings"]["heads"]["holds"]
    folder = RunFolder.create(tmp_path)
    with pytest.raises(RunNotFound, match=r"no summary\.json"):
        write_report(folder)
    folder.write_json("summary.json", told)
    with pytest.raises(TableError, match=r"summary\.json has no colors, findings\.heads\.holds"):
        write_report(folder)


def test_names_from_data_cannot_break_the_page(tmp_path):
    evil = "</script><script>alert(1)</script>"
    frames = {"knockout": tables()["knockout"].replace("clean", evil), "tokens": tables()["tokens"]}
    folder = small_run(tmp_path, **frames)
    told = summary()
    told["classes"] = [evil, *told["classes"][1:]]
    told["findings"]["knockout"]["text"] = evil
    folder.write_json("summary.json", told)
    body = write_report(folder).read_text()
    assert evil not in body
    assert evil in {t.get("name") for t in drawn(body, "fig-knockout")["data"]}


def test_the_same_run_draws_the_same_bytes(folder, html, tmp_path):
    other = write_folder(tmp_path / "elsewhere")
    assert write_report(other).read_text() == html
    write_report(folder)
    folder.verify()
    assert str(folder.path) not in html


def test_a_deep_model_still_draws(tmp_path):
    """32 layers of 32 heads: labels are thinned out, cells are left unlabelled."""
    layers, heads = np.indices((32, 32)).reshape(2, -1)
    totals = pd.DataFrame({"layer": layers, "head": heads, "estimate": 0.1, "low": 0.0,
                           "high": 0.2, "share": 1 / 1024, "rank": np.arange(1024)})  # fmt: skip
    rows = [
        {"stage": f"blocks.{i}.hook_resid_post", "label": f"LLM {i}", "order": i, "kind": "llm",
         "on_path": True, "metric": "accuracy", "estimate": 0.5, "low": 0.4, "high": 0.6}
        for i in range(32)
    ]  # fmt: skip
    body = write_report(
        small_run(tmp_path, stages=pd.DataFrame(rows), head_totals=totals)
    ).read_text()
    assert len(drawn(body, "fig-stages")["layout"]["xaxis"]["ticktext"]) <= 25
    assert "texttemplate" not in drawn(body, "fig-heads")["data"][0]
