"""Notebooks run from top to bottom, define nothing, and their outputs are those of their sources."""

from __future__ import annotations

import json
import os
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from warm_python import environment

jupytext = pytest.importorskip("jupytext")

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def script() -> Any:
    """`scripts/notebooks` as a module."""
    loader = SourceFileLoader("notebooks_script", str(ROOT / "scripts" / "notebooks"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _no_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # beside the script it would stay


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@each_notebook
def test_a_notebook_runs_anywhere_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: str
) -> None:
    place, temporary, kernel = tmp_path / "place", tmp_path / "temporary", tmp_path / "kernels" / "python3"
    for folder in (place, temporary, kernel):
        folder.mkdir(parents=True)
    usual = KernelSpecManager().get_kernel_spec("python3")
    (kernel / "kernel.json").write_text(json.dumps(usual.to_dict() | {"argv": [warm, *usual.argv[1:]]}))
    module = script()
    places = {"TMPDIR": str(temporary), "JUPYTER_PATH": str(tmp_path)}
    given = environment(**module.ENVIRONMENT, **places)
    for name in os.environ.keys() - given.keys():
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    notebook = module.executed(source, place)
    kinds = [output.output_type for output in outputs(notebook)]
    assert "error" not in kinds
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert [path.name for folder in (place, temporary) for path in folder.iterdir()] == []


@each_notebook
def test_committed_outputs_are_small_and_of_the_source_beside_them(source: Path) -> None:
    path = source.with_suffix(".ipynb")
    committed, written = nbformat.read(path, as_version=4), jupytext.read(source)
    assert [(cell.cell_type, cell.source) for cell in committed.cells] == [
        (cell.cell_type, cell.source) for cell in written.cells
    ], f"edit {source.name}, then run scripts/notebooks {source.name[:2]}"
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert committed.metadata["skipcal"]["executed_sha256"] == script().digest(written)
    assert [output for output in outputs(committed) if output.output_type == "error"] == []
    assert [output.text for output in outputs(committed) if output.get("name") == "stderr"] == []
    assert path.stat().st_size < 400_000


def test_every_committed_notebook_has_a_source() -> None:
    assert [path.stem for path in SOURCES] == sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb"))


@each_notebook
def test_a_notebook_is_short_and_defines_nothing(source: Path) -> None:
    notebook = jupytext.read(source)
    assert len(notebook.cells) <= 15
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    words = [line.split()[0] for cell in code for line in cell.splitlines() if line.strip()]
    assert not {"def", "class", "async"} & set(words)


@each_notebook
def test_a_notebook_names_no_place_on_a_computer(source: Path) -> None:
    committed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    for output in outputs(committed):
        data = {kind: text for kind, text in output.get("data", {}).items() if kind != "image/png"}
        told = f"{output.get('text')} {data}"
        places = ("/tmp", "/home/", "/root/", "site-packages", str(ROOT))
        assert [place for place in places if place in told] == []


def test_outputs_of_another_source_are_told_apart() -> None:
    notebook = jupytext.reads("# %%\n1 + 1\n", fmt="py:percent")
    other = jupytext.reads("# %%\n1 + 2\n", fmt="py:percent")
    remarked = jupytext.reads("# %% [markdown]\n# A sum.\n\n# %%\n1 + 1\n", fmt="py:percent")
    digest = script().digest
    assert digest(notebook) == digest(remarked) != digest(other)


def test_prose_can_change_under_its_outputs_and_code_cannot(tmp_path: Path) -> None:
    module = script()
    source, code = tmp_path / "a.py", "# %%\n1 + 1\n"
    source.write_text(f"# %% [markdown]\n# A sum.\n\n{code}")
    before = module.named(jupytext.read(source))
    before.cells[1].outputs = [nbformat.v4.new_output("stream", text="2")]
    before.metadata["skipcal"] = {"executed_sha256": module.digest(before)}
    nbformat.write(before, source.with_suffix(".ipynb"))

    source.write_text(f"# %% [markdown]\n# The sum of ones.\n\n{code}\n# %% [markdown]\n# That was it.\n")
    after = module.with_outputs(source)
    assert [cell.source for cell in after.cells] == ["The sum of ones.", "1 + 1", "That was it."]
    assert outputs(after) == outputs(before)
    source.write_text(source.read_text().replace("1 + 1", "1 + 2"))
    with pytest.raises(SystemExit, match=r"a\.py: its code has changed too; run: scripts/notebooks a"):
        module.with_outputs(source)
