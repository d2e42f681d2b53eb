"""`skipcal sweep`. Importing it imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from skipcal.commands import evaluate_options as own
from skipcal.commands import options as opt
from skipcal.commands.console import Console, command, command_line, given, listed, numbers
from skipcal.errors import OutputError

if TYPE_CHECKING:
    from skipcal.configs.sweep import SweepConfig


@opt.takes(opt.loading, own.scoring)
def sweep(
    ctx: typer.Context,
    output: opt.RequiredFolder,
    config: opt.ConfigFile = None,
    profile: opt.OptionalProfile = None,
    methods: own.Methods = None,
    ratios: own.Ratios = None,
    tasks: own.Tasks = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
    **shared: Any,
) -> None:
    """Compare methods over skip ratios and tasks: tables and figures.

    An interrupted sweep goes on where it stopped when the same command is given again.

    Example: skipcal sweep --config embedded-sweep -o runs/sweep
    """
    with command(as_json, debug) as console:
        from skipcal.configs.sweep import load_sweep

        options = given(ctx, "tasks", "methods", "ratios", "output", "overwrite")
        options["task"] = listed("--tasks", tasks)
        options["methods"] = listed("--methods", methods)
        options["ratios"] = numbers("--ratios", ratios)
        sweep_into(console, load_sweep(config, options), output, overwrite)


def sweep_into(console: Console, settings: SweepConfig, folder: Path | None, overwrite: bool) -> None:
    """Run a sweep into `folder`, by default one named by its settings; print and write what was found."""
    from skipcal.profiles.schema import SkipProfile

    found = SkipProfile.load(settings.profile)
    settings = console.settled(found, settings)

    console.importing()
    from skipcal.evaluation.records import digest
    from skipcal.evaluation.sweep import plan, run_sweep
    from skipcal.report.sweep import (
        SETTINGS,
        begin_folder,
        check_folder,
        sweep_settings,
        tables,
        write_results,
    )

    plan(found, settings)
    recorded = sweep_settings(settings, found)
    place = folder or Path("runs") / f"evaluate-{digest(recorded)}"
    if place.exists() and not place.is_dir():
        raise OutputError(f"{place} is a file; give the name of a folder with --output")
    console.output(place / SETTINGS, overwrite=True)
    check_folder(place, recorded, overwrite=overwrite)
    loaded = console.load(settings.model_dump())
    found.check_fits(loaded.model)

    def begin() -> None:
        begin_folder(place, recorded, overwrite=overwrite)
        console.on_interrupt = f"finished items are kept in {place}; give the same command again to go on"

    result = run_sweep(loaded, found, settings, place, begin=begin)
    written = write_results(result, loaded, recorded, command=command_line())
    console.result(as_rows(result.frame), tables(result.frame))
    for path in written:
        console.say(f"wrote {path}")


def as_rows(frame: Any) -> list[dict[str, Any]]:
    """A table as JSON values; what is missing is null."""
    rows: list[dict[str, Any]] = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return rows
