"""A Python whose packages are imported already: what it is asked to run is forked, in no time.

To start `skipcal` is for the most part to import torch and transformers, 4 s of CPU each time. `started`
yields the path of an executable that is used like Python's own, with its arguments, files, signals and exit
code. Where the start itself is what is tested, sys.executable is asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from warm_client import read_at_import

HERE = Path(__file__).parent
_AT_START = dict(os.environ)  # a command within the tests' process sets more
# One thread, for a fork takes no others along; kernels are interpreted in the tests' own process alone.
IMPORTED_WITH = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}


def environment(**more: str) -> dict[str, str]:
    """Of a command that can be forked: with another value of these variables it is started on its own."""
    return {**_AT_START, **IMPORTED_WITH, **more}


@contextmanager
def started(folder: Path) -> Iterator[str]:
    """folder: where its socket lies. Without pidfds, or if imports start threads, it is the usual Python."""
    if not hasattr(os, "pidfd_open"):
        yield sys.executable
        return
    given, address = environment(), str(folder / "socket")
    path = folder / "python"
    words = [address, json.dumps(read_at_import(given)), sys.executable, str(path)]
    path.write_text(
        f"#!{sys.executable} -SE\nimport sys\nsys.path[0] = {str(HERE)!r}\n"
        f"from warm_client import main\n\nmain(*{words!r}, *sys.argv[1:])\n"
    )
    path.chmod(0o755)
    for name in ("PYTHONPATH", "TQDM_DISABLE"):  # each command has its own
        given.pop(name, None)
    server = subprocess.Popen(
        [sys.executable, str(HERE / "warm_server.py"), address],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=given,
    )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None
    try:
        yield str(path) if server.stdout.readline() == b"listening\n" else sys.executable
    finally:
        server.stdin.close()
        server.wait()
        server.stdout.close()
