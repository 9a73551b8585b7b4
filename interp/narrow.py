"""The last block of a pass, computed only where its output is looked at.

Attention mixes positions; the MLP behind it works on each by itself. So in the last block that a
pass goes through, the MLP is needed at the positions that are read, and at no others. Elsewhere the
block's output lacks its MLP, and is not to be looked at.
"""

from __future__ import annotations

from torch import Tensor

from interp.hooked import Hooked
from interp.steps import BEFORE, Step


def narrowing(model: Hooked, layer: int, positions: Tensor) -> list[Step]:
    """Steps that take a block's MLP through some positions only; gradients flow as through all.

    Args:
        model: a loaded model.
        layer: of the block, the last one of the pass.
        positions: `[n]` those that are read, in any row of the batch.
    """
    rank, path = model.hooks.rank, model.family.block_path(layer, "mlp")
    n_pos = 0

    def enter() -> None:
        nonlocal n_pos
        mlp = model.envoy(path)
        (states, *rest), kwargs = mlp.inputs
        n_pos = states.shape[1]
        mlp.inputs = ((states[:, positions.to(states.device)], *rest), kwargs)

    def leave() -> None:
        mlp = model.envoy(path)
        made = mlp.output
        whole = made.new_zeros(made.shape[0], n_pos, made.shape[2])
        mlp.output = whole.index_copy(1, positions.to(made.device), made)

    prefix = f"blocks.{layer}"
    return [
        Step(rank(f"{prefix}.mlp.hook_pre") + BEFORE, enter),
        Step(rank(f"{prefix}.hook_mlp_out") + BEFORE, leave),
    ]
