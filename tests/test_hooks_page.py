"""`docs/hooks.md` says what the tests of this run have proved, and nothing else.

`INTERP_WRITE_DOCS=1 python -m pytest tests` writes its tables anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.families.test_contract import HOOKS
from tests.record import checks, contract
from tests.zoo import ZOO

PAGE = Path(__file__).parents[1] / "docs" / "hooks.md"
#: in the order of the columns; each is recorded by the tests of that name
CHECKS = {
    "hooks": "families/test_contract.py",
    "sdpa": "families/test_parity.py",
    "eager": "families/test_parity.py",
    "hidden states": "families/test_parity.py",
    "patterns": "families/test_parity.py",
    "masks": "families/test_parity.py",
    "path": "families/test_tables.py",
    "token to pixel": "families/test_layouts.py",
    "mask edits": "families/test_edits.py",
    "self-check": "check/test_check.py",
    "TransformerBridge": "lens/test_bridge.py",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compare(name: str, made: str) -> None:
    """The part of the page between two markers; written anew if asked for."""
    start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    text = PAGE.read_text()
    before, after = text.split(start)[0], text.split(end)[1]
    new = f"{before}{start}{made}{end}{after}"
    if os.environ.get("INTERP_WRITE_DOCS"):
        PAGE.write_text(new)
        return
    assert text == new, "run the tests with INTERP_WRITE_DOCS=1 and commit docs/hooks.md"


def test_table_of_hooks():
    if len(contract) < 2 * len(HOOKS) * len(ZOO):
        pytest.skip("needs all of families/test_contract.py; some were deselected or failed")
    rows = []
    for hook in HOOKS:
        there = [contract[hook, case, "float32"] for case in ZOO]
        assert there == [contract[hook, case, "bfloat16"] for case in ZOO]
        rows.append([f"`{hook}`", *("yes" if yes else "-" for yes in there)])
    compare("contract", table(["hook", *ZOO], rows))


def test_table_of_checks():
    for case in ZOO:
        kept = [key for key in contract if key[1] == case]
        if len(kept) == 2 * len(HOOKS):
            checks[case, "hooks"] = "yes"
    missing = [(case, check) for case in ZOO for check in CHECKS if (case, check) not in checks]
    if missing:
        pytest.skip(f"needs the tests of {CHECKS[missing[0][1]]}; some were deselected or failed")
    rows = [[case, *(checks[case, check] for check in CHECKS)] for case in ZOO]
    compare("checks", table(["family", *CHECKS], rows))
