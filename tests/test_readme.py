"""What the README says can be typed, can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from skipcal.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHARING = (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ skipcal (.+?)(?<!\\)$", (README + SHARING).replace("\\\n", " "), re.M)


def test_there_are_commands() -> None:
    assert {shlex.split(command)[0] for command in COMMANDS} == {
        "profile",
        "show",
        "plot",
        "generate",
        "evaluate",
        "sweep",
        "compare",
        "bench",
        "fit",
        "models",
        "push",
        "tune",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_is_understood(command: str) -> None:
    name, *args = shlex.split(command)
    group: Any = typer.main.get_command(app)
    group.commands[name].make_context(name, args)  # raises on an unknown or missing option


@pytest.mark.parametrize("target", re.findall(r"^\$ make (\w+)", README, re.M))
def test_a_make_target_of_the_readme_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize(
    "path", re.findall(r"\]\(([\w./-]+)\)|`((?:benchmarks|configs|docs)/[\w./-]+)`", README)
)
def test_a_file_of_the_readme_exists(path: tuple[str, str]) -> None:
    assert (ROOT / (path[0] or path[1])).exists()


def test_the_python_of_the_readme_compiles() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README + SHARING, re.S)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
