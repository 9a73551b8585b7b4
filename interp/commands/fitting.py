"""Options of a probe's fit, for the commands that fit one."""

from __future__ import annotations

from typing import Annotated

import typer

Solver = Annotated[str, typer.Option(help="logistic, or ridge (one pass, exact).")]
Memory = Annotated[float, typer.Option(help="GB of memory in which logistic may keep features.")]
Disk = Annotated[float, typer.Option(help="GB on disk in which it may, as bfloat16.")]
Penalty = Annotated[float, typer.Option("--C", help="Inverse penalty of logistic.")]
Components = Annotated[
    int | None, typer.Option(help="Principal components a probe may use: one capacity for all.")
]
ClassWeight = Annotated[
    str | None, typer.Option(help='"balanced": rare classes count as much as frequent ones.')
]
Epochs = Annotated[int, typer.Option(help="Passes of logistic over features it cannot keep.")]
