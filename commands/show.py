"""`skipcal show`. Importing it imports no torch."""

from __future__ import annotations

from skipcal.commands import options as opt
from skipcal.commands.console import command


def show(source: opt.ProfileArgument, as_json: opt.Json = False, debug: opt.Debug = False) -> None:
    """Print what a profile recommends, and why.

    Example: skipcal show smollm2-135m-instruct
    """
    with command(as_json, debug) as console:
        from skipcal.profiles.schema import SkipProfile
        from skipcal.profiles.summary import summarize

        found = SkipProfile.load(source)
        console.document(found.to_json(), summarize(found, by_layer=True))
