"""What commands share: options with one meaning everywhere, loading, progress, errors in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from interp.errors import InterpError

if TYPE_CHECKING:
    from interp.model import MLLM

console = Console()

#: what a command tells in words instead of a traceback
SAID = (InterpError, ValueError, OSError)

Model = Annotated[str, typer.Option(help='"tiny", a hub id or a local folder.')]
ModelArgument = Annotated[str, typer.Argument(help='"tiny", a hub id or a local folder.')]
Data = Annotated[
    str,
    typer.Option(
        help='"scenes" (bundled), ade20k:PATH, voc:PATH, cityscapes:PATH, coco-stuff:PATH, '
        "folder:PATH or hf:REPO@REVISION."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of every random draw.")]
Device = Annotated[str | None, typer.Option(help='For instance "cuda".')]
Dtype = Annotated[str | None, typer.Option(help='For instance "bfloat16".')]
DeviceMap = Annotated[
    str | None, typer.Option(help='"auto" spreads a model that is too large for one GPU.')
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Of torch on the CPU; one if the model is small.")
]
Resize = Annotated[
    str | None,
    typer.Option(
        metavar="WxH",
        help="Bring pictures to one size first, such as 448x448: for models that look at each in "
        "its own size.",
    ),
]
Question = Annotated[str, typer.Option(help="The prompt beside the picture.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures in one forward pass.")]
Overwrite = Annotated[bool, typer.Option(help="Replace another run in OUT.")]
DryRun = Annotated[bool, typer.Option(help="Say what it costs, and stop.")]
QUESTION = "What is in the picture?"


def load(model: str, **options: Any) -> MLLM:
    """The model, without transformers' bar for each file; options that are None are left out.

    Raises:
        ValueError: a device that is not there; and what `MLLM.load` raises.
    """
    from transformers.utils import logging

    from interp.model import MLLM

    logging.disable_progress_bar()
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return MLLM.load(model, **given)
    except (RuntimeError, AssertionError) as error:  # torch's own words for a device it lacks
        if "device" not in given or isinstance(error, InterpError):
            raise
        raise ValueError(f"--device {given['device']}: {str(error).splitlines()[0]}") from error


def size(text: str | None) -> tuple[int, int] | None:
    """(width, height) from "448x448".

    Raises:
        ValueError: something else.
    """
    if text is None:
        return None
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ValueError(f"--resize {text}: width and height in pixels, such as 448x448")
    return int(width), int(height)


@contextmanager
def steps(total: dict[str, int], *, quiet: bool = False) -> Iterator[Callable[[str, int], None]]:
    """Progress bars with the time left, a step each.

    Args:
        total: name of a step -> how many pictures it has, over all passes.
        quiet: show none.

    Yields:
        What to tell: the step, and how many pictures more are done.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, transient=True, disable=quiet) as bars:
        tasks = {name: bars.add_task(name, total=n, start=False) for name, n in total.items()}

        def tell(step: str, more: int) -> None:
            task = tasks[step]
            if not bars.tasks[task].started:
                bars.start_task(task)
            # the first part is looked at once more, for its units
            at = bars.tasks[task]
            bars.update(task, completed=min(at.completed + more, at.total or at.completed + more))

        yield tell


def fail(error: Exception) -> NoReturn:
    """Say an error in words, and end with exit code 1."""
    Console(stderr=True).print(f"[bold]error:[/bold] {error}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)
