"""Kernels as a compiler for sm_90 makes them, which needs no device; and how their machine code is read."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from warm_python import environment

BENCHMARKS = ROOT / "benchmarks"
# One launch of each op, several rows of the one that streams, and heads shorter than a tensor core's 16.
CASES = [
    "7B, ffn, rows 1",
    "7B, ffn, rows 8",
    "7B, ffn, rows 64",
    "7B, ffn of a norm's x, rows 1",
    "7B, ffn of a norm's x, rows 8",
    "7B, q k v, rows 1",
    "7B, q k v, rows 8",
    "7B, o, rows 64",
    "13B, q k v, rows 1",
    "7B, o, rows 1",
    "7B, rotary_cache, rows 1",
    "7B, arm, rows 1",
    "7B, arm by rows, rows 8",
    "7B, gate, rows 1",
    "7B, low_rank 64, rows 1",
    "7B, count, rows 8",
    "7B, attention",
    "attention, 8 heads of 8 on 2",
]


@pytest.fixture(scope="module")
def sm90() -> Any:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        module = importlib.import_module("sm90")
    if not module.CUOBJDUMP.exists():
        pytest.skip("needs the tools of Triton's wheel")
    return module


def test_no_kernel_spills_and_short_heads_compile(sm90: Any, tmp_path: Path, warm: str) -> None:
    only = [word for case in CASES for word in ("--only", case)]
    command = [warm, str(BENCHMARKS / "ops_sm90.py"), *only, "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads((tmp_path / "ops_sm90.json").read_text())["launches"]
    assert {launch["kernel"] for launch in made} == {
        "gate_up_one", "down_one", "norm_some", "gate_up_some", "down_some",
        "project_one", "project_some", "rms_norm", "rotary_cache",
        "arm", "gate", "down", "up", "count", "attend_split", "merge_splits",
    }  # fmt: skip
    assert not any(launch["spill_bytes"] for launch in made)
    assert {launch["case"] for launch in made} >= set(CASES)
    assert "spills" not in done.stderr and "on the way" not in done.stderr


@pytest.mark.parametrize(
    ("kernel", "spill", "in_flight", "said"),
    [
        ("project_one", 0, 65536, 0),
        ("project_one", 8, 65536, "a case, project_one: spills 8 bytes"),
        ("project_one", 0, 61440, "a case, project_one: 60.0 KiB on the way to an SM, under 64"),
        ("gate", 0, 1024, 0),  # streams no weights
    ],
)
def test_a_spill_or_too_little_on_the_way_is_an_exit_code(
    sm90: Any, kernel: str, spill: int, in_flight: int, said: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("ops_sm90")
    monkeypatch.setattr(sys, "argv", ["ops_sm90.py"])
    monkeypatch.setattr(script, "cases", lambda: {"a case": lambda: None})
    usage = sm90.Usage(kernel, 132, 4, 255, 0, spill, 0, in_flight)
    monkeypatch.setattr(script, "compiled", lambda launch: [usage])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == said


def outstanding(sm90: Any, *instructions: str) -> int:
    code = "".join(f"  /*{16 * n:04x}*/   {text} ;   /* 0x1 */\n" for n, text in enumerate(instructions))
    found: int = sm90._outstanding_bytes(sm90._instructions(code))
    return found


def test_a_load_is_outstanding_until_its_registers_are_named(sm90: Any) -> None:
    loads = "LDG.E.EF.128 R4, desc[UR4][R2.64]", "@!P0 LDG.E.U16 R8, desc[UR4][R2.64+0x10]"
    assert outstanding(sm90, *loads, "FADD R0, R4, R0", "FADD R0, R8, R0") == 18
    assert outstanding(sm90, loads[0], "PRMT R1, R7, 0x7610, R1", loads[1]) == 16
    assert outstanding(sm90, *loads, "FADD R0, R8, R0", "LDG.E R12, desc[UR4][R2.64]") == 18


def test_what_a_loop_asks_for_ahead_is_seen(sm90: Any) -> None:
    load, use = "LDG.E.128 R4, desc[UR4][R2.64]", "FADD R0, R4, R0"
    ahead = "LDG.E.64 R8, desc[UR4][R2.64]"
    assert outstanding(sm90, load, use, "@P0 BRA 0x0", "EXIT") == 16
    assert outstanding(sm90, load, use, ahead, "@P0 BRA 0x0", "EXIT") == 24


def test_copies_are_outstanding_by_groups(sm90: Any) -> None:
    copy = "LDGSTS.E.BYPASS.128 [R6], desc[UR18][R8.64], !P2", "LDGDEPBAR"
    wait = "DEPBAR.LE SB0, 0x1"
    assert outstanding(sm90, *copy, *copy, wait, *copy, "@!P0 BRA 0x40") == 32
    assert outstanding(sm90, *copy, *copy, *copy, wait, *copy, "@!P0 BRA 0x60") == 48


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks"),
    [(127, 4, 64, 4), (128, 4, 0, 4), (129, 4, 0, 3), (64, 4, 20480, 8), (32, 8, 0, 8), (24, 4, 65536, 3)],
)
def test_blocks_that_an_sm_holds(sm90: Any, registers: int, warps: int, shared: int, blocks: int) -> None:
    usage = sm90.Usage("kernel", 1056, warps, registers, shared, 0, 0, 1024)
    assert usage.resident == blocks
    assert usage.waves == 1056 / 132 / blocks
    assert usage.in_flight_bytes == 1024 * blocks
    # As many as it is given: here two of three SMs have one block, and the third has none.
    assert sm90.Usage("kernel", 88, warps, registers, shared, 0, 0, 1024).in_flight_bytes == 683
