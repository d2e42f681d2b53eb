"""Ops against their references, and what each takes, over more memory than the L2 holds.

A time is the median over replays of a CUDA graph of many launches, each over weights of its own in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from gpu_visit.steps import Visit
from torch import Tensor

from skipcal.ops import decode_attention as attention
from skipcal.ops import ffn
from skipcal.ops.settings import DEFAULTS, Settings, row_class
from skipcal.speed.hardware import copy_bandwidth

_COLD_BYTES = 3 * 2**28  # of all sets together: several times any L2
_REPLAYS, _LAUNCHES = 9, 48
MOST_ERROR = 1e-2  # of results in bfloat16
# Other settings of one row, and of several.
ONE_ROW = {
    "gate_up": [(4, 1024, 4, 2), (4, 1024, 4, 3), (4, 512, 4, 3), (2, 1024, 4, 3), (8, 512, 4, 2),
                (8, 1024, 8, 2), (4, 2048, 8, 1)],
    "down": [(4, 1024, 4, 2), (4, 1024, 4, 3), (4, 1024, 4, 4), (4, 512, 4, 4), (2, 1024, 4, 4),
             (8, 512, 4, 3), (4, 2048, 8, 3)],
}  # fmt: skip
SOME_ROWS = {
    "gate_up": [(16, 128, 4, 4), (32, 128, 4, 4), (32, 64, 4, 4), (64, 64, 4, 4), (32, 256, 8, 3)],
    "down": [(16, 128, 4, 4), (16, 256, 4, 4), (16, 256, 8, 3), (32, 128, 4, 4), (32, 256, 8, 3)],
}


def ffns(visit: Visit, *, rows: int, hidden: int, width: int) -> Iterator[dict[str, Any]]:
    """skipcal.ops.ffn: error, time as set and by other settings, one half of the op at a time; skipped."""
    device, dtype = torch.device(visit.device), getattr(torch, visit.dtype)
    copied = copy_bandwidth(device, rounds=3, size=None if visit.on_gpu else 2**20).median
    nbytes = 3 * hidden * width * dtype.itemsize
    sets = [ffn_weights(hidden, width, device, dtype) for _ in range(sets_of(visit, nbytes))]
    h = torch.randn(rows, hidden, device=device).to(dtype)
    runs, skips = (torch.full((rows,), value, dtype=torch.bool, device=device) for value in (False, True))
    error = error_of(ffn.ffn(h, runs, sets[0])[0], ffn.reference(h, runs, sets[0])[0])
    table = {part: DEFAULTS[part][row_class(rows)] for part in ("gate_up", "down")}

    def timed(skip: Tensor, settings: Mapping[str, Settings] = table) -> dict[str, Any]:
        launches = [partial(ffn.ffn, h, skip, weights, settings=settings) for weights in sets]
        return _timed(visit, launches, nbytes, copied)

    now, skipped = timed(runs), timed(skips)
    found = {
        "rows": rows, "hidden": hidden, "width": width, "sets": len(sets), "error": error,
        "copy_gb_per_s": copied,
        "as_set": {**now, "settings": {part: list(table[part]) for part in table}},
        "skipped_us": skipped["us"],
    }  # fmt: skip
    yield {"ffn": found}
    tried: dict[str, list[dict[str, Any]]] = {part: [] for part in table}
    for part, others in (ONE_ROW if rows == 1 else SOME_ROWS).items():
        for settings in others if visit.on_gpu else others[:1]:
            try:
                taken = timed(runs, {**table, part: Settings(*settings)})
            except Exception as failed:  # one that does not fit the chip is a finding
                taken = {"failed": str(failed)[:200]}
            tried[part].append({"settings": list(settings), **taken})
            yield {"tried": tried, "said": _best(now, skipped["us"], tried)}
    if not error <= MOST_ERROR:
        raise AssertionError(f"differs from its reference by {error:.1e} of its size, over {MOST_ERROR:.0e}")


def attentions(
    visit: Visit, *, heads: int, kv_heads: int, head_dim: int, contexts: list[int]
) -> Iterator[dict[str, Any]]:
    """skipcal.ops.decode_attention of one row: error and time by length, with padding or none."""
    device = torch.device(visit.device)
    copied = copy_bandwidth(device, rounds=3, size=None if visit.on_gpu else 2**20).median
    q = torch.randn(1, heads, head_dim, device=device).to(getattr(torch, visit.dtype))
    found: list[dict[str, Any]] = []
    for context in contexts:
        for padded in (False, True):
            found.append(_attention(visit, q, kv_heads, context, padded=padded, copied=copied))
            each = [f"{f['context']}{' padded' * f['padded']} {f['us']:.1f} us" for f in found]
            yield {"attention": found, "said": ", ".join(each)}
            if not found[-1]["error"] <= MOST_ERROR:
                raise AssertionError(f"{each[-1]}: differs from its reference by {found[-1]['error']:.1e}")


def _attention(
    visit: Visit, q: Tensor, kv_heads: int, context: int, *, padded: bool, copied: float
) -> dict[str, Any]:
    head_dim, slots = q.shape[-1], 2 * context
    nbytes = 2 * kv_heads * context * head_dim * q.element_size()
    shape = (2, 1, kv_heads, slots, head_dim)
    caches = [torch.randn(shape, device=q.device, dtype=q.dtype) for _ in range(sets_of(visit, nbytes))]
    length = torch.tensor(context, device=q.device)
    valid = torch.ones(1, slots, dtype=torch.bool, device=q.device) if padded else None

    def attended(cache: Tensor) -> Tensor:
        k, v = cache
        return attention.decode_attention(q, k, v, length, valid=valid, scale=head_dim**-0.5)

    k, v = caches[0]
    expected = attention.reference(q, k, v, length, valid=valid, scale=head_dim**-0.5)
    error = error_of(attended(caches[0]), expected)
    times = _timed(visit, [partial(attended, cache) for cache in caches], nbytes, copied)
    return {"context": context, "padded": padded, "sets": len(caches), "error": error, **times}


def sets_of(visit: Visit, nbytes: int) -> int:
    return max(3, -(-_COLD_BYTES // nbytes)) if visit.on_gpu else 2


def ffn_weights(hidden: int, width: int, device: torch.device, dtype: torch.dtype) -> ffn.FFNWeights:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).mul_(shape[-1] ** -0.5).to(dtype)

    norm = torch.rand(hidden, device=device).to(dtype) + 0.5
    return ffn.FFNWeights(norm, 1e-5, normal(width, hidden), normal(width, hidden), normal(hidden, width))


def error_of(mine: Tensor, reference: Tensor) -> float:
    a, b = mine.double(), reference.double()
    return float((a - b).norm() / b.norm())


def _timed(
    visit: Visit, launches: Sequence[Callable[[], Any]], nbytes: int, copied: float
) -> dict[str, float]:
    us = _median_us(launches, captured=visit.on_gpu)
    return {"us": us, "gb_per_s": nbytes / us / 1e3, "share_of_copy": nbytes / us / 1e3 / copied}


def _median_us(launches: Sequence[Callable[[], Any]], *, captured: bool) -> float:
    """Microseconds of one launch."""
    watch = stopwatch(launches, captured=captured)
    return statistics.median(watch() for _ in range(_REPLAYS if captured else 1))


def stopwatch(launches: Sequence[Callable[[], Any]], *, captured: bool) -> Callable[[], float]:
    """What measures, anew in each call, the microseconds of one launch. captured: in a CUDA graph of many."""
    for launch in launches:  # compiled, if it was not
        launch()
    if not captured:
        return partial(_by_the_clock, launches)
    count = max(1, _LAUNCHES // len(launches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            for launch in launches:
                launch()
    graph.replay()
    return partial(_replayed, graph, count * len(launches))


def _by_the_clock(launches: Sequence[Callable[[], Any]]) -> float:
    start = time.perf_counter()
    for launch in launches:
        launch()
    return (time.perf_counter() - start) * 1e6 / len(launches)


def _replayed(graph: torch.cuda.CUDAGraph, launches: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / launches


def _best(now: dict[str, float], skipped_us: float, tried: dict[str, list[dict[str, Any]]]) -> str:
    said = f"{now['us']:.1f} us, {now['share_of_copy']:.0%} of copy, skipped {skipped_us:.1f} us"
    for part, found in tried.items():
        timed = [f for f in found if "us" in f]
        if timed:
            best = min(timed, key=lambda f: f["us"])
            said += f"; {part} {tuple(best['settings'])} {best['us']:.1f}"
    return said
