"""Kernels compiled for an H100 or H200 (sm_90) without having one, and what their machine code tells.

How fast a kernel streams is decided by what a multiprocessor has asked for and not yet received. By
Little's law 4 TB/s at a latency of 0.8 us are 3.2 MB on the way, 24 KB for each of 132 SMs; more where
many loads queue. For a block it is read off the machine code:

- a load into registers is outstanding until an instruction names one of them; what was asked for
  earlier has then arrived too;
- a copy into shared memory (LDGSTS) is outstanding until its group is waited for (DEPBAR).

Code is walked as it lies, loops thrice. Both arms of a branch are walked and loads under a mask count
in full, so the figure is an upper bound. Of a kernel that marks what it streams, by evict_first, only
that part of the bytes counts, by the tiles' sizes; the rest are inputs that all programs share.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from skipcal.ops import settings

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Of compute capability 9.0: CUDA C++ programming guide, table of technical specifications. SMs of an
# H100 SXM or H200; of shared memory each block takes 1 KB for the system.
SMS, WARPS, BLOCKS, REGISTERS, SHARED_BYTES, SHARED_SYSTEM_BYTES = 132, 64, 32, 65536, 233472, 1024
H100 = settings.Chip("NVIDIA H100 80GB HBM3", SHARED_BYTES - SHARED_SYSTEM_BYTES)
_LOOP_PASSES = 3  # so that what one pass loads for the pass after next is seen


_Instruction = tuple[int, str, str]


@dataclass(frozen=True)
class Usage:
    """What a launch of a kernel occupies."""

    kernel: str
    programs: int
    warps: int
    registers: int  # a thread
    shared_bytes: int
    spill_bytes: int  # local memory and stack a thread
    wide_loads: int  # instructions that load 16 bytes a thread
    block_in_flight_bytes: int

    @property
    def resident(self) -> int:
        """Blocks that an SM holds at a time, as far as there are as many."""
        a_warp = -(-self.registers * 32 // 256) * 256  # registers are given out by 256 to a warp
        by_registers = REGISTERS // a_warp // self.warps
        by_shared = SHARED_BYTES // (self.shared_bytes + SHARED_SYSTEM_BYTES)
        return min(BLOCKS, WARPS // self.warps, by_registers, by_shared)

    @property
    def waves(self) -> float:
        """Launched blocks over those that the device holds at a time."""
        return self.programs / (self.resident * SMS)

    @property
    def in_flight_bytes(self) -> int:
        """An SM's outstanding loads, of as many blocks as it is given on average."""
        return round(min(self.resident, self.programs / SMS) * self.block_in_flight_bytes)


class _NoDevice:
    """Stands in for Triton's driver: names the target, and launches nothing."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def without_device(ops: Iterable[ModuleType]) -> Iterator[list[Usage]]:
    """Inside, launches of `ops` are compiled and noted instead of made, and references are not called.

    The process has no device from then on.
    """
    noted: list[Usage] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, **kwargs | {"warmup": True})
        noted.append(_usage(kernel, math.prod(grid)))

    triton.runtime.driver.set_active(_NoDevice())
    with ExitStack() as patches:
        patches.enter_context(patch.object(JITFunction, "run", compile_only))
        patches.enter_context(patch.object(settings, "chip", lambda device: H100))
        for op in ops:
            patches.enter_context(patch.object(op, "runs_kernels", lambda tensor: True))
        yield noted


def _usage(kernel: Any, programs: int) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources, code = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", resources)
    assert found, resources
    registers, stack, _, local = map(int, found.groups())
    warps, instructions = kernel.metadata.num_warps, _instructions(code)
    outstanding = _outstanding_bytes(instructions) * _streamed_share(kernel.asm["ttgir"])
    return Usage(
        kernel=kernel.metadata.name.lstrip("_"),
        programs=programs,
        warps=warps,
        registers=registers,
        shared_bytes=kernel.metadata.shared,
        spill_bytes=stack + local,
        wide_loads=sum(op.startswith("LDG") and ".128" in op for _, op, _ in instructions),
        block_in_flight_bytes=round(32 * warps * outstanding),
    )


def _instructions(code: str) -> list[_Instruction]:
    """Address, operation and operands of each."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*) ?(.*?) ?;", code)
    return [(int(address, 16), operation, operands) for address, operation, operands in found]


def _outstanding_bytes(instructions: list[_Instruction]) -> int:
    """The most that a thread has asked for at a time."""
    loads: deque[tuple[set[str], int]] = deque()  # registers that are waited for, bytes
    groups = deque([0])  # bytes of copies, the last group still open
    jumps: Counter[int] = Counter()
    place = most = 0
    places = {address: n for n, (address, _, _) in enumerate(instructions)}
    while place < len(instructions):
        address, operation, operands = instructions[place]
        named = set(re.findall(r"\bR\d+", operands))
        arrived = [n for n, (registers, _) in enumerate(loads) if registers & named]
        for _ in range(arrived[-1] + 1 if arrived else 0):
            loads.popleft()
        if operation.startswith("LDG."):
            width = _width(operation)
            first = int(operands.split(",")[0].lstrip("R"))
            loads.append(({f"R{first + n}" for n in range(-(-width // 4))}, width))
        elif operation.startswith("LDGSTS"):
            groups[-1] += _width(operation)
        elif operation == "LDGDEPBAR":
            groups.append(0)
        elif operation.startswith("DEPBAR"):
            while len(groups) > int(operands.split(",")[1], 16) + 1:
                groups.popleft()
        most = max(most, sum(groups) + sum(width for _, width in loads))
        place += 1
        if operation == "BRA" and (target := re.search(r"0x([0-9a-f]+)", operands)):
            to = int(target[1], 16)
            if to < address and jumps[address] < _LOOP_PASSES - 1:
                jumps[address] += 1
                place = places[to]
    return most


def _width(operation: str) -> int:
    """Bytes that a load brings to a thread."""
    bits = re.search(r"\.(?:[US]?(8|16)|(64|128))\b", operation)
    return int(bits[1] or bits[2]) // 8 if bits else 4


def _streamed_share(ttgir: str) -> float:
    """The part of all loaded bytes that is marked evict_first; 1 where nothing is."""
    marked = rest = 0.0
    for line in re.findall(r".*(?:tt\.load|async_copy_global_to_local).*", ttgir):
        if tile := re.search(r"tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)", line):
            size = math.prod(map(int, tile[1].split("x"))) * int(tile[2]) / 8
            marked, rest = (marked + size, rest) if "evict_first" in line else (marked, rest + size)
    return marked / (marked + rest) if marked else 1.0
