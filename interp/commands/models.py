"""`interp hooks`, `interp check` and `interp report`: look at a model, and at a run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from interp.commands.common import SAID, Device, Dtype, ModelArgument, console, fail, load
from interp.errors import InterpError


def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Draw the report of a finished run again from its tables."""
    from interp.report import write_report
    from interp.runs import RunFolder

    try:
        path = write_report(RunFolder.open(folder))
    except SAID as error:
        fail(error)
    console.print(f"report: {path}")


def hooks(
    model: ModelArgument = "tiny",
    pattern: Annotated[str, typer.Argument(help="Which hooks.")] = "*",
) -> None:
    """List a model's hooks in execution order, with the axes of the tensor there."""
    try:
        loaded = load(model)
        names = loaded.hooks.expand(pattern)
    except InterpError as error:
        fail(error)
    for name in names:
        console.print(f"{name:<44}{loaded.hooks.shape(name)}", highlight=False)


def check(model: ModelArgument = "tiny", device: Device = None, dtype: Dtype = None) -> None:
    """Try on a model whether its hooks mean what they claim; exit code 1 if one does not."""
    from interp.check import check as run_check

    try:
        loaded = load(model, device=device, dtype=dtype)
        found = run_check(loaded)
    except (*SAID, AssertionError, RuntimeError) as error:  # torch's own, too
        fail(error)
    console.print(found.table())
    console.print(str(loaded.path()), highlight=False)
    if not found.passed:
        raise typer.Exit(1)
