"""The command line.

    interp study --model tiny --out results/tiny     the four findings, into a run folder
    interp probe --model M --data ade20k:PATH --out DIR     a probe at every stage, at any scale
    interp heads --model tiny --out results/heads    which heads carry the recovery, and from where
    interp data check PATH                           is a folder of pictures and masks right?
    interp report results/tiny                       draw the page again from a run folder
    interp hooks tiny "blocks.2.*"                   names and shapes of a model's hooks
    interp check MODEL                               do the names mean what they claim on it?
    interp status                                    NDIF: models that are up, key, versions
    interp serve MODEL                               a server of one's own, to rehearse with

Heavy imports happen inside the commands, so `interp --help` answers at once. (No command has an
option `-d`: nnsight reads the arguments of the process for its own debug mode.)
"""

from __future__ import annotations

from typing import Annotated

import typer

from interp import __version__
from interp.commands import data, models, probe, servers, studies
from interp.commands.common import console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Mechanistic interpretability for multimodal LLMs."""
    if version:
        console.print(f"interp {__version__}")
        raise typer.Exit


app.command()(studies.study)
app.command()(probe.probe)
app.command()(studies.heads)
app.add_typer(data.app, name="data")
app.command()(models.report)
app.command()(models.hooks)
app.command()(models.check)
app.command()(servers.status)
# the rehearsal server reads its own arguments
app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)(servers.serve)
