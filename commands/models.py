"""`skipcal models`, which cli.py registers. Importing it imports no torch."""

from __future__ import annotations

from typing import Annotated, Any

from skipcal.commands import options as opt
from skipcal.commands.console import command

Check = Annotated[bool, opt.option("--check", help="Build a tiny model of each family and prove its blocks.")]


def models(check: Check = False, as_json: opt.Json = False, debug: opt.Debug = False) -> None:
    """List the known model families and the shipped profiles.

    Example: skipcal models --check
    """
    with command(as_json, debug) as console:
        from skipcal.arch.families import UNSUPPORTED, families_listed
        from skipcal.profiles.sources import shipped_profiles

        rows = families_listed()
        if check:
            console.importing()
            from skipcal.arch.check import checked

            rows = checked(rows)
        refused = [{"family": name, "reason": reason} for name, reason in sorted(UNSUPPORTED.items())]
        console.result(
            {"families": rows, "unsupported": refused, "profiles": shipped_profiles()},
            "\n".join(
                [
                    f"{'family':<20}{'found':<11}{'kind':<25}{'proof error':<13}chain of modules to f",
                    *map(_family_line, rows),
                    "\nOther families are found by structure; every model is proven before use.",
                    "\nThese cannot be skipped:",
                    *(f"{row['family']:<19} {row['reason']}" for row in refused),
                    f"\nShipped profiles: {', '.join(shipped_profiles()) or 'none'}",
                ]
            ),
        )


def _family_line(row: dict[str, Any]) -> str:
    error = row.get("proof_error")
    words = "-" if error is None else f"{error:.1e}"
    chain = " -> ".join(row["chain"])
    return f"{row['family']:<19} {row['found'] or 'not here':<11}{row['kind']:<25}{words:<13}{chain}"
