"""The README says what is: its scripts run as written, its table is the committed study's."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from interp.report.text import markdown_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_scripts_for_the_bundled_model_run_in_order(tmp_path):
    script = "\n".join(SCRIPTS[:6]).replace('"results/tiny/', f'"{ROOT}/results/tiny/')
    script = script.replace('"edges.html"', repr(str(tmp_path / "edges.html")))
    names = ran(script, tmp_path)
    assert names["out"].shape[0::2] == (1, 96)
    assert names["table"].about["verification"]["n_verified"] == 8


def test_the_script_for_ones_own_pictures_runs_on_the_bundled_model(tmp_path):
    """Same text; the model's name, its device and a block number are what a tiny model has."""
    from interp.datasets import scenes

    data = scenes("test")
    large = '"llava-hf/llava-1.5-7b-hf", dtype="bfloat16", device="cuda"'
    script = SCRIPTS[7].replace(large, '"tiny"')
    script = script.replace("blocks.16", "blocks.4")
    for i, name in enumerate(("beach.jpg", "street.jpg")):
        data[i].image.save(tmp_path / name)
        script = script.replace(f'"{name}"', repr(str(tmp_path / name)))
    masks = [data[0].mask, data[1].mask]
    names = ran(script, tmp_path, masks=masks, classes=data.classes)
    assert names["bank"].stages == tuple(names["model"].stages)
    assert np.asarray(names["labels"]).shape == (200,)


@pytest.mark.parametrize("page", ["README.md", "interp/assets/tiny/README.md"])
def test_the_table_is_the_committed_studys(page):
    summary = json.loads((ROOT / "results/tiny/summary.json").read_text())
    text = (ROOT / page).read_text()
    written = re.search(r"<!-- findings:.*?-->\n(.*?)<!-- /findings -->", text, re.S)
    assert written
    assert written[1] == markdown_table(summary)


def test_the_committed_study_is_of_the_shipped_model(tiny):
    from interp.datasets import scenes
    from interp.runs import RunFolder

    folder = RunFolder.open(ROOT / "results/tiny")
    folder.verify()
    fingerprints = folder.manifest["fingerprints"]
    assert fingerprints["model"] == tiny.fingerprint()
    assert fingerprints["test_data"] == scenes("test").fingerprint()


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


def ran(script: str, folder: Path, **names) -> dict:
    """Run a script from a file (nnsight reads the source of a trace) and return its names."""
    path = folder / "script.py"
    path.write_text(script)
    return runpy.run_path(str(path), names)
