"""`interp data`: is a folder of pictures and masks what it should be?

interp data check PATH                           what it is, how much, what is wrong
interp data check PATH --out sheet.png           and a contact sheet to look at
interp data check ade20k:PATH                    as `--data` takes it
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Sets of pictures and masks.")


@app.callback()
def data() -> None:
    """Sets of pictures and masks."""


@app.command()
def check(
    place: Annotated[str, typer.Argument(metavar="PATH", help="A folder, or KIND:PATH.")],
    out: Annotated[Path | None, typer.Option(help="Contact sheet to write, a PNG.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="What it is meant to be; by default what it looks like.")
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="Samples to read of each split.")] = 6,
) -> None:
    """Say what is wrong with a set of pictures and masks; exit 1 if anything is."""
    from interp.datasets.checking import check_data
    from interp.datasets.sheet import contact_sheet
    from interp.errors import DataWrong

    console = Console()
    report = check_data(place, n=n, kind=kind)
    console.print(report)
    if out is not None:
        readable = [data for data in report.sets.values() if len(data)]
        try:
            if not readable:
                raise DataWrong("no split has a picture with a mask")
            contact_sheet(readable[-1], n).save(out)
            console.print(f"contact sheet: {out}", markup=False)
        except (DataWrong, OSError, ValueError) as error:
            console.print(f"no contact sheet: {error}", style="red", markup=False)
            raise typer.Exit(1) from error
    if not report.ok:
        raise typer.Exit(1)
