"""A command that a warm Python forks is, from outside, one that was started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from warm_python import environment

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="nothing is forked without pidfds")


def both(warm: str, *arguments: str, stdin: str = "", **variables: str) -> tuple[Any, Any]:
    """What comes of a forked and of a started command."""
    found = []
    for python in (warm, sys.executable):
        given = environment(**variables)
        found.append(
            subprocess.run([python, *arguments], input=stdin, capture_output=True, text=True, env=given)
        )
    return found[0], found[1]


ABOUT = """
import json, os, signal, sys
told = {
    "argv": sys.argv, "path": sys.path, "folder": os.getcwd(), "in": sys.stdin.read(),
    "name": __name__, "main": sys.modules["__main__"].__dict__ is globals(),
    "warnings": sys.warnoptions, "bytecode": sys.dont_write_bytecode,
    "threads": len(os.listdir("/proc/self/task")), "files": sorted(os.listdir("/proc/self/fd")),
    "environment": dict(os.environ),
    "buffered": [sys.stdout.write_through, sys.stdout.line_buffering, sys.stderr.line_buffering],
    "encodings": [file.encoding + file.errors for file in (sys.stdin, sys.stdout, sys.stderr)],
    "interrupt": signal.getsignal(signal.SIGINT).__name__,
}
print(json.dumps(told, sort_keys=True))
sys.exit(4)
"""


@pytest.mark.parametrize("kind", ["-c", "-m", "file", "folder"])
@pytest.mark.parametrize(
    "variables", [{}, {"PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore:a word", "OTHER": "ü"}]
)
def test_a_forked_command_finds_what_a_started_one_finds(
    warm: str, kind: str, variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "about.py").write_text(ABOUT)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__main__.py").write_text(ABOUT)
    monkeypatch.chdir(tmp_path)
    what = {
        "-c": ["-c", ABOUT],
        "-m": ["-m", "about"],
        "file": ["about.py"],
        "folder": [str(tmp_path / "folder")],
    }[kind]
    if variables:
        variables = variables | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{environment().get('PYTHONPATH', '')}"}
    forked, started = both(warm, *what, "a b", "-x", stdin="given", **variables)
    assert (forked.returncode, forked.stderr) == (started.returncode, started.stderr) == (4, "")
    assert json.loads(forked.stdout) == json.loads(started.stdout)


@pytest.mark.parametrize(
    "code",
    ["", "import sys; sys.exit()", "import sys; sys.exit('said')", "import os; os._exit(9)",
     "import os; os.kill(os.getpid(), 9)", "import os; os.kill(os.getpid(), 15)", "raise KeyboardInterrupt",
     "import atexit; atexit.register(print, 'at last')",
     "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('later'))).start()"],
)  # fmt: skip
def test_it_ends_as_a_started_one_ends(warm: str, code: str) -> None:
    forked, started = both(warm, "-c", code)
    assert (forked.returncode, forked.stdout) == (started.returncode, started.stdout)
    assert forked.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:]


def test_torch_and_transformers_are_there_and_skipcal_is_not(warm: str) -> None:
    code = "import sys; print({'torch', 'transformers', 'skipcal'} & set(sys.modules))"
    forked, started = both(warm, "-c", code)
    assert (started.stdout, eval(forked.stdout)) == ("set()\n", {"torch", "transformers"})


@pytest.mark.parametrize(
    "name", ["TRITON_INTERPRET", "HF_HUB_DISABLE_PROGRESS_BARS", "PYTHONHASHSEED", "LC_ALL"]
)
def test_what_is_read_at_a_start_asks_for_one(warm: str, name: str) -> None:
    forked, _ = both(warm, "-c", "import sys; print('torch' in sys.modules)", **{name: "1"})
    assert forked.stdout == "False\n"


def waiting(warm: str) -> tuple[subprocess.Popen[str], int]:
    """A forked command that waits and says at SIGTERM that it goes; its own process id."""
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit('told to go'))\n"
        "print(os.getpid(), flush=True)\ntime.sleep(60)"
    )
    command = subprocess.Popen(
        [warm, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert command.stdout is not None
    return command, int(command.stdout.readline())


def test_a_signal_reaches_it(warm: str) -> None:
    command, _ = waiting(warm)
    command.send_signal(signal.SIGTERM)
    assert command.communicate() == ("", "told to go\n")
    assert command.returncode == 1


def test_it_is_gone_with_the_process_that_asked_for_it(warm: str) -> None:
    command, process = waiting(warm)
    command.kill()
    command.communicate()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
