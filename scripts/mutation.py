"""Mutation score of the core: scripts/mutation.py [--output tests/mutation.json] [GROUP]...

mutmut changes one expression at a time; a mutant that no test notices has survived. The checkout is
the package, but mutmut wants it in a folder of its name, so it works on a copy in a temporary folder.
Each group runs the tests that state its contract, not the whole suite: a mutant that only an
end-to-end number would notice counts as survived.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KILLED = {1, 3, 36, 24, 152, 255, -24, -11, -9}  # exit codes of mutmut: failed, or never came back
CHECKED_BY_TYPES = 37

GROUPS = {
    "skip rule": (
        ["core/cosine.py", "core/batch_rule.py", "core/policy.py", "runtime/engines/eager.py"],
        ["core/test_cosine.py", "core/test_policy.py", "runtime/test_eager.py"],
    ),
    "threshold inversion": (
        ["calibrate/recommend.py", "calibrate/running_maxima.py"],
        ["calibrate/test_recommend.py"],
    ),
    "region fit": (["calibrate/regions.py"], ["calibrate/test_regions.py"]),
    "statistics merge": (
        ["fit/moments.py", "calibrate/saturation.py", "calibrate/gather.py"],
        ["fit/test_moments.py", "calibrate/test_saturation.py", "calibrate/test_gather.py"],
    ),
}  # fmt: skip

# `unraisableexception` collects garbage when a run ends: in a fork of torch, ten times a mutant's own time.
SETTINGS = """
[tool.pytest.ini_options]
addopts = ["--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:unraisableexception",
           "-m", "not slow and not gpu"]
markers = ["gpu: needs a CUDA device", "slow: loads the embedded model"]

[tool.mutmut]
source_paths = ["skipcal"]
only_mutate = {modules}
pytest_add_cli_args_test_selection = {tests}
process_isolation = "forkserver"
track_dependencies = false
use_git_change_detection = false
do_not_mutate_patterns = ['raise \\w+', 'logger\\.\\w+', 'assert ', 'TypeVar']
"""


def main() -> None:
    """Measure the groups, print a line for each, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--output", type=Path, help="groups that are there and not measured are kept")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    if unknown := set(given.groups) - set(GROUPS):
        parser.error(f"{sorted(unknown)} are no groups; expected some of {sorted(GROUPS)}")
    found = {name: measured(name, given.processes) for name in given.groups or GROUPS}
    if given.output:
        versions = {name: version(name) for name in ("mutmut", "numpy", "pytest", "torch")}
        before = json.loads(given.output.read_text())["groups"] if given.output.exists() else {}
        document = {
            "command": "python scripts/mutation.py --output tests/mutation.json",
            "environment": {"python": platform.python_version(), **versions},
            "groups": {**before, **found},
        }
        given.output.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def measured(group: str, processes: int) -> dict[str, Any]:
    """Mutants of a group, killed and survived, by module."""
    modules, tests = GROUPS[group]
    with tempfile.TemporaryDirectory() as folder:
        stage(Path(folder), modules, tests)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(processes)]
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=sys.stderr)
        results = {module: outcome(Path(folder), module) for module in modules}
    mutants = sum(result["mutants"] for result in results.values())
    killed = sum(result["killed"] for result in results.values())
    print(f"{group}: {killed} of {mutants} mutants killed, {killed / mutants:.3f}", flush=True)
    return {"mutants": mutants, "killed": killed, "score": round(killed / mutants, 3), "modules": results}


def stage(folder: Path, modules: list[str], tests: list[str]) -> None:
    """A copy of the package under its name, with its tests beside it and settings for mutmut."""
    unwanted = shutil.ignore_patterns(
        ".*", "tests", "benchmarks", "docs", "notebooks", "__pycache__", "build"
    )
    shutil.copytree(ROOT, folder / "skipcal", ignore=unwanted)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    settings = SETTINGS.format(
        modules=[f"skipcal/{module}" for module in modules],
        tests=[f"tests/{test}" for test in tests],
    )
    (folder / "pyproject.toml").write_text(settings)


def outcome(folder: Path, module: str) -> dict[str, Any]:
    """What became of a module's mutants, and the difference that each survivor makes."""
    codes = json.loads((folder / "mutants" / "skipcal" / f"{module}.meta").read_text())["exit_code_by_key"]
    alive = [name for name, code in codes.items() if code not in KILLED | {CHECKED_BY_TYPES}]
    return {
        "mutants": len(codes),
        "killed": len(codes) - len(alive),
        "survived": {name: difference(folder, name) for name in alive},
    }


def difference(folder: Path, mutant: str) -> list[str]:
    """The changed lines of a mutant."""
    command = [sys.executable, "-m", "mutmut", "show", mutant]
    shown = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    return [line for line in shown.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]


if __name__ == "__main__":
    main()
