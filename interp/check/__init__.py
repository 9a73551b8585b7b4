"""Do the hook names mean what they claim, on *this* model?

    report = check(MLLM.load("tiny"))
    print(report)                        # a table: tower, claim, worst error, verdict, where

`claims` holds the equations, `trials` what edits and pictures must do, `report` the table.
"""

from interp.check.report import CheckReport, check

__all__ = ["CheckReport", "check"]
