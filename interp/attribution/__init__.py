"""Which heads, reading from which tokens, move a token to its class.

* `head_attribution` answers by an exact sum, by gradients or by knockouts (`heads`);
* `attribute` screens by gradients and verifies by knockouts (`screen`);
* `path_attribution` follows one head's effect through another (`paths`);
* `minimal_heads` finds the fewest heads that carry it (`minimal`).

What is explained is a target (`targets`), from which tokens is said by source groups (`sources`).
"""

from __future__ import annotations

from interp.attribution.cost import Cost
from interp.attribution.head_set import MinimalHeads
from interp.attribution.heads import head_attribution
from interp.attribution.minimal import minimal_heads
from interp.attribution.path_table import PathTable
from interp.attribution.paths import path_attribution
from interp.attribution.screen import attribute, verify_edges
from interp.attribution.sources import Sources
from interp.attribution.table import HeadTable
from interp.attribution.targets import AnswerLogit, Custom, ProbeMargin, Target

__all__ = [
    "AnswerLogit",
    "Cost",
    "Custom",
    "HeadTable",
    "MinimalHeads",
    "PathTable",
    "ProbeMargin",
    "Sources",
    "Target",
    "attribute",
    "head_attribution",
    "minimal_heads",
    "path_attribution",
    "verify_edges",
]
