"""`interp study` and `interp heads`: the four findings, and which heads carry the recovery."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from interp.commands.common import (
    QUESTION,
    SAID,
    BatchSize,
    Data,
    Device,
    DeviceMap,
    DryRun,
    Dtype,
    Model,
    Overwrite,
    Question,
    Resize,
    Seed,
    Threads,
    console,
    fail,
    load,
    size,
    steps,
)
from interp.commands.fitting import Memory, Solver


def study(
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    model: Model = "tiny",
    data: Data = "scenes",
    n_probe: Annotated[int, typer.Option(help="Images the probes are fitted on.")] = 600,
    n_test: Annotated[int, typer.Option(help="Images everything is reported on.")] = 300,
    batch_size: BatchSize = 50,
    solver: Solver = "logistic",
    memory: Memory = 4.0,
    resize: Resize = None,
    question: Question = QUESTION,
    seed: Seed = 0,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> None:
    """Run the paper's four experiments on a model and write tables, probes and a report."""
    from interp.probes.fitting import Fitting
    from interp.report.text import findings_table
    from interp.studies.study import StudyArguments
    from interp.studies.study import study as run_study
    from interp.threads import suit_threads

    try:
        arguments = StudyArguments(
            model, data, n_probe, n_test, question, batch_size,
            resize=size(resize), fitting=Fitting(solver, memory=memory), seed=seed,
        )  # fmt: skip
        loaded = load(model, device=device, device_map=device_map, dtype=dtype)
        suit_threads(loaded, threads)
        summary = run_study(loaded, out, arguments, overwrite=overwrite)
    except SAID as error:
        fail(error)
    console.print(findings_table(summary))
    console.print(f"report: {out / 'report.html'}")


def heads(
    out: Annotated[Path | None, typer.Option(help="Run folder to write.")] = None,
    model: Model = "tiny",
    data: Data = "scenes",
    method: Annotated[
        str,
        typer.Option(help="screen (gradients, the top ones verified), direct, gradient, exact."),
    ] = "screen",
    start: Annotated[str, typer.Option(help="Heads behind this stage.")] = "adapter.hook_out",
    end: Annotated[str | None, typer.Option(help="Heads up to this stage; the last block.")] = None,
    sources: Annotated[
        str, typer.Option(help='"region", "place", "whole", or one group of source tokens.')
    ] = "region",
    budget: Annotated[float, typer.Option(help="Share that screen verifies exactly.")] = 0.05,
    n_probe: Annotated[int, typer.Option(help="Images the probes are fitted on.")] = 200,
    n_test: Annotated[int, typer.Option(help="Images the heads are attributed on.")] = 60,
    batch_size: BatchSize = 20,
    memory: Annotated[
        float | None, typer.Option(help="GB beyond the weights for exact effects.")
    ] = None,
    resize: Resize = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    remote: Annotated[
        str, typer.Option(help='"ndif" or the URL of a server that runs the model.')
    ] = "",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Attribute the recovery to heads, by the tokens they read from."""
    from interp.studies.head_study import HeadArguments, head_study, head_table, prepare
    from interp.threads import suit_threads

    try:
        arguments = HeadArguments(
            model, data, method, start, end, sources, budget, n_probe, n_test, batch_size,
            memory=memory, resize=size(resize), seed=seed,
        )  # fmt: skip
        if out is None and not dry_run:
            raise ValueError("--out is missing: the run folder to write (or --dry-run)")
        loaded = load(model, device=device, dtype=dtype, remote=remote)
        suit_threads(loaded, threads)
        if dry_run:
            asked = prepare(loaded, arguments)
            console.print(f"{method}: {head_table(loaded, asked, arguments, dry_run=True)}")
            return
        assert out is not None
        with steps({"heads": 0}) as tell:
            done = 0

            def on_step(n: int, total: int) -> None:
                nonlocal done
                tell("heads", n - done)
                done = n

            table = head_study(loaded, out, arguments, overwrite=overwrite, on_step=on_step)
    except SAID as error:
        fail(error)
    console.print(table)
    console.print(f"table: {out / 'heads.parquet'}")
