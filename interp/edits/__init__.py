"""Interventions as values: say what to change, print it, hand it to `model.run`.

* `interp.edges.EdgeSet` says *who looks at whom*;
* `Knockout` and `Unmask` (`interp.edits.masks`) close and open such edges in the causal mask, in
  chosen layers and heads;
* `interp.edits.receipts` is what a run hands back: what each edit really did.
"""

from __future__ import annotations

from interp.edits.masks import Knockout, MaskEdit, Unmask
from interp.edits.receipts import Receipt, Receipts

__all__ = ["Knockout", "MaskEdit", "Receipt", "Receipts", "Unmask"]
