"""What a run does at one place of the forward pass: the unit that edits and reads are made of.

nnsight wants its accesses in execution order; a `Step` says where it belongs (a rank of
`Vocabulary.rank`, or just before or after one), and `interp.execution` sorts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

#: a step just before the value at a rank is made, and one just after the reads there
BEFORE, AFTER = -0.5, 0.5


@dataclass
class Step:
    """One thing to do at one place of the forward pass.

    Attributes:
        rank: of the hook it belongs to (`Vocabulary.rank`), plus BEFORE or AFTER.
        act: does it, inside the trace.
    """

    rank: float
    act: Callable[[], None]
