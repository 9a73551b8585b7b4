"""The family that `docs/families.md` adds: its code is run, and its table passes the check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import interp.families
import interp.instrumented
from tests import zoo

GUIDE = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.fixture
def guide(monkeypatch):
    """The guide's blocks of Python: the table, the builder, the line in the zoo, the check."""
    table, builder, line, check = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    made: dict = {}
    exec(table, made)
    monkeypatch.setattr(interp.families, "FAMILIES", (made["VIPLLAVA"],))
    here = dict(vars(zoo))
    exec(builder, here)
    monkeypatch.setattr(zoo, "ZOO", eval("{" + line + "}", here))
    return table, check


def test_guide_s_table_passes_the_check_that_the_guide_explains(guide, capsys):
    table, check = guide
    assert len(table.splitlines()) <= 60
    here = {"build": zoo.build, "PROMPT": zoo.PROMPT}
    exec(check, here)  # ends with "assert report.passed"
    assert not here["report"].unchecked
    assert "a token answers to its own box" in capsys.readouterr().out
    claims = {row.claim for row in here["report"].rows}
    explained = re.findall(r"^\| (.*?) \|.*`.*", GUIDE.read_text(), re.MULTILINE)
    named = [row for row in explained if " / " not in row and not row.startswith("its hooks")]
    assert len(named) >= 7
    assert claims.issuperset(named)
