"""Asks a warm Python to run a command, and is to its own parent what that command is.

It is what a start costs, so it imports little.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping

# Variables that packages or Python itself read while they are imported: forking would be too late for them.
READ_AT_IMPORT = re.compile(r"HF_|TQDM_|TRITON_INTERPRET|TRANSFORMERS_|OMP_|MKL_|LC_|LANG|PYTHON")
HONOURED = {
    "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHONWARNINGS",
    "TQDM_DISABLE",
}  # fmt: skip


def read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of the variables that have to be the same."""
    return {
        name: value
        for name, value in environment.items()
        if READ_AT_IMPORT.match(name) and name not in HONOURED
    }


def main(address: str, imported_with: str, python: str, warm: str, *arguments: str) -> None:
    """Run `arguments` of Python.

    address:       the server's socket.
    imported_with: what `read_at_import` told when it was started, as JSON.
    python, warm:  the usual Python, and the one that this is the executable of.
    """
    unbuffered = arguments[0] == "-u"
    rest = arguments[unbuffered:]
    kind = rest[0] if rest[0] in ("-m", "-c") else ""
    what, *others = rest[bool(kind) :]
    if what.startswith("-") or read_at_import(os.environ) != json.loads(imported_with):
        os.execv(python, [python, *arguments])  # it needs a start of its own
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    command = {
        "kind": kind, "what": what, "arguments": others, "unbuffered": unbuffered,
        "folder": os.getcwd(), "environment": dict(os.environ), "executable": warm,
    }  # fmt: skip
    socket.send_fds(server, [json.dumps(command).encode() + b"\n"], [0, 1, 2])
    answers = server.makefile()
    child = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(child, number))
    code = int(answers.readline())
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
