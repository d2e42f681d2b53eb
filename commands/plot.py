"""`skipcal plot`, which cli.py registers. Importing it imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipcal.commands import completion
from skipcal.commands import options as opt
from skipcal.commands.console import command

PlotArgument = Annotated[
    str,
    typer.Argument(
        metavar="PROFILE",
        help=f"Profile: {opt.PROFILE_FORMS}; or a result of skipcal bench.",
        autocompletion=completion.profiles,
    ),
]


def plot(
    source: PlotArgument,
    output: opt.Figure,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Draw a profile's saturation curve, or what skipcal bench measured.

    Example: skipcal plot smollm2-135m-instruct -o curve.png
    """
    with command(as_json, debug) as console:
        console.doing("drawing")
        from skipcal.speed.files import is_result, load_result

        if is_result(Path(source)):
            from skipcal.plots.speed import save_speed_figure

            save_speed_figure(load_result(Path(source)), output, overwrite=overwrite)
        else:
            from skipcal.profiles.curve import save_figure
            from skipcal.profiles.schema import SkipProfile

            save_figure(SkipProfile.load(source), output, overwrite=overwrite)
        console.result({"output": str(output)}, f"wrote {output}")
