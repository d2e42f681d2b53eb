"""Commands as a user gives them, with what they must answer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import typer.testing
from typer.testing import CliRunner

from skipcal.cli import app

_testing: Any = typer.testing
_testing._get_command = cache(_testing._get_command)  # else made anew for each call, in 25 ms
runner = CliRunner()


def run(*args: str | Path, code: int = 0) -> Any:
    done = runner.invoke(app, [str(arg) for arg in args])
    assert done.exit_code == code, f"{args}: {done.exit_code}\n{done.output}\n{done.stderr}"
    return done


def refused(*args: str | Path, code: int) -> str:
    done = run(*args, code=code)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines: list[str] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]
