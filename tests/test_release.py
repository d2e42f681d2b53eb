"""What is released: a wheel that holds the package alone and whole, and a source archive that holds all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import skipcal

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAME = f"skipcal-{skipcal.__version__}"


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Paths of all files under version control."""
    asked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if asked.returncode:
        pytest.skip("not a git checkout")
    return asked.stdout.splitlines()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tracked: list[str]) -> Path:
    """A folder with the wheel and the source archive of the tracked files, built without a network."""
    copy, dist = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for path in tracked:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes((ROOT / path).read_bytes())
    # The archive first and the wheel out of it, as an index would build it.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return dist


def package_files(tracked: list[str]) -> set[str]:
    """The modules and data of the listed packages, as a wheel names them."""
    data = PYPROJECT["tool"]["setuptools"]["package-data"]
    found = set()
    for package in PYPROJECT["tool"]["setuptools"]["packages"]:
        folder = ROOT.joinpath(*package.split(".")[1:])
        for pattern in ("*.py", *data.get(package, ())):
            found |= {path.relative_to(ROOT).as_posix() for path in folder.glob(pattern)}
    return {f"skipcal/{path}" for path in found & set(tracked)}


def test_the_wheel_holds_the_package_and_nothing_else(built: Path, tracked: list[str]) -> None:
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
    info = {name for name in names if name.startswith(f"{NAME}.dist-info/")}
    assert names - info == package_files(tracked)
    assert f"{NAME}.dist-info/licenses/LICENSE" in info


def test_the_source_archive_holds_every_tracked_file(built: Path, tracked: list[str]) -> None:
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {path for path in tracked if not path.startswith(".")} <= names


def test_the_wheel_runs_from_another_folder(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        wheel.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    code = "import skipcal; print(skipcal.__file__); from skipcal.cli import app; app()"
    asked = subprocess.run(
        [sys.executable, "-c", code, "show", "smollm2-135m-instruct"],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    first, _, shown = asked.stdout.partition("\n")
    assert Path(first) == tmp_path / "site" / "skipcal" / "__init__.py", asked.stderr
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in shown


def test_version_changelog_and_citation_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest
    assert citation["version"] == newest[1] == skipcal.__version__
    assert citation["date-released"].isoformat() == newest[2]
    assert citation["license"] == PYPROJECT["project"]["license"]
