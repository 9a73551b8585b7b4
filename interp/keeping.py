"""What is kept of a state that a run reads: all of it, or what is made of it where the model is.

A state is `[batch, pos, d_model]`, and a study may want one number of it. What a run keeps is
decided in the forward pass, so that the rest is neither held nor sent back from a server:

| `keep=` | kept of the state at each hook |
|---|---|
| None | the state |
| "tokens" | one vector an image token, `[n_images, n_tokens, d]` (`interp.pooling`) |
| "flat" | the same in one row, `[n_tokens of all images, d]`, also where grids differ |
| a `ProbeBank` | the class its probe reads at each image token, `[n_images, n_tokens]` int64 |
| a function | `fn(state, hook)`, like those of `run_with_hooks`: `lambda z, hook: z[:, -1]` |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from interp.hooked import Hooked
from interp.hooks import HookName
from interp.inputs import Inputs
from interp.pooling import pool, pool_flat

Keep = Any  # None, "tokens", "flat", a ProbeBank, or Callable[[Tensor, HookName], Tensor]


def check_keep(keep: Keep, model: Hooked, names: list[str]) -> None:
    """Raise for something that says not what to keep.

    Args:
        keep: see the module docstring.
        model: to be run.
        names: hooks that are to be read.

    Raises:
        TypeError, ValueError, KeyError: what came, and what would do.
        NotMultimodal: image tokens of a text-only model.
    """
    if keep is None:
        return
    if keep in ("tokens", "flat") or hasattr(keep, "predict"):
        model.family.require_vision()
    if keep in ("tokens", "flat"):
        return
    if hasattr(keep, "predict"):
        for name in names:
            keep.weight(name)  # raises, naming the stages that there are
    elif isinstance(keep, str):
        raise ValueError(f'keep={keep!r}; "tokens", "flat", a ProbeBank or a function would do')
    elif not callable(keep):
        kind = type(keep).__name__
        raise TypeError(f'keep={kind}; "tokens", "flat", a ProbeBank or a function would do')


def slim(keep: Keep, names: list[str]) -> Keep:
    """The same, without the probes of other hooks, and without what a bank knows of its fit."""
    return keep.readout(names) if hasattr(keep, "readout") else keep


def keeper(keep: Keep, model: Hooked, x: Inputs) -> Callable[[Tensor, str], Tensor] | None:
    """What is made of a state at a hook, given both; None to keep it as it is."""
    if keep is None:
        return None

    def tokens(state: Tensor, name: str) -> Tensor:
        grid = model.grid_of(name, x)
        return pool(grid.gather(state), grid, x.grid)

    if keep == "tokens":
        return tokens
    if keep == "flat":

        def flat(state: Tensor, name: str) -> Tensor:
            return pool_flat(state, model.grid_of(name, x), x.grid)

        return flat
    if hasattr(keep, "predict"):

        def classes(state: Tensor, name: str) -> Tensor:
            probe = keep.only([name]).to(state.device)
            made: Tensor = probe.predict(name, tokens(state, name).float())
            return made

        return classes

    def function(state: Tensor, name: str) -> Tensor:
        made = keep(state, HookName(name))
        if not isinstance(made, Tensor):
            raise TypeError(
                f"keep at {name!r} gave {type(made).__name__}; of a state, a tensor is kept"
            )
        # a view would hold the whole state
        return made.clone() if made._base is not None else made

    return function
