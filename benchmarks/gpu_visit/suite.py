"""Tests of the suite as a step."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from gpu_visit.steps import Visit


def tests(
    visit: Visit, *, paths: list[str], processes: int, select: str | None = None
) -> Iterator[dict[str, Any]]:
    """Run `paths` by pytest. Other people's plugins and warnings, of which the image has many, stay out."""
    report = visit.work / "junit.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *paths, "-v", "--tb=short", "-W", "default", "-p", "xdist"]
    command += ["-p", "no:cacheprovider", "-n", str(processes), f"--junitxml={report}"]
    command += ["-k", select] if select else []
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    code = subprocess.run(command, env=env, check=False).returncode
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    wrong = {_name(case): _message(case) for case in cases if _message(case) is not None}
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(wrong) - skipped
    said = f"{passed} passed, {len(wrong)} failed, {skipped} skipped"
    yield {"passed": passed, "failed": wrong, "skipped": skipped, "said": said}
    if code:
        names = ", ".join(name.rpartition("::")[2] for name in wrong)
        raise AssertionError(f"{said}: {names or f'exit code {code} of pytest'}")


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


def _message(case: ElementTree.Element) -> str | None:
    for kind in ("failure", "error"):
        found = case.find(kind)
        if found is not None:
            return str(found.get("message"))[:600]
    return None
