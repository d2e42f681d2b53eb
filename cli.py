"""The `skipcal` command: which commands there are. Each is a function in commands/, in the file of its verb.

Importing it imports no torch; each command imports what it needs.
"""

from __future__ import annotations

import functools

import typer

from skipcal.commands import options as opt
from skipcal.commands.bench import bench
from skipcal.commands.compare import compare
from skipcal.commands.evaluate import evaluate
from skipcal.commands.export import export
from skipcal.commands.fit import fit
from skipcal.commands.generate import generate
from skipcal.commands.help import Command, Group
from skipcal.commands.models import models
from skipcal.commands.plot import plot
from skipcal.commands.profile import profile
from skipcal.commands.push import push
from skipcal.commands.report import report
from skipcal.commands.show import show
from skipcal.commands.sweep import sweep
from skipcal.commands.tune import tune
from skipcal.version import __version__

app = typer.Typer(
    name="skipcal",
    cls=Group,
    context_settings={"max_content_width": 120},
    epilog="Type first: skipcal profile. It takes a small model of its own where no --model is named.",
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


# In the order of work; each step is a heading of the help.
register = functools.partial(app.command, cls=Command)
register(rich_help_panel="Profile a model")(profile)
register(rich_help_panel="Profile a model")(show)
register(rich_help_panel="Profile a model")(plot)
register(rich_help_panel="Profile a model")(report)
register(rich_help_panel="Decode with it, and better")(generate)
register(rich_help_panel="Decode with it, and better")(fit)
register(rich_help_panel="Decode with it, and better")(tune)
register(rich_help_panel="Measure")(evaluate)
register(rich_help_panel="Measure")(sweep)
register(rich_help_panel="Measure")(compare)
register(rich_help_panel="Measure")(bench)
register(rich_help_panel="Know and share")(models)
register(rich_help_panel="Know and share")(push)
register(rich_help_panel="Know and share")(export)


if __name__ == "__main__":
    app()
