"""What the tests of this run have proved, family by family, for the tables in `docs/hooks.md`.

Tests call `proved(...)` as their last line; `tests/test_hooks_page.py` compares.
"""

from __future__ import annotations

#: (hook, case, dtype) -> whether the family has the hook, and then that it keeps the contract
contract: dict[tuple[str, str, str], bool] = {}
#: (case, check) -> "yes", or in a word why not
checks: dict[tuple[str, str], str] = {}


def proved(case: str, check: str, verdict: str = "yes") -> None:
    """Note that `check` holds for the family case `case`."""
    checks[case, check] = verdict
