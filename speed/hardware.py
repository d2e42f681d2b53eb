"""The machine under a measurement: copy bandwidth, memory, names and versions."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from skipcal.errors import SkipcalError
from skipcal.speed.timing import Spread, spread
from skipcal.version import __version__

# Several times the last-level cache: 105 MB on the CPUs, 50 MB on the GPUs this was written on.
COPY_BYTES = {"cpu": 2**29, "cuda": 2**31}
_COPY_REPEATS = 5
_COPY_WARM_UPS = 100  # a seventh of a second on an H100


def copy_bandwidth(device: torch.device, *, rounds: int, size: int | None = None) -> Spread:
    """GB/s of a copy within the device's memory, bytes read plus bytes written.

    size: bytes of the source. A round's value is the median of a few copies; on a GPU they are timed
    there, after copies that bring its clocks up.
    """
    count = (size or COPY_BYTES.get(device.type, 2**29)) // 4
    source = torch.rand(count, device=device)
    target = torch.empty_like(source)
    for _ in range(_COPY_WARM_UPS if device.type == "cuda" else 1):
        target.copy_(source)  # touches the pages
    measured = []
    for _ in range(rounds):
        seconds = [_seconds(lambda: target.copy_(source), device) for _ in range(_COPY_REPEATS)]
        measured.append([8 * count / s / 1e9 for s in seconds])
    return spread(measured)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on `device`; None where that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Most bytes taken so far: of the device, or on a CPU of the whole process."""
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": "device"}
    unit = 1 if platform.system() == "Darwin" else 1024
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of": "process"}


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Hardware and versions."""
    found = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "skipcal": __version__,
        "commit": _commit(),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device is not None and device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


@contextlib.contextmanager
def told_of_memory(what: str) -> Iterator[None]:
    """Turn torch's "out of memory" into an error of one line that says what did not fit."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise SkipcalError(
            f"{what} do not fit the memory; give fewer --batch-size or --context-tokens, a smaller "
            "--shape, or --dtype bfloat16"
        ) from error


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long it takes, by the device's own clock where it has one."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        before.record()
        work()
        after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":")[1].strip() for line in lines if "model name" in line)
    return next(names, platform.processor())


def _commit() -> str | None:
    """Commit of a checkout that skipcal runs from, "-dirty" where files differ from it; None if installed.

    Of a copy without its history SKIPCAL_COMMIT tells it.
    """
    if told := os.environ.get("SKIPCAL_COMMIT"):
        return told
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None
