"""What every benchmark shares: ratios by round, and a result file that says where it was made."""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from skipcal.files.writing import dump_json, write_text_atomic
from skipcal.speed.hardware import environment

RESULTS = Path(__file__).parent / "results"


def ratios(above: list[float], below: list[float]) -> dict[str, float]:
    """Median, minimum and maximum of the ratio, round by round."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each), "rounds": len(each)}


def typed() -> str:
    """The command that runs, with the names of files and not where they lie here."""
    from skipcal.commands.console import without_place  # the command line's modules come with it

    return " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *map(without_place, sys.argv[1:])])


def save(name: str, command: str, result: dict[str, Any], *, folder: Path | None = None) -> None:
    """Write results/NAME.json, or the same elsewhere, and print it."""
    document = {"command": command, "environment": environment(), **result}
    write_text_atomic((folder or RESULTS) / f"{name}.json", dump_json(document), overwrite=True)
    print(dump_json(document), end="")


def rounds_option(default: int) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=default, help="counted rounds of every arm")
    return int(parser.parse_args().rounds)
