"""What `skipcal profile` and `skipcal fit` take beside an earlier commit, and whether they say the same.

    git worktree add ../before REVISION
    python benchmarks/calibration_time.py --before ../before
                                          results/calibration_time.json, about 20 minutes on two cores

The embedded model and text. Each run is a process of its own, and all take turns. A profile is made without
closed loop as well, which tells what decoding and capture take of it, and in bfloat16, for which some
processors have products of their own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import ratios, save

from skipcal.commands.console import without_place
from skipcal.profiles.schema import SkipProfile
from skipcal.speed.timing import interleave

HERE = Path(__file__).parent.parent
START = "from skipcal.cli import app; app()"


@dataclass(frozen=True)
class Arm:
    """A checkout of skipcal, and what it is asked for besides."""

    checkout: Path
    options: tuple[str, ...] = ()

    def commit(self) -> str:
        """Its commit, with a mark where files were changed."""
        command = ["git", "-C", str(self.checkout), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run(arm: Arm, arguments: Sequence[str]) -> tuple[float, SkipProfile]:
    """Seconds of a command of one arm, from a fresh process, and the profile that it wrote."""
    with tempfile.TemporaryDirectory() as place:
        Path(place, "skipcal").symlink_to(arm.checkout.resolve())
        output = Path(place, "made.json")
        environment = {**os.environ, "PYTHONPATH": place, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", START, *arguments, *arm.options, "-o", str(output)]
        begin = time.perf_counter()
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return time.perf_counter() - begin, SkipProfile.load(output)


def recommended(profile: SkipProfile) -> dict[str, Any]:
    """What a profile says: region, policy and operating points."""
    regions = profile.regions
    if profile.gate is not None:
        fit = profile.gate.fit
        return {
            "sweeps": fit.sweeps,
            "gate_r_squared": sum(fit.gate_r_squared) / len(fit.gate_r_squared),
            "surrogate_error": sum(fit.surrogate_error) / len(fit.surrogate_error),
            "points": [point.model_dump() for point in profile.gate.operating_points],
        }
    return {
        "region": [regions.cold_s, regions.cold_e],
        "region_intervals": [regions.cold_s_interval, regions.cold_e_interval],
        "threshold": profile.cosine_policy.threshold,
        "points": [point.model_dump() for point in profile.operating_points],
    }


def compared(arms: Mapping[str, Arm], arguments: Sequence[str], rounds: int) -> dict[str, Any]:
    """All arms by turns: seconds, ratios to the first, and what each recommends."""
    found = interleave({name: partial(run, arm, arguments) for name, arm in arms.items()}, rounds, warm_ups=0)
    seconds = {name: [taken for taken, _ in runs] for name, runs in found.items()}
    first = next(iter(arms))
    return {
        "command": " ".join(["skipcal", *arguments]),
        "arms": {
            name: {"commit": arm.commit(), "options": [without_place(each) for each in arm.options]}
            for name, arm in arms.items()
        },
        "seconds": seconds,
        f"of_{first}": {name: ratios(taken, seconds[first]) for name, taken in seconds.items()},
        "recommended": {name: recommended(runs[-1][1]) for name, runs in found.items()},
    }


def main() -> None:
    """Time what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", required=True, type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    before, after = Arm(given.before), Arm(HERE)
    fits = {"before": before, "after": after}
    profile = ["profile", "--device", "cpu"]
    fit = ["fit", "--profile", "smollm2-135m-instruct", "--dtype", "bfloat16", "--corpus", "embedded"]
    fit += ["--device", "cpu"]
    with tempfile.TemporaryDirectory() as place:
        no_loop = Path(place, "no-loop.yaml")
        no_loop.write_text("closed_loop_prompts: 0\n", encoding="utf-8")
        profiles = {
            **fits,
            "after, no closed loop": Arm(HERE, ("--config", str(no_loop))),
            "after, bfloat16": Arm(HERE, ("--dtype", "bfloat16")),
        }
        found = {
            "profile": compared(profiles, profile, given.rounds),
            "fit": compared(fits, fit, given.rounds),
        }
    command = f"python benchmarks/calibration_time.py --before {before.commit()} --rounds {given.rounds}"
    save("calibration_time", command, found)


if __name__ == "__main__":
    main()
