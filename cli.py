"""The `skipcal` command: which commands there are. Each is a function in the package of its verb.

Importing it imports no torch; each command imports what it needs.
"""

from __future__ import annotations

import typer

from skipcal import __version__
from skipcal.arch.command import models
from skipcal.calibrate.commands import compare, fit, tune
from skipcal.calibrate.profile_command import profile
from skipcal.configs import options as opt
from skipcal.evaluation.commands import evaluate, sweep
from skipcal.plots.command import plot
from skipcal.profiles.commands import push, show
from skipcal.runtime.command import generate
from skipcal.speed.command import bench

app = typer.Typer(
    name="skipcal",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def main(version: opt.Version = False) -> None:
    """Find the FFN blocks a token does not need, and decode without them."""
    if version:
        typer.echo(f"skipcal {__version__}")
        raise typer.Exit


app.command()(profile)
app.command()(show)
app.command()(plot)
app.command()(generate)
app.command()(fit)
app.command()(tune)
app.command()(evaluate)
app.command()(sweep)
app.command()(compare)
app.command()(bench)
app.command()(models)
app.command()(push)


if __name__ == "__main__":
    app()
