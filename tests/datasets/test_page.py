"""`docs/data.md` says what is: every kind is in it, and its code does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from interp.datasets import Segmentation
from interp.datasets.layouts import Layout
from interp.datasets.opening import KINDS, parse
from tests.datasets import drawn

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_every_kind_is_on_the_page():
    for kind, row in KINDS.items():
        assert f"`{kind}:" in PAGE or f"`{kind}`" in PAGE or f'"{kind}:' in PAGE, kind
        if row.layout is not None and kind != "folder":
            layout = row.layout("")
            line = next(line for line in PAGE.splitlines() if line.startswith(f"| `{kind}:PATH`"))
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert cells[2:] == [f"{row.fit[0]}, {row.test[0]}", str(len(layout.classes))]
            assert layout.pictures.split("/")[0] in cells[1]
            assert layout.masks.split("/")[0] in cells[1]


def test_a_new_kind_of_set_as_the_page_shows_it(tmp_path):
    code = re.search(r"<!-- a test runs this -->\n```python\n(.*?)```", PAGE, re.S).group(1)
    made: dict = {}
    exec(code, made)
    meant = {}
    for k in range(5):
        mask = drawn.mask_of((0, 1, 2), drawn.SIZES[k], k)
        meant[f"a{k}"] = mask
        drawn.save(drawn.picture_of(mask, k), tmp_path / "south" / "photos" / f"a{k}.png")
        raw = np.where(mask == drawn.VOID, 0, mask + 1)
        drawn.save(drawn.grey(raw), tmp_path / "south" / "labels" / f"a{k}.png")
    data: Segmentation = made["aerial"](tmp_path)
    assert isinstance(made["AERIAL"], Layout)
    assert {sample.name for sample in data} == set(meant)
    assert all(np.array_equal(sample.mask, meant[sample.name]) for sample in data)


def test_sets_as_the_page_writes_them():
    specs = re.findall(r'open_data\("([^"]+)"\)', PAGE)
    assert len(specs) == 3
    assert [parse(spec).kind for spec in specs] == ["ade20k", "folder", "hf"]
    assert parse(specs[1]).options == {
        "images": "{split}/rgb",
        "masks": "{split}/labels",
        "classes": "sky,road,house",
        "ignore": (0,),
    }
    assert parse(specs[2]).place == "owner/set@0f1e2d3c"
