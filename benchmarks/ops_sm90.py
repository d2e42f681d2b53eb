"""What the compiler makes of the ops' kernels for an H100 or H200 (sm_90), without having one.

Prints registers, stack, shared memory and local memory (spills) of each kernel as its launcher calls
it, and fails if one spills. No timing: that needs the GPU. Needs the tools that come with Triton's
wheel, and TRITON_INTERPRET unset.

    python benchmarks/ops_sm90.py
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from skipcal.runtime.ops import decode_attention, gate, low_rank

BF16 = torch.bfloat16
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Usage(NamedTuple):
    """What one program of a kernel occupies."""

    kernel: str
    registers: int  # a thread
    stack_bytes: int
    local_bytes: int  # registers that did not fit
    shared_bytes: int
    wide_loads: int  # instructions that load 16 bytes a thread


class _NoDevice:
    """Stands in for Triton's driver: names the target, and launches nothing."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compiled_by(call: Any, *args: Any, **kwargs: Any) -> Iterator[Usage]:
    """The kernels that a launcher would have launched."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *a: Any, **kw: Any) -> None:
        kernels.append(run(self, *a, **kw | {"warmup": True}))

    JITFunction.run = compile_only
    try:
        call(*args, **kwargs)
    finally:
        JITFunction.run = run
    yield from map(usage, kernels)


def usage(kernel: Any) -> Usage:
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
    wide = len(re.findall(r"LDG\.E[.\w]*\.128|LDGSTS[.\w]*\.128", code))
    return Usage(kernel.metadata.name, registers, stack, local, kernel.metadata.shared, wide)


def attention_usage(heads: int, kv_heads: int, head_dim: int) -> Iterator[Usage]:
    q = torch.zeros(1, heads, head_dim, dtype=BF16)
    k = torch.zeros(1, kv_heads, 1024, head_dim, dtype=BF16)
    valid = torch.ones(1, 1024, dtype=torch.bool)
    length = torch.tensor(1)
    yield from compiled_by(decode_attention.decode_attention, q, k, k, length, valid=valid, scale=1.0)


def gate_usage(hidden: int) -> Iterator[Usage]:
    h, weight, zero = torch.zeros(4, hidden, dtype=BF16), torch.zeros(hidden), torch.tensor(0.0)
    yield from compiled_by(gate.gate, h, weight, log_norm_weight=zero, bias=zero, threshold=zero)


def low_rank_usage(hidden: int, rank: int) -> Iterator[Usage]:
    h, bias = torch.zeros(4, hidden, dtype=BF16), torch.zeros(hidden, dtype=BF16)
    down = torch.zeros(rank, hidden, dtype=BF16)
    skip = torch.ones(4, dtype=torch.int32)
    yield from compiled_by(low_rank.low_rank, h, down, down.T.contiguous(), bias, skip)


def main() -> None:
    triton.runtime.driver.set_active(_NoDevice())
    for op in (decode_attention, gate, low_rank):
        op.runs_kernels = lambda tensor: True  # type: ignore[attr-defined]
    cases = {
        "attention, 32 heads of 128": attention_usage(32, 32, 128),
        "attention, 32 heads of 128 on 8": attention_usage(32, 8, 128),
        "attention, 9 heads of 64 on 3": attention_usage(9, 3, 64),
        "attention, 32 heads of 72": attention_usage(32, 32, 72),
        "gate, hidden 4096": gate_usage(4096),
        "gate, hidden 8192": gate_usage(8192),
        "low rank, hidden 4096, rank 64": low_rank_usage(4096, 64),
        "low rank, hidden 5120, rank 96": low_rank_usage(5120, 96),
    }
    spilled = False
    for case, kernels in cases.items():
        for kernel in kernels:
            spilled |= kernel.stack_bytes + kernel.local_bytes > 0
            print(f"{case:34s}", *(f"{name} {value}" for name, value in kernel._asdict().items()))
    raise SystemExit(spilled)


if __name__ == "__main__":
    main()
