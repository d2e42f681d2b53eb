"""Three real models: profile, gate and every method at equal ratio, one command after the other.

    python benchmarks/three_models.py --fit-wikitext FILE --fit-c4 FILE --wikitext FILE --c4 FILE -o FOLDER
                                      [--qwen FILE.gguf] [--gemma FILE.gguf] [--only NAME ...]

Each step is a command of skipcal and leaves a file in FOLDER. A step whose file is there is passed over, and
a sweep that was interrupted goes on, so the same command finishes what is missing. Nothing is fitted on the
texts that the sweep measures on. What is worth keeping of the sweeps is copied to results/equal_ratios_NAME/.
Some hours on one CPU core.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common import RESULTS

KEPT = ("results.csv", "sweep.json", "tables.md")


@dataclass(frozen=True)
class Subject:
    """A model and how it is profiled and fitted.

    config: of its profile; profile: a shipped one instead. fit: options; None: the profile has its gate.
    dtype: in which it is measured.
    """

    name: str
    config: str | None = None
    profile: str | None = None
    fit: tuple[str, ...] | None = None
    dtype: str = "bfloat16"


SUBJECTS = (
    Subject("smollm2", profile="smollm2-135m-instruct", dtype="float32"),
    Subject("qwen", profile="qwen2.5-coder-0.5b-instruct", fit=("--prompts", "64", "--sweeps", "2")),
    Subject("gemma", config="gemma-3-270m", fit=("--prompts", "40")),
)


def commands(
    subject: Subject, model: str | None, fitted_on: list[str], measured_on: list[str], folder: Path
) -> list[tuple[Path, list[str]]]:
    """What each step leaves behind, and its arguments to skipcal."""
    own = ["--model", model] if model else []
    steps: list[tuple[Path, list[str]]] = []
    profile = subject.profile or ""
    if subject.config is not None:
        profile = str(folder / f"{subject.name}.json")
        steps.append(
            (Path(profile), ["profile", "--config", subject.config, *own, *fitted_on, "-o", profile])
        )
    if subject.fit is not None:
        gated = str(folder / f"{subject.name}-gate.json")
        options = ["--profile", profile, "--dtype", subject.dtype, *subject.fit, *own]
        steps.append((Path(gated), ["fit", *options, *fitted_on, "-o", gated]))
        profile = gated
    runs = folder / subject.name
    options = ["--config", "equal-ratios", "--profile", profile, "--dtype", subject.dtype, *own]
    steps.append((runs / "tables.md", ["sweep", *options, *measured_on, "-o", str(runs)]))
    return steps


def main() -> None:
    """Do what is missing."""
    parser = argparse.ArgumentParser()
    for name in ("--fit-wikitext", "--fit-c4", "--wikitext", "--c4"):
        parser.add_argument(name, required=True, type=Path)
    parser.add_argument("-o", "--output", required=True, type=Path)
    parser.add_argument("--qwen", help="the model's file, in place of the hub's")
    parser.add_argument("--gemma", help="the same")
    parser.add_argument("--only", action="append", choices=[each.name for each in SUBJECTS])
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    fitted_on, measured_on = (
        ["--data-files", f"wikitext={wikitext}", "--data-files", f"c4={c4}"]
        for wikitext, c4 in ((given.fit_wikitext, given.fit_c4), (given.wikitext, given.c4))
    )
    files = {"qwen": given.qwen, "gemma": given.gemma}
    for subject in SUBJECTS:
        if given.only and subject.name not in given.only:
            continue
        for done, arguments in commands(
            subject, files.get(subject.name), fitted_on, measured_on, given.output
        ):
            if done.exists():
                continue
            print("skipcal", shlex.join(arguments), file=sys.stderr, flush=True)
            subprocess.run(["skipcal", *arguments], check=True)
        results = RESULTS / f"equal_ratios_{subject.name}"
        results.mkdir(exist_ok=True)
        for name in KEPT:
            shutil.copyfile(given.output / subject.name / name, results / name)


if __name__ == "__main__":
    main()
