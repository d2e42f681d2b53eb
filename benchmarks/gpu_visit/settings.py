"""Settings of the kernels that stream weights, timed side by side: makes ops/settings.json.

Candidates of a launch take turns, each a CUDA graph of many launches over weights of their own. What is
written is the whole file, launches of other devices with it, so that committing it is a copy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from candidates import CANDIDATES
from gpu_visit.ops import MOST_ERROR, error_of, ffn_weights, sets_of, stopwatch
from gpu_visit.steps import Visit
from torch import Tensor

from skipcal.files.writing import dump_json, write_text_atomic
from skipcal.ops import ffn, project
from skipcal.ops.settings import DEFAULTS, TABLE, Launch, Measured, Settings, Table, launch_of, read_table
from skipcal.speed.hardware import environment

_ROUNDS = 9
_WORTH = 0.99  # of the default's time: what gains less may be chance, and the default stays


@dataclass(frozen=True)
class Part:
    """One launch, once for each of several sets of weights. expected: what the first has to give."""

    launch: Launch
    runs: Sequence[Callable[[Settings], Tensor]]
    expected: Tensor


def settings(
    visit: Visit, *, shapes: list[list[int]], rows: list[int], limit_s: float
) -> Iterator[dict[str, Any]]:
    """The fastest for each launch at `shapes` (hidden, ffn width), as far as `limit_s` reaches."""
    end = time.monotonic() + limit_s
    found: list[Measured] = []
    tried: list[dict[str, Any]] = []
    for hidden, width in shapes:
        for name, part in parts(visit, hidden, width, rows):
            if time.monotonic() > end:
                return
            us = _timed(visit, name, part)
            found.append(_fastest(part.launch, us))
            tried.append({"part": name, **vars(part.launch), "us": [[*s, t] for s, t in us.items()]})
            table = _with_others(visit, found).model_dump(mode="json")
            write_text_atomic(visit.output / "settings.json", dump_json(table), overwrite=True)
            gained = statistics.geometric_mean(row.us / row.default_us for row in found)
            said = f"{len(found)} of {len(shapes) * len(rows) * len(CANDIDATES)} launches"
            yield {"tried": tried, "said": f"{said}, at {gained:.3f} of the defaults' time"}


def parts(visit: Visit, hidden: int, width: int, rows: list[int]) -> Iterator[tuple[str, Part]]:
    """All launches of a decoder layer that stream weights."""
    device, dtype = torch.device(visit.device), getattr(torch, visit.dtype)
    square, norm = hidden * hidden * dtype.itemsize, torch.ones(hidden, device=device, dtype=dtype)
    of_ffn = 3 * hidden * width * dtype.itemsize
    ffns = [ffn_weights(hidden, width, device, dtype) for _ in range(sets_of(visit, of_ffn))]
    triples = [_matrices(hidden, device, dtype) for _ in range(sets_of(visit, 3 * square))]
    singles = [[matrix] for matrices in triples for matrix in matrices]
    for count in rows:
        h = torch.randn(count, hidden, device=device).to(dtype)
        nobody = torch.zeros(count, dtype=torch.bool, device=device)
        expected, _ = ffn.reference(h, nobody, ffns[0])
        for name, x, outputs in (("gate_up", h, width), ("down", h.new_empty(count, width), hidden)):
            runs = [partial(_run_ffn, h, nobody, weights, name) for weights in ffns]
            yield name, Part(launch_of(name, x, outputs), runs, expected)
        for name, sets, given in (
            ("q k v", triples, {"norm": norm, "eps": 1e-5}),
            ("o", singles, {"residual": h}),
        ):
            runs = [partial(_run_project, h, matrices, given) for matrices in sets]
            launch = launch_of("project", h, sum(map(len, sets[0])))
            yield name, Part(launch, runs, project.reference(h, sets[0], **given))


def _matrices(hidden: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(hidden, hidden, device=device).mul_(hidden**-0.5).to(dtype) for _ in range(3)]


def _run_ffn(h: Tensor, skip: Tensor, weights: ffn.FFNWeights, half: str, given: Settings) -> Tensor:
    """The whole op, of which one half has other settings."""
    return ffn.ffn(h, skip, weights, settings={half: given})[0]


def _run_project(h: Tensor, matrices: list[Tensor], options: dict[str, Any], given: Settings) -> Tensor:
    return project.project(h, matrices, settings=given, **options)


def _timed(visit: Visit, name: str, part: Part) -> dict[Settings, float]:
    """Microseconds by each candidate, the default first."""
    default = DEFAULTS[part.launch.kernel][part.launch.rows]
    others = [given for given in CANDIDATES[name][part.launch.rows] if given != default]
    watches: dict[Settings, Callable[[], float]] = {}
    for given in [default, *(others if visit.on_gpu else others[:1])]:
        try:
            result = part.runs[0](given)
            watches[given] = stopwatch([partial(run, given) for run in part.runs], captured=visit.on_gpu)
        except Exception as failed:  # one that does not fit the chip is left out
            if given == default:
                raise
            print(f"{name} by {tuple(given)}: {failed}", flush=True)
            continue
        if not (error := error_of(result, part.expected)) <= MOST_ERROR:
            raise AssertionError(f"{name} by {tuple(given)} differs from its reference by {error:.1e}")
    rounds = [
        {given: watch() for given, watch in watches.items()} for _ in range(_ROUNDS if visit.on_gpu else 1)
    ]
    return {given: statistics.median(us[given] for us in rounds) for given in watches}


def _fastest(launch: Launch, us: dict[Settings, float]) -> Measured:
    default = next(iter(us))
    best = min(us, key=lambda given: us[given])
    if us[best] > _WORTH * us[default]:
        best = default
    return Measured(**vars(launch), settings=best, us=us[best], default_us=us[default])


def _with_others(visit: Visit, found: list[Measured]) -> Table:
    """The table as it is here, with what was found instead of what it has of the same device."""
    old = read_table(TABLE)
    kept = [row for row in old.launches if row.device != found[0].device]
    here = environment(torch.device(visit.device)) | {"triton": triton.__version__}
    made_by = {found[0].device: {"command": "python benchmarks/gpu_visit measure", **here}}
    launches = sorted([*kept, *found], key=lambda row: tuple(vars(row.launch).values()))
    return Table(format=old.format, made_by=old.made_by | made_by, launches=tuple(launches))
