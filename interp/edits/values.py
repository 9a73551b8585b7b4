"""Edits of values where a hook stands: `Ablate`, `Patch`, `Steer`, `Scale`.

DRAFT by the lead: the protocol that `interp.execution` calls; helper HB fills it in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from interp.edits.base import Edit

if TYPE_CHECKING:
    from interp.inputs import Inputs
    from interp.instrumented import Instrumented


@dataclass(frozen=True, repr=False)
class ValueEdit(Edit, kind=False):
    """Common part of value edits.

    Attributes:
        hook: a hook name or a glob over them, as everywhere.
    """

    hook: str

    def names(self, model: Instrumented) -> list[str]:
        """The hooks it acts at, in execution order."""
        return model.hooks.expand(self.hook)

    def check(self, model: Instrumented, x: Inputs) -> None:
        """Raise unless the model has this edit's hooks, heads and positions."""

    def change(self, value: Tensor, name: str, model: Instrumented, x: Inputs) -> Tensor:
        """The value after the edit, a new tensor of the same shape; `value` is left alone."""
        raise NotImplementedError

    def n_selected(self, value: Tensor, name: str, model: Instrumented, x: Inputs) -> int:
        """How many vectors (entries of all axes but the last) it selects at a hook."""
        return value[..., 0].numel()
