"""Options of a probe's fit, for the commands that fit one."""

from __future__ import annotations

from typing import Annotated

import typer

Solver = Annotated[str, typer.Option(help="logistic, or ridge (one pass, exact).")]
Memory = Annotated[float, typer.Option(min=0, help="GB of memory for features of logistic.")]
Disk = Annotated[float, typer.Option(min=0, help="GB on disk in which it may, as bfloat16.")]
Penalty = Annotated[float, typer.Option("--C", help="Inverse penalty of logistic.")]
Components = Annotated[
    int | None,
    typer.Option(min=1, help="Principal components of each stage that a probe uses."),
]
ClassWeight = Annotated[
    str | None, typer.Option(help='"balanced": rare classes count as much as frequent ones.')
]
Epochs = Annotated[int, typer.Option(min=1, help="Passes of logistic where nothing is kept.")]
