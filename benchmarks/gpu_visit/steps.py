"""Steps: each is a process of its own, with a limit, whose failure stops nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpu_visit.place import ROOT

_TAIL_LINES = 25
_WIDTH = 150  # of a line of the table


@dataclass(frozen=True)
class Visit:
    """What is asked of all steps. output: folder of the results; work: one that is removed at the end."""

    device: str
    shape: str
    output: Path
    work: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.on_gpu else "float32"


@dataclass(frozen=True)
class Step:
    """call: MODULE:FUNCTION, which takes a Visit and `options` and yields what it found, part by part."""

    name: str
    limit_s: float
    call: str
    options: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    left_out: str | None = None  # why


@dataclass(frozen=True)
class Outcome:
    """said: one line of the result, or of what went wrong; values: what was found."""

    name: str
    state: Literal["passed", "failed", "timed out", "left out", "no time"]
    seconds: float
    said: str
    values: dict[str, Any]
    tail: list[str]

    @property
    def is_failure(self) -> bool:
        return self.state not in ("passed", "left out")


def run_steps(
    steps: Sequence[Step], visit: Visit, *, name: str, env: Mapping[str, str], limit_s: float
) -> list[Outcome]:
    """One after another, at most `limit_s` seconds in all. NAME.json is rewritten after each."""
    end = time.monotonic() + limit_s
    log = visit.output / f"{name}.log"
    log.unlink(missing_ok=True)
    outcomes: list[Outcome] = []
    for step in steps:
        left_s = min(step.limit_s, end - time.monotonic())
        if step.left_out is not None:
            outcome = Outcome(step.name, "left out", 0.0, step.left_out, {}, [])
        elif left_s <= 0:
            outcome = Outcome(step.name, "no time", 0.0, f"{limit_s:g} s were over", {}, [])
        else:
            outcome = _run(step, visit, log, env, left_s)
        outcomes.append(outcome)
        print(_line(outcome), flush=True)
        document = {
            "format": "skipcal.gpu_visit/1",
            "device": visit.device,
            "shape": visit.shape,
            "steps": {o.name: asdict(o) for o in outcomes},
        }
        write_json(visit.output / f"{name}.json", document)
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """All of them, a line each, and how many failed."""
    failed = sum(outcome.is_failure for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    last = f"{len(outcomes)} steps, {failed} failed, {seconds:.0f} s"
    return "\n".join(["", *map(_line, outcomes), last])


def write_json(path: Path, document: Any) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path)


def _run(step: Step, visit: Visit, log: Path, env: Mapping[str, str], limit_s: float) -> Outcome:
    result = visit.work / f"{step.name}.json"
    given = {
        "visit": {k: str(v) for k, v in asdict(visit).items()},
        "options": dict(step.options),
        "result": str(result),
    }
    start = time.monotonic()
    with log.open("ab") as out:
        out.write(f"\n===== {step.name} =====\n".encode())
        out.flush()
        begin = out.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "gpu_visit.step", step.call, json.dumps(given)],
            cwd=ROOT, env={**env, **step.env}, stdin=subprocess.DEVNULL, stdout=out,
            stderr=out, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_all_of(process)
    seconds = time.monotonic() - start
    values = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    said = str(values.pop("said", ""))
    if code == 0:
        return Outcome(step.name, "passed", seconds, said, values, [])
    tail = _tail(log, begin)
    if code is None:
        return Outcome(step.name, "timed out", seconds, f"over {limit_s:.0f} s; {said}", values, tail)
    error = values.get("error") or f"exit code {code}; {tail[-1] if tail else 'no output'}"
    return Outcome(step.name, "failed", seconds, error, values, tail)


def _kill_all_of(process: subprocess.Popen[bytes]) -> None:
    """The process and its children, where any is left: they are a group of their own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path, begin: int) -> list[str]:
    """Its last lines, without the places of this machine."""
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read().decode(errors="replace")
    lines = text.replace(str(ROOT), ".").replace(sys.prefix, "PREFIX").splitlines()
    return [line for line in lines if line.strip()][-_TAIL_LINES:]


def _line(outcome: Outcome) -> str:
    said = outcome.said.partition("\n")[0]
    return f"{outcome.name:<18}{outcome.state:<10}{outcome.seconds:>7.1f} s  {said}"[:_WIDTH]
