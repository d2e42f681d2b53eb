"""What a command shows in a terminal, and what it keeps to itself in a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from typing import Any

import pytest
import typer
from command_line import runner
from test_cli_help import GROUP
from warm_python import environment

from skipcal.commands.console import command, duration, given
from skipcal.commands.help import Command

SKIPCAL = (sys.executable, "-m", "skipcal.cli")


def in_a_terminal(*args: str, columns: int = 80, **environment: str) -> tuple[str, str, int]:
    """Stdout of a command with its stderr in a terminal, what stands in that, and the exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("TQDM_DISABLE", "COLUMNS")}
    started = subprocess.Popen(
        [*SKIPCAL, *args], stdout=subprocess.PIPE, stderr=theirs, stdin=theirs, env={**env, **environment}
    )
    os.close(theirs)
    seen = bytearray()
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the last one has left the terminal
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    assert started.stdout is not None
    out = started.stdout.read().decode()
    started.stdout.close()
    return out, seen.decode(), started.wait()


@pytest.fixture(scope="module")
def watched() -> tuple[str, str, int]:
    return in_a_terminal("bench", "--shape", "tiny", "--rounds", "1", "--ratios", "0.25", "--new-tokens", "4",
                         "--context-tokens", "8", "--device", "cpu", "--json", NO_COLOR="1")  # fmt: skip


def test_a_terminal_sees_what_is_done_how_far_it_is_and_how_long_it_took(
    watched: tuple[str, str, int],
) -> None:
    _, seen, code = watched
    assert code == 0
    assert seen.startswith("importing torch and transformers ...")
    assert re.search(r"batch 1, context 8: +\d+%.*\d+/\d+ \[", seen)
    assert re.search(r"took (\d+ min )?\d+ s\r\n$", seen)


def test_a_line_in_a_terminal_of_80_columns_has_80_at_most(watched: tuple[str, str, int]) -> None:
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", watched[1]))
    assert max(map(len, lines)) <= 80


def test_no_colours_and_one_document_on_stdout(watched: tuple[str, str, int]) -> None:
    import json

    out, seen, _ = watched
    assert json.loads(out)["format"].startswith("skipcal.bench/")
    assert "\x1b[3" not in seen


def test_in_a_pipe_stderr_is_silent(warm: str) -> None:
    env = {k: v for k, v in environment().items() if k != "TQDM_DISABLE"}
    done = subprocess.run(
        [warm, "-m", "skipcal.cli", "bench", "--shape", "tiny", "--rounds", "1", "--ratios", "0.25",
         "--new-tokens", "4", "--context-tokens", "8", "--device", "cpu"],
        capture_output=True, text=True, check=True, env=env,
    )  # fmt: skip
    assert done.stderr == ""
    assert "\x1b" not in done.stdout and "took" not in done.stdout


@pytest.mark.parametrize("term", ["dumb", "xterm-256color"])
def test_help_has_no_escape_codes(term: str) -> None:
    out, seen, code = in_a_terminal("show", "--help", TERM=term)
    assert code == 0
    assert "\x1b" not in out + seen


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (3900, "1 h 5 min")],
)
def test_a_duration_is_told_as_people_do(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def context_of(name: str, *args: str) -> Any:
    return GROUP.commands[name].make_context(name, list(args))


def test_given_are_the_options_that_were_typed() -> None:
    ctx = context_of("sweep", "-o", "out", "--methods", "gate", "--seed", "0", "--json", "--max-memory", "a")
    assert given(ctx, "output") == {"methods": "gate", "seed": 0, "max_memory": ["a"]}
    assert given(ctx, "methods", "output", "seed", "max_memory") == {}


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ((), {}),
        (("--chat-template",), {"chat_template": True}),
        (("--no-chat-template",), {"chat_template": False}),
        (("--trust-remote-code",), {"trust_remote_code": True}),
    ],
)
def test_a_switch_that_nobody_touched_is_not_given(typed: tuple[str, ...], expected: dict[str, bool]) -> None:
    ctx = context_of("sweep", "-o", "out", "--config", "table-3", *typed)
    assert given(ctx, "output") == expected


def test_an_interrupt_is_130_without_a_traceback() -> None:
    app = typer.Typer()

    @app.command(cls=Command)
    def work() -> None:
        with command(as_json=False, debug=False) as console:
            console.on_interrupt = "half of it is kept"
            raise KeyboardInterrupt

    done = runner.invoke(app, [])
    assert done.exit_code == 130
    assert done.stderr == "interrupted: half of it is kept\n"
