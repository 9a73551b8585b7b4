"""How many CPU threads a model is worth.

The matrices of a small model are too small to share: two threads lose more by waiting for each
other than they gain, and on a busy machine they lose five times over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from interp.instrumented import Instrumented

#: parameters below which one thread is best
SMALL = 20_000_000


def suit_threads(model: Instrumented, threads: int | None = None) -> None:
    """Let torch use so many CPU threads in this process; by default one if the model is small."""
    if threads or model.n_parameters < SMALL:
        torch.set_num_threads(threads or 1)
