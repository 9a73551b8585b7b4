"""The paper's four claims, each a function from model and data to tables and a verdict.

`recovery`, `knockout`, `heads` and `bidirectional` hold one claim each; `study` runs all four and
writes a run folder. What they share is in `split` (data made ready) and `result` (what comes out).
"""

from __future__ import annotations

from interp.studies.result import Finding, Result
from interp.studies.split import Split

__all__ = ["Finding", "Result", "Split"]
