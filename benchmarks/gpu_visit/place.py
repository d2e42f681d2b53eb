"""What the steps run in: this checkout as `skipcal`, and the packages that a machine lacks."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".wheels"
# What images made for torch are without, of all that the steps import.
MODULES = {
    "pydantic": "pydantic",
    "pydantic_core": "pydantic_core",
    "annotated_types": "annotated-types",
    "typing_inspection": "typing-inspection",
}
_NEWER = ("typing_extensions",)  # there, but perhaps older than what pydantic needs
_PYTHON, _PLATFORMS = "3.12", ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def download_wheels() -> None:
    """Fill .wheels/ for Python 3.12, in the versions that are installed here."""
    names = [f"{name}=={version(name)}" for name in (*MODULES.values(), *_NEWER)]
    for old in WHEELS.glob("*.whl"):  # two versions of one would stop the whole installation
        old.unlink()
    platforms = [option for name in _PLATFORMS for option in ("--platform", name)]
    command = [*_pip("download"), "--only-binary=:all:", "--python-version", _PYTHON, *platforms]
    subprocess.run([*command, "-d", str(WHEELS), *names], check=True)


def prepared_environment(work: Path, device: str, *, commit: str | None) -> dict[str, str]:
    """Variables under which a step finds this checkout, what it imports, and its caches in `work`.

    Exits with a word of advice where a package is missing.
    """
    site = work / "site"
    site.mkdir()
    (site / "skipcal").symlink_to(ROOT, target_is_directory=True)
    missing = [name for module, name in MODULES.items() if importlib.util.find_spec(module) is None]
    if missing:
        wheels = sorted(map(str, WHEELS.glob("*.whl")))
        if not wheels:
            sys.exit(f"{', '.join(missing)} are missing; first run: python benchmarks/gpu_visit wheels")
        subprocess.run([*_pip("install"), "--no-index", "--target", str(site), *wheels], check=True)
    paths = [str(site), str(ROOT / "benchmarks"), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONSAFEPATH": "1",  # the current folder has names of its own
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TRITON_INTERPRET": "0",  # but for steps that ask for it
        **({} if commit is None else {"SKIPCAL_COMMIT": commit}),
        **({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if device == "cpu" else {}),
    }


def _pip(verb: str) -> list[str]:
    return [sys.executable, "-m", "pip", verb, "-q", "--no-deps", "--disable-pip-version-check"]
