"""`interp status` and `interp serve`: NDIF, and a server of one's own to rehearse with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from interp.commands.common import SAID, console, fail
from interp.errors import MissingLibrary


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
    except SAID as error:
        fail(error)
    console.print(found)
    if not found.ok:
        raise typer.Exit(1)


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
        fail(MissingLibrary(f"no {', '.join(lacking)} here: pip install 'interp[serve]'"))
    program = Path(__file__).parents[1] / "rehearsal" / "__main__.py"
    arguments = list(context.args)
    if arguments and arguments[0] in BUNDLED:
        arguments[:1] = [str(BUNDLED[arguments[0]]), "--name", arguments[0]]
    os.execv(sys.executable, [sys.executable, str(program), *arguments])
