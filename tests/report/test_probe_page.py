"""The page of a probe run: what it says, what it leaves out, and what it refuses."""

from __future__ import annotations

import re
from html import unescape

import numpy as np
import pandas as pd
import pytest

from interp.errors import TableError
from interp.report import write_report
from interp.report.probe_page import PROBE
from interp.runs import RunFolder
from tests.report import probed
from tests.report.reading import Tags, assert_nothing_is_fetched, drawn, named
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


def test_the_page_is_that_of_a_probe_run(body):
    text = unescape(body)
    assert "<title>Probes at every stage: tiny</title>" in body
    assert "probes fitted on 20,210 images (11,640,960 tokens), scored on 2,000 others" in text
    assert "(1,152,000 tokens) ·" in text
    assert "solver ridge" in text
    assert "3.1% of the labelled pixels lie where no token looks" in text
    order = ["changes", "stages", "groups", "classes", "map", "solver", "provenance"]
    places = [body.index(f'id="{name}"') for name in order]
    assert places == sorted(places)
    assert 'id="findings"' not in body
    assert 'id="pictures"' not in body
    assert "6 Provenance" in body
    assert "Not measured" not in body
    assert_nothing_is_fetched(body)


def test_every_figure_is_there_with_its_caption(body):
    ids = {attributes.get("id") for _, attributes in Tags(body).tags}
    for figure in PROBE.figures:
        assert figure.name in ids
        assert figure.caption in unescape(body)


def test_changes_are_told_by_their_intervals_and_called_no_cause(body):
    opening = body[body.index('id="changes"') : body.index('<section id="stages"')]
    rows = re.findall(r"<h3>(.*?)</h3>.*?<b>(.*?)</b>.*?class=\"tag (.*?)\">(.*?)<", opening, re.S)
    assert rows == [
        ("Drop-off, token accuracy", f"{MINUS}3.0 [{MINUS}4.0, {MINUS}2.0] points", "no", "falls"),
        ("Drop-off, token mIoU", f"{MINUS}0.3 [{MINUS}1.0, +0.4] points", "open", "cannot be told"),
        ("Recovery, token accuracy", "+7.9 [+6.0, +10.0] points", "yes", "rises"),
    ]
    assert "a change, not yet a cause" in " ".join(opening.split())


def test_without_changes_the_page_says_what_they_take(tmp_path):
    body = page(tmp_path / "run", told={**probed.summary(), "figures": {}})
    assert "Not measured in this run: the changes take the adapter" in unescape(body)


@pytest.mark.parametrize("name", [n for n in probed.tables() if n != "references"])
def test_a_missing_table_is_named_as_not_measured(tmp_path, frames, name):
    body = page(tmp_path / "run", {n: t for n, t in frames.items() if n != name})
    assert "Not measured in this run" in body
    for figure in PROBE.figures:
        assert (f'id="{figure.name}"' in body) == (name not in figure.needs)
        assert (figure.title in body) is True


def test_one_stage_alone_is_not_compared_with_itself(tmp_path, frames):
    only = {n: t[t["stage"] == READOUT] if "stage" in t else t for n, t in frames.items()}
    told = {**probed.summary(), "reference_stage": READOUT, "figures": {}}
    body = page(tmp_path / "run", only, told)
    for name in ("fig-classes", "fig-confusion", "fig-map"):
        assert f'id="{name}"' not in body
    assert named(body, "fig-stages")["the model", "x"]["x"] == [8]
    assert [t["x"] for t in drawn(body, "fig-penalties")["data"]] == [[8], [8]]


def test_layers_off_the_path_alone_are_drawn(tmp_path, frames):
    off = "vision.blocks.2.hook_resid_post"
    only = {"stages": frames["stages"].query("stage == @off")}
    told = {**probed.summary(), "reference_stage": off, "readout_stage": off, "figures": {}}
    traces = named(page(tmp_path / "run", only, told), "fig-stages")
    assert list(traces) == [("off the path", "x")]
    assert traces["off the path", "x"]["marker"]["size"] == [8]


def test_without_intervals_the_axes_hold_the_estimates(tmp_path, frames):
    nothing = {"low": np.nan, "high": np.nan}
    bare = {n: t.assign(**nothing) if "low" in t else t for n, t in frames.items()}
    body = page(tmp_path / "run", bare)
    for name in ("fig-stages", "fig-zoom", "fig-groups"):
        shown = drawn(body, name)
        low, high = shown["layout"]["yaxis"]["range"]
        values = [v for t in shown["data"] if "name" in t for v in t["y"]]
        assert low < min(values) < max(values) < high
        assert "NaN" not in body


def test_a_stage_that_one_table_lacks_is_an_error_that_names_it(tmp_path, frames):
    def refused(number: int, match: str, **changed: pd.DataFrame) -> None:
        with pytest.raises(TableError, match=match):
            page(tmp_path / f"run{number}", {**frames, **changed})

    stray = frames["penalties"].replace("adapter.hook_out", "adapter.hook_oot")
    refused(0, r"table stages has no stage 'adapter\.hook_oot'.*did you mean", penalties=stray)
    lost = frames["map"].query("stage != @REFERENCE")
    refused(1, r"table map has no rows of stage 'adapter\.hook_out'", map=lost)
    pair = frames["stages"].query("stage != 'adapter.hook_in'")
    refused(2, r"shuffled labels at 'adapter in', but no such stage", stages=pair)


def test_other_kinds_of_run_have_no_page(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "heads")
    folder.write_json("summary.json", probed.summary())
    with pytest.raises(TableError, match="kind 'heads' has no page; study, probe have one"):
        write_report(folder)


def test_a_summary_without_a_key_is_an_error_that_names_it(tmp_path):
    told = probed.summary()
    del told["solver"], told["readout_stage"]
    with pytest.raises(TableError, match=r"summary\.json has no readout_stage, solver"):
        page(tmp_path / "run", told=told)


def test_names_from_data_cannot_break_the_page(tmp_path):
    evil = "</script><script>alert(1)</script>"
    names = (evil, *probed.CLASSES[1:])
    told = {**probed.summary(classes=names), "model": evil}
    body = page(tmp_path / "run", probed.tables(classes=names), told)
    assert evil not in body
    assert f"<b>{evil}</b>" in unescape(body)
    assert f"{evil} → sea" in unescape(body)


def test_the_same_run_draws_the_same_bytes(tmp_path, body):
    assert page(tmp_path / "elsewhere") == body
