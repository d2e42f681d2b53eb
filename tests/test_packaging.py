"""The root is the package: what is listed, what may lie there, what importing costs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import skipcal

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed() -> None:
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    inits = [ROOT / "__init__.py", *ROOT.glob("[!.]*/**/__init__.py")]
    folders = [init.parent.relative_to(ROOT).parts for init in inits]
    found = [".".join(["skipcal", *f]) for f in folders if f[:1] not in {("build",), ("dist",)}]
    assert sorted(listed) == sorted(found)


def test_no_other_module_lies_in_the_root() -> None:  # it would ship as skipcal.<name>
    own = {"__init__.py", "cli.py", "errors.py", "quiet.py", "style.py", "version.py"}
    assert {p.name for p in ROOT.glob("*.py")} == own


def test_data_files_are_shipped() -> None:
    data = PYPROJECT["tool"]["setuptools"]["package-data"]
    for package, patterns in data.items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: nothing matches {pattern}"


def test_public_names_are_sorted_and_importable() -> None:
    assert sorted(skipcal.__all__) == skipcal.__all__
    assert all(getattr(skipcal, name) is not None for name in skipcal.__all__)
    assert set(skipcal.__all__) <= set(dir(skipcal))
    folders = {name.split(".")[1] for name in PYPROJECT["tool"]["setuptools"]["packages"] if "." in name}
    assert not folders & set(skipcal.__all__)  # importing a subpackage would replace the name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = skipcal.nothing


@pytest.mark.parametrize("module", ["skipcal", "skipcal.cli", "skipcal.errors", "skipcal.core.policy"])
def test_importing_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_each_error_has_a_documented_exit_code() -> None:
    errors = import_module("skipcal.errors")
    tree = errors.__doc__ or ""
    base = errors.SkipcalError
    classes: list[Any] = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, base)]
    assert len(classes) > 5
    for error in classes:
        line = next(line for line in tree.splitlines() if f"{error.__name__} " in line)
        assert str(error.exit_code) in line.split(error.__name__)[1].split()[0]


def test_constraints_pin_every_dependency_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    project = PYPROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(d for extra in project["optional-dependencies"].values() for d in extra),
    ]
    names = {re.split("[<>=;]", d)[0].lower() for d in wanted}
    assert names <= pinned
