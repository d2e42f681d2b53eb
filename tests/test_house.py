"""How large things are: what fits on a screen can be read."""

from __future__ import annotations

import ast
import json
from pathlib import Path

from conftest import ROOT

FILE_LINES, FUNCTION_LINES = 400, 60


def modules() -> list[Path]:
    """All of the package, its tests, benchmarks and scripts; nothing that was built or installed."""
    folders = [
        p for p in ROOT.iterdir() if p.is_dir() and p.name[0] != "." and p.name not in ("build", "runs")
    ]
    found = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    assert {"cli.py", "conftest.py", "eager.py", "mutation.py"} <= {path.name for path in found}
    return found


def test_no_file_is_longer_than_400_lines() -> None:
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in modules()}
    assert {name: count for name, count in lines.items() if count > FILE_LINES} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    lines = {
        f"{path.relative_to(ROOT)}: {node.name}": node.end_lineno - node.lineno + 1
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }
    assert {name: count for name, count in lines.items() if count > FUNCTION_LINES} == {}


def test_the_mutation_scores_that_are_told_are_those_measured() -> None:
    groups = json.loads((ROOT / "tests" / "mutation.json").read_text())["groups"]
    told = (ROOT / "CONTRIBUTING.md").read_text()
    assert set(groups) == {"skip rule", "threshold inversion", "region fit", "statistics merge"}
    for name, found in groups.items():
        assert f"| {name} | {found['mutants']} | {found['killed']} | {found['score']:.3f} |" in told
        assert found["score"] == round(found["killed"] / found["mutants"], 3) >= 0.85
