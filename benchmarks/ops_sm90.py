"""What the compiler makes of the ops' kernels for an H100 or H200 (sm_90), without having one.

    python benchmarks/ops_sm90.py                                 print a line a launch
    python benchmarks/ops_sm90.py --only "7B, ffn, rows 1"        of one case
    python benchmarks/ops_sm90.py --output benchmarks/results     also write ops_sm90.json there
    python benchmarks/ops_sm90.py --candidates                    of settings that a GPU visit times

Every kernel, as its launcher calls it for one token of Llama-2 7B or 13B in bfloat16, and for heads of
other sizes. What the columns mean, and how far they can be trusted, is told in sm90.py. Nothing is timed:
that needs the GPU. Exits with 1, and names the launch, if a kernel spills registers, or if one that streams
weights can have less than 64 KiB on the way to an SM. Needs the tools in Triton's wheel, and TRITON_INTERPRET
unset.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from candidates import CANDIDATES
from sm90 import Usage, without_device
from torch import Tensor

from skipcal.configs.fit import MAPS
from skipcal.files.writing import dump_json, write_text_atomic
from skipcal.ops import (
    arm,
    count,
    decode_attention,
    ffn,
    gate,
    low_rank,
    project,
    rms_norm,
    rotary_cache,
    settings,
)
from skipcal.speed.hardware import environment

SHAPES = {"7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40)}  # hidden, ffn, heads, layers
SLOTS, RANK = 1024, 64
# Kernels that stream weights, and the least that an SM shall have asked for by them. Little's law wants 24 KB
# at 0.8 us, and more where loads queue: what reaches 95 % of an H100's copy bandwidth has 120 KiB or more,
# and with 61 in one of two kernels it was 87 %.
STREAMING = "gate_up_one", "gate_up_some", "down_one", "down_some", "project_one", "project_some"
LEAST_BYTES = 64 * 1024
OPS = arm, count, decode_attention, ffn, gate, low_rank, project, rms_norm, rotary_cache
COLUMNS = "registers", "spill_bytes", "shared_bytes", "wide_loads", "resident", "waves", "in_flight_bytes"


def bf16(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


def flags(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.bool)


def launch_ffn(hidden: int, width: int, rows: int, given: dict[str, settings.Settings] | None = None) -> None:
    norm, gate_up, down = bf16(hidden), bf16(width, hidden), bf16(hidden, width)
    weights = ffn.FFNWeights(norm, 1e-5, gate_up, gate_up, down)
    ffn.ffn(bf16(rows, hidden), flags(rows), weights, adds=True, settings=given)


def launch_normed_ffn(hidden: int, width: int, rows: int) -> None:
    gate_up, down = bf16(width, hidden), bf16(hidden, width)
    weights = ffn.FFNWeights(None, 0.0, gate_up, gate_up, down)
    h, some = bf16(rows, hidden), torch.zeros(rows, dtype=torch.int8)
    ffn.ffn(h, some, weights, x=h)


def launch_arm(hidden: int, width: int, rows: int, each: int = 1) -> None:
    parts = -(-hidden // settings.settings_for("down", bf16(rows, width), hidden).outputs)
    arm.arm(
        torch.zeros(parts, 3, rows),
        torch.zeros(rows, dtype=torch.int32),
        flags(rows),
        flags(rows),
        live=flags(rows),
        threshold=torch.zeros(each),
        limit=torch.zeros(each, dtype=torch.int32),
    )


def launch_attention(heads: int, kv_heads: int, head_dim: int, padded: bool) -> None:
    q, k = bf16(1, heads, head_dim), bf16(1, kv_heads, SLOTS, head_dim)
    valid = flags(1, SLOTS) if padded else None
    decode_attention.decode_attention(q, k, k, torch.tensor(1), valid=valid, scale=1.0)


def launch_qkv(hidden: int, rows: int, given: settings.Settings | None = None) -> None:
    h, matrices = bf16(rows, hidden), [bf16(hidden, hidden)] * 3
    project.project(h, matrices, norm=bf16(hidden), eps=1e-5, settings=given)


def launch_o(hidden: int, rows: int, given: settings.Settings | None = None) -> None:
    h = bf16(rows, hidden)
    project.project(h, [bf16(hidden, hidden)], residual=h, settings=given)


def launch_rotary_cache(heads: int, kv_heads: int, head_dim: int, rows: int) -> None:
    qkv, angle = bf16(rows, (heads + 2 * kv_heads) * head_dim), bf16(rows, head_dim)
    cache = bf16(rows, kv_heads, SLOTS, head_dim)
    rotary_cache.rotary_cache(qkv, angle, angle, torch.tensor([1]), cache, cache)


def launch_rms_norm(hidden: int, rows: int) -> None:
    rms_norm.rms_norm(bf16(rows, hidden), bf16(hidden), 1e-5)


def launch_gate(hidden: int, rows: int) -> None:
    zero = torch.tensor(0.0)
    gate.gate(bf16(rows, hidden), torch.zeros(hidden), log_norm_weight=zero, bias=zero, threshold=zero)


def launch_low_rank(hidden: int, rows: int) -> None:
    low_rank.low_rank(bf16(rows, hidden), bf16(RANK, hidden), bf16(hidden, RANK), bf16(hidden), flags(rows))


def launch_routed(hidden: int, rows: int) -> None:
    down, up = bf16(RANK + MAPS, hidden), bf16(MAPS, hidden, RANK)
    low_rank.low_rank(bf16(rows, hidden), down, up, bf16(MAPS, hidden), flags(rows), route_bias=bf16(MAPS))


def launch_count(layers: int, rows: int) -> None:
    per_layer, agreement = (torch.zeros(*shape, dtype=torch.long) for shape in ((3, layers), (2,)))
    skips, row, ruled = flags(layers, rows), flags(rows), flags(layers)
    count.count(skips, row, row, ruled=ruled, per_layer=per_layer, agreement=agreement)


def cases() -> dict[str, Callable[[], None]]:
    """By name, what launches an op's kernels."""
    found: dict[str, Callable[[], None]] = {}
    for size, (hidden, width, heads, layers) in SHAPES.items():
        for rows in (1, 2, 8, 64):
            found[f"{size}, ffn, rows {rows}"] = partial(launch_ffn, hidden, width, rows)
            found[f"{size}, q k v, rows {rows}"] = partial(launch_qkv, hidden, rows)
            found[f"{size}, o, rows {rows}"] = partial(launch_o, hidden, rows)
        for rows in (1, 8, 64):
            found[f"{size}, ffn of a norm's x, rows {rows}"] = partial(launch_normed_ffn, hidden, width, rows)
        found[f"{size}, arm by rows, rows 8"] = partial(launch_arm, hidden, width, 8, 8)
        for rows in (1, 8):
            found[f"{size}, arm, rows {rows}"] = partial(launch_arm, hidden, width, rows)
            found[f"{size}, gate, rows {rows}"] = partial(launch_gate, hidden, rows)
            found[f"{size}, rms_norm, rows {rows}"] = partial(launch_rms_norm, hidden, rows)
            found[f"{size}, rotary_cache, rows {rows}"] = partial(
                launch_rotary_cache, heads, heads, 128, rows
            )
            found[f"{size}, low_rank {RANK}, rows {rows}"] = partial(launch_low_rank, hidden, rows)
            found[f"{size}, low_rank {RANK} of {MAPS} maps, rows {rows}"] = partial(
                launch_routed, hidden, rows
            )
            found[f"{size}, count, rows {rows}"] = partial(launch_count, layers, rows)
        for padded in (False, True):
            launch = partial(launch_attention, heads, heads, 128, padded)
            found[f"{size}, attention{', padded' * padded}"] = launch
    for heads, kv_heads, head_dim in ((32, 8, 128), (8, 2, 8), (8, 8, 8), (9, 3, 64), (32, 32, 72)):
        for padded in (False, True):
            launch = partial(launch_attention, heads, kv_heads, head_dim, padded)
            found[f"attention, {heads} heads of {head_dim} on {kv_heads}{', padded' * padded}"] = launch
    return found


def candidate_cases() -> dict[str, Callable[[], None]]:
    """Launches that stream weights, by each of the settings that a GPU visit times."""
    found: dict[str, Callable[[], None]] = {}
    for size, (hidden, width, _, _) in SHAPES.items():
        for part, by_rows in CANDIDATES.items():
            for rows, given in ((rows, given) for rows, tried in by_rows.items() for given in tried):
                name = f"{size}, {part} by {','.join(map(str, given))}, rows {rows}"
                if part in ("gate_up", "down"):
                    found[name] = partial(launch_ffn, hidden, width, rows, {part: given})
                else:
                    launch = launch_qkv if part == "q k v" else launch_o
                    found[name] = partial(launch, hidden, rows, given)
    return found


def compiled(launch: Callable[[], None]) -> list[Usage]:
    """The kernels that it would have launched."""
    with without_device(OPS) as noted:
        launch()
    return noted


def row(case: str, usage: Usage) -> dict[str, Any]:
    derived = {name: getattr(usage, name) for name in ("resident", "in_flight_bytes")}
    return {"case": case, **asdict(usage), **derived, "waves": round(usage.waves, 2)}


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """What must not be, a line each."""
    found = []
    for launch in rows:
        name, on_the_way = f"{launch['case']}, {launch['kernel']}", launch["in_flight_bytes"]
        if launch["spill_bytes"]:
            found.append(f"{name}: spills {launch['spill_bytes']} bytes")
        if launch["kernel"] in STREAMING and on_the_way < LEAST_BYTES:
            kib = f"{on_the_way / 1024:.1f} KiB"
            found.append(f"{name}: {kib} on the way to an SM, under {LEAST_BYTES >> 10}")
    return found


def save(folder: Path, rows: list[dict[str, Any]]) -> None:
    document = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment() | {"triton": triton.__version__},
        "target": "sm_90",
        "launches": rows,
    }
    write_text_atomic(folder / "ops_sm90.json", dump_json(document), overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    names = [*cases(), *candidate_cases()]
    parser.add_argument("--only", action="append", choices=names, metavar="CASE", help="repeatable")
    parser.add_argument("--candidates", action="store_true", help="of candidates.py instead")
    parser.add_argument("--output", type=Path, help="folder for the result; default: none is written")
    options = parser.parse_args()
    rows = []
    print(f"{'case':40s} {'kernel':14s} {'programs':>8s}", *COLUMNS)
    found = candidate_cases() if options.candidates else cases()
    for case, launch in found.items():
        if case in (options.only or found):
            for usage in compiled(launch):
                rows.append(row(case, usage))
                cells = (f"{rows[-1][name]:{len(name)}}" for name in COLUMNS)
                print(f"{case:40s} {usage.kernel:14s} {usage.programs:8d}", *cells, flush=True)
    if options.output:
        save(options.output, rows)
    raise SystemExit("\n".join(faults(rows)) or 0)


if __name__ == "__main__":
    main()
