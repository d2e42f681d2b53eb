"""All that has to be seen and measured on a GPU, in two calls of a few minutes each.

    python benchmarks/gpu_visit check      does all of it work, and what does each kernel take
    python benchmarks/gpu_visit measure    the numbers of docs/gpu.md, settings, and each command on a GPU
    python benchmarks/gpu_visit wheels     beforehand: what a machine without a network lacks, into .wheels/

Works from a bare checkout: where pydantic and the like are missing, they come from .wheels/. A step is a
process of its own with a limit; what fails stops nothing, and is told at the end. Each result is written
as it is there: FOLDER/gpu_check.json or gpu_measure.json, beside it the log, gpu_decode_*.json, and
settings.json, which is a new ops/settings.json. With --device cpu everything runs on tiny shapes: a
rehearsal.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose names are python's too

from gpu_visit.place import download_wheels, prepared_environment  # noqa: E402
from gpu_visit.plan import PLANS  # noqa: E402
from gpu_visit.steps import Visit, run_steps, table  # noqa: E402

_LIMITS_S = {"check": 240.0, "measure": 450.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("check", "measure", "wheels"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shape", help="default: llama-2-7b, on a CPU tiny")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_visit"), help="folder for the results")
    parser.add_argument("--only", action="append", help="this step; repeatable")
    parser.add_argument("--time-limit", type=float, help="seconds for all steps together")
    parser.add_argument("--commit", help="what the checkout is, where it has come without its history")
    options = parser.parse_args()
    if options.what == "wheels":
        download_wheels()
        return
    shape = options.shape or ("llama-2-7b" if options.device == "cuda" else "tiny")
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        visit = Visit(options.device, shape, output, Path(work))
        steps = PLANS[options.what](visit)
        unknown = set(options.only or ()) - {step.name for step in steps}
        if unknown:
            parser.error(f"{', '.join(unknown)}: not among {', '.join(step.name for step in steps)}")
        outcomes = run_steps(
            [step for step in steps if options.only is None or step.name in options.only],
            visit,
            name=f"gpu_{options.what}",
            env=prepared_environment(Path(work), options.device, commit=options.commit),
            limit_s=options.time_limit or _LIMITS_S[options.what],
        )
    print(table(outcomes))
    raise SystemExit(any(outcome.is_failure for outcome in outcomes))


if __name__ == "__main__":
    main()
