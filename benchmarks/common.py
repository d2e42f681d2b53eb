"""What every benchmark shares: interleaved timing, and a result file that says where it was made."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

import skipcal
from skipcal.profiles.files import dump_json, write_text_atomic

Measured = TypeVar("Measured")
RESULTS = Path(__file__).parent / "results"


def interleave(arms: dict[str, Callable[[], Measured]], rounds: int) -> dict[str, list[Measured]]:
    """What each arm returned, by round. The arms take turns, so a drifting machine hits all alike.

    Every second round runs in reverse order; one round before them is not counted.
    """
    results: dict[str, list[Measured]] = {name: [] for name in arms}
    for index in range(rounds + 1):
        order = list(arms) if index % 2 else list(reversed(arms))
        measured = {name: arms[name]() for name in order}
        if index:
            for name, value in measured.items():
                results[name].append(value)
    return results


def ratios(above: list[float], below: list[float]) -> dict[str, float]:
    """Median, minimum and maximum of the ratio, round by round."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each), "rounds": len(each)}


def environment() -> dict[str, Any]:
    """Hardware and versions."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    git = ["git", "-C", str(Path(__file__).parents[1]), "rev-parse", "--short", "HEAD"]
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "skipcal": skipcal.__version__,
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def save(name: str, command: str, result: dict[str, Any]) -> None:
    """Write results/NAME.json and print it."""
    document = {"command": command, "environment": environment(), **result}
    write_text_atomic(RESULTS / f"{name}.json", dump_json(document), overwrite=True)
    print(dump_json(document), end="")


def rounds_option(default: int) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=default, help="counted rounds of every arm")
    return int(parser.parse_args().rounds)
