"""Interventions as values: say what to change, print it, hand it to `model.run`.

* `interp.edges.EdgeSet` says *who looks at whom*;
* `Knockout` and `Unmask` (`interp.edits.masks`) close and open such edges in the mask, in chosen
  layers and heads, and `EditMask` does what a function says;
* `Ablate`, `Patch`, `Steer` and `Scale` (`interp.edits.values`) change what stands at a hook, in
  chosen heads and positions;
* `window(center, width)` is a range of layers, and `edit_from_json` reads back what an edit's
  `to_json` wrote (`interp.edits.base`);
* `interp.edits.receipts` is what a run hands back: what each edit really did.
"""

from __future__ import annotations

from interp.edits.base import Edit, edit_from_json, window
from interp.edits.masks import EditMask, Knockout, MaskEdit, Unmask
from interp.edits.positions import Positions
from interp.edits.receipts import Receipt, Receipts
from interp.edits.values import Ablate, Patch, Scale, Steer, ValueEdit

__all__ = [
    "Ablate",
    "Edit",
    "EditMask",
    "Knockout",
    "MaskEdit",
    "Patch",
    "Positions",
    "Receipt",
    "Receipts",
    "Scale",
    "Steer",
    "Unmask",
    "ValueEdit",
    "edit_from_json",
    "window",
]
