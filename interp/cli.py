"""The command line: `interp study`, `heads`, `report`, `hooks`, `check`, `status`, `serve`.

    interp study --model tiny --out results/tiny     the four findings, into a run folder
    interp heads --model tiny --out results/heads    which heads carry the recovery, and from where
    interp report results/tiny                       draw the page again from a run folder
    interp hooks tiny "blocks.2.*"                   names and shapes of a model's hooks
    interp check MODEL                               do the names mean what they claim on it?
    interp status                                    NDIF: models that are up, key, versions
    interp serve MODEL                               a server of one's own, to rehearse with

Heavy imports happen inside the commands, so `interp --help` answers at once. (No command has an
option `-d`: nnsight reads the arguments of the process for its own debug mode.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from interp import __version__
from interp.errors import InterpError, MissingLibrary

if TYPE_CHECKING:
    from interp.model import MLLM

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Mechanistic interpretability for multimodal LLMs."""
    if version:
        console.print(f"interp {__version__}")
        raise typer.Exit


@app.command()
def study(
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    model: Annotated[str, typer.Option(help='"tiny", a hub id or a local folder.')] = "tiny",
    n_probe: Annotated[int, typer.Option(help="Images the probes are fitted on.")] = 600,
    n_test: Annotated[int, typer.Option(help="Images everything is reported on.")] = 300,
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    device: Annotated[str | None, typer.Option(help='For instance "cuda".')] = None,
    dtype: Annotated[str | None, typer.Option(help='For instance "bfloat16".')] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of torch on the CPU; one if the model is small.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace another study in OUT.")] = False,
) -> None:
    """Run the paper's four experiments on a model and write tables, probes and a report."""
    from interp.report.text import findings_table
    from interp.studies.study import StudyArguments
    from interp.studies.study import study as run_study
    from interp.threads import suit_threads

    arguments = StudyArguments(model=model, n_probe=n_probe, n_test=n_test, seed=seed)
    try:
        loaded = _load(model, device=device, dtype=dtype)
        suit_threads(loaded, threads)
        summary = run_study(loaded, out, arguments, overwrite=overwrite)
    except (InterpError, ValueError) as error:
        _fail(error)
    console.print(findings_table(summary))
    console.print(f"report: {out / 'report.html'}")


@app.command()
def heads(
    out: Annotated[Path | None, typer.Option(help="Run folder to write.")] = None,
    model: Annotated[str, typer.Option(help='"tiny", a hub id or a local folder.')] = "tiny",
    data: Annotated[str, typer.Option(help='The bundled "scenes".')] = "scenes",
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
    batch_size: Annotated[int, typer.Option(help="Images in one forward pass.")] = 20,
    memory: Annotated[
        float | None, typer.Option(help="GB beyond the weights for exact effects.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    device: Annotated[str | None, typer.Option(help='For instance "cuda".')] = None,
    dtype: Annotated[str | None, typer.Option(help='For instance "bfloat16".')] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of torch on the CPU; one if the model is small.")
    ] = None,
    remote: Annotated[
        str, typer.Option(help='"ndif" or the URL of a server that runs the model.')
    ] = "",
    dry_run: Annotated[bool, typer.Option(help="Say what it costs, and stop.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace another run in OUT.")] = False,
) -> None:
    """Attribute the recovery to heads, by the tokens they read from."""
    from interp.studies.head_study import HeadArguments, head_study, head_table, prepare
    from interp.threads import suit_threads

    arguments = HeadArguments(
        model, data, method, start, end, sources, budget, n_probe, n_test, batch_size,
        memory=memory, seed=seed,
    )  # fmt: skip
    try:
        if out is None and not dry_run:
            raise ValueError("--out is missing: the run folder to write (or --dry-run)")
        loaded = _load(model, device=device, dtype=dtype, remote=remote)
        suit_threads(loaded, threads)
        if dry_run:
            asked = prepare(loaded, arguments)
            console.print(f"{method}: {head_table(loaded, asked, arguments, dry_run=True)}")
            return
        assert out is not None
        with _bar() as on_step:
            table = head_study(loaded, out, arguments, overwrite=overwrite, on_step=on_step)
    except (InterpError, ValueError) as error:
        _fail(error)
    console.print(table)
    console.print(f"table: {out / 'heads.parquet'}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Draw the report of a finished run again from its tables."""
    from interp.report import write_report
    from interp.runs import RunFolder

    try:
        path = write_report(RunFolder.open(folder))
    except (InterpError, ValueError, OSError) as error:
        _fail(error)
    console.print(f"report: {path}")


@app.command()
def hooks(
    model: Annotated[str, typer.Argument(help='"tiny", a hub id or a local folder.')] = "tiny",
    pattern: Annotated[str, typer.Argument(help="Which hooks.")] = "*",
) -> None:
    """List a model's hooks in execution order, with the axes of the tensor there."""
    try:
        loaded = _load(model)
        names = loaded.hooks.expand(pattern)
    except InterpError as error:
        _fail(error)
    for name in names:
        console.print(f"{name:<44}{loaded.hooks.shape(name)}", highlight=False)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help='"tiny", a hub id or a local folder.')] = "tiny",
    device: Annotated[str | None, typer.Option(help='For instance "cuda".')] = None,
    dtype: Annotated[str | None, typer.Option(help='For instance "bfloat16".')] = None,
) -> None:
    """Try on a model whether its hooks mean what they claim; exit code 1 if one does not."""
    from interp.check import check as run_check

    try:
        loaded = _load(model, device=device, dtype=dtype)
        found = run_check(loaded)
    except (InterpError, ValueError, AssertionError, RuntimeError) as error:  # torch's own, too
        _fail(error)
    console.print(found.table())
    console.print(str(loaded.path()), highlight=False)
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def status(
    remote: Annotated[str, typer.Option(help='"ndif", or the URL of a server.')] = "ndif",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Trust this host: its results can run code here.")
    ] = None,
) -> None:
    """Show which models a server has up, and whether key and versions fit."""
    from interp.remote import status as look

    try:
        found = look(True if remote == "ndif" else remote, tuple(allow_host or ()))
    except (InterpError, ValueError) as error:
        _fail(error)
    console.print(found)
    if not found.ok:
        raise typer.Exit(1)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def serve(context: typer.Context) -> None:
    """Serve one model on this machine as NDIF would, to rehearse scripts with (--help tells all).

    The server is a program of its own that cannot import this library, as NDIF cannot.
    """
    import importlib.util
    import os
    import sys

    from interp.loading import BUNDLED

    needs = ("fastapi", "uvicorn", "websockets", "python_multipart")
    if lacking := [name for name in needs if importlib.util.find_spec(name) is None]:
        _fail(MissingLibrary(f"no {', '.join(lacking)} here: pip install 'interp[serve]'"))
    program = Path(__file__).parent / "rehearsal" / "__main__.py"
    arguments = list(context.args)
    if arguments and arguments[0] in BUNDLED:
        arguments[:1] = [str(BUNDLED[arguments[0]]), "--name", arguments[0]]
    os.execv(sys.executable, [sys.executable, str(program), *arguments])


def _load(model: str, **options: Any) -> MLLM:
    """The model, without transformers' bar for each file."""
    from transformers.utils import logging

    from interp.model import MLLM

    logging.disable_progress_bar()
    return MLLM.load(model, **options)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar with the time left, and what to tell it (steps done, steps in all)."""
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bars:
        task = bars.add_task("heads", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _fail(error: Exception) -> NoReturn:
    Console(stderr=True).print(f"[bold]error:[/bold] {error}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)
