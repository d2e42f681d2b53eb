"""The process that commands are forked from: warm_server.py SOCKET. See `warm_python`.

Other people's packages are imported here once; skipcal is not, each command imports it from its own path.
"""

from __future__ import annotations

import atexit
import gc
import io
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import warnings
from contextlib import suppress
from functools import partialmethod
from types import ModuleType
from typing import Any, NoReturn

IMPORTED = (  # and nothing that starts a thread, as pandas does
    "transformers.modeling_utils", "transformers.models.auto.modeling_auto", "transformers.generation.utils",
    "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama",
    "torch.distributed.launcher.api", "torch.distributed.tensor", "scipy.optimize", "scipy.stats", "pydantic",
    "typer", "yaml", "matplotlib.pyplot", "IPython.core.interactiveshell",
)  # fmt: skip
_LONGEST = 1 << 20  # bytes of a command with its environment


def asked(client: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """What a client wants to be run, None if it went away, and its stdin, stdout and stderr."""
    text, files, _, _ = socket.recv_fds(client, _LONGEST, 3)
    while more := b"" if text.endswith(b"\n") else client.recv(_LONGEST):
        text += more
    return json.loads(text) if text.endswith(b"\n") else None, files


def serve(path: str) -> tuple[dict[str, Any], list[int]]:
    """Fork for every client; returns in the child, with its command. The parent never returns.

    A client that goes away takes its command with it. The server ends with its parent.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("listening", flush=True)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(sys.stdin, selectors.EVENT_READ)
    running: dict[int, tuple[int, socket.socket]] = {}  # by descriptor of the process
    while True:
        for key, _ in waiting.select():
            if key.fileobj is listener:
                client, _ = listener.accept()
                command, files = asked(client)
                if command is None:
                    client.close()
                    continue
                child = os.fork()
                os.setpgid(child, child)  # in both, whichever is first
                if child == 0:
                    waiting.close()
                    for each in (listener, client, *(client for _, client in running.values())):
                        each.close()
                    return command, files
                for file in files:
                    os.close(file)
                client.sendall(f"{child}\n".encode())
                process = os.pidfd_open(child)
                running[process] = child, client
                waiting.register(process, selectors.EVENT_READ)
                waiting.register(client, selectors.EVENT_READ, child)
            elif key.fileobj is sys.stdin:  # closed: the parent is gone
                for child, _ in running.values():
                    kill(child)
                os._exit(0)
            elif isinstance(key.fileobj, socket.socket):  # closed: the client is gone
                with suppress(KeyError, ValueError):  # unless the command ended at the same time
                    waiting.unregister(key.fileobj)
                    kill(key.data)
            else:
                process = key.fd
                child, client = running.pop(process)
                _, status = os.waitpid(child, 0)
                waiting.unregister(process)
                os.close(process)
                with suppress(KeyError, BrokenPipeError):  # it has gone
                    waiting.unregister(client)
                    client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                client.close()


def kill(child: int) -> None:
    """The command and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def become(command: dict[str, Any], files: list[int]) -> None:
    """Make this process what the command's own Python would have been."""
    for number, given in enumerate(files):
        os.dup2(given, number)
        os.close(given)
    os.chdir(command["folder"])
    os.environ.clear()
    os.environ.update(command["environment"])
    raw = bool(os.environ.get("PYTHONUNBUFFERED")) or command["unbuffered"]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        own = getattr(sys, name)
        file: Any = os.fdopen(
            number, "rb" if number == 0 else "wb", 0 if raw and number else -1, closefd=False
        )
        by_line = not raw and (number == 2 or os.isatty(number))
        text = io.TextIOWrapper(
            file, encoding=own.encoding, errors=own.errors, line_buffering=by_line, write_through=raw
        )
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    sys.executable = command["executable"]
    ignored = [action for action in os.environ.get("PYTHONWARNINGS", "").split(",") if action]
    sys.warnoptions += ignored
    warnings._processoptions(ignored)  # type: ignore[attr-defined]
    if os.environ.get("TQDM_DISABLE"):  # as tqdm and matplotlib do it when they are imported
        bar: Any = sys.modules["tqdm.std"].tqdm
        bar.__init__ = partialmethod(bar.__init__, disable=True)
    if os.environ.get("MPLBACKEND"):
        sys.modules["matplotlib"].rcParams["backend"] = os.environ["MPLBACKEND"]
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def run(kind: str, what: str, arguments: list[str]) -> None:
    """As `python -m what`, `python -c what` or `python what`."""
    sys.argv = [what, *arguments]
    safe = bool(os.environ.get("PYTHONSAFEPATH"))
    if kind == "-m":
        if not safe:
            sys.path.insert(0, os.getcwd())
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv[0] = "-c"
        if not safe:
            sys.path.insert(0, "")
        module = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), module.__dict__)
    else:
        if not safe and os.path.isfile(what):  # of a folder run_path sees to it
            sys.path.insert(0, os.path.dirname(os.path.abspath(what)))
        runpy.run_path(what, run_name="__main__")


def leave(code: int) -> NoReturn:
    """End the process as Python does, but for taking three thousand modules down, which takes 0.3 s.

    code: below zero a signal.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr):
        file.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def main() -> NoReturn:
    sys.path.pop(0)  # of this file
    for name in IMPORTED:
        with suppress(ImportError):  # where few of the packages are installed
            __import__(name)
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("a fork would lose a thread")
    gc.collect()
    gc.freeze()
    command, files = serve(sys.argv[1])
    become(command, files)
    try:
        run(command["kind"], command["what"], command["arguments"])
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        leave(left.code if isinstance(left.code, int) else left.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        leave(1 if isinstance(error, Exception) else -signal.SIGINT)
    leave(0)


if __name__ == "__main__":
    main()
