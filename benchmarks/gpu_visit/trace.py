"""What the device does in a decode step of the graph engine: each kernel's launches and time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from gpu_visit.steps import Visit
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import LogitsProcessor, LogitsProcessorList

from skipcal.arch.locate import locate
from skipcal.core.policy import Policy
from skipcal.runtime.session import skipping
from skipcal.speed.arms import endless_greedy, random_prompt
from skipcal.speed.forced import ForcedCosine
from skipcal.speed.shapes import random_model

_BEFORE = 4  # tokens that are not traced
_MOST_KERNELS, _NAME = 60, 140


class _Traced(LogitsProcessor):
    """Switches a profiler on before a token's pass and off after `tokens` of them."""

    def __init__(self, profiler: Any, tokens: int, *, on_gpu: bool) -> None:
        self._profiler, self._last, self._on_gpu = profiler, _BEFORE + tokens, on_gpu
        self._calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        if self._calls in (_BEFORE, self._last):
            if self._on_gpu:
                torch.cuda.synchronize()
            (self._profiler.start if self._calls == _BEFORE else self._profiler.stop)()
        return scores


def trace(visit: Visit, *, context: int, tokens: int, skips: int) -> Iterator[dict[str, Any]]:
    """Kernels a token under three policies: nothing asked, all watched, `skips` FFNs skipped."""
    device = torch.device(visit.device)
    model = random_model(visit.shape, device=device, dtype=getattr(torch, visit.dtype), seed=0)
    architecture = locate(model)
    forced = ForcedCosine(architecture.num_layers)
    policies = {"full": forced.full(), "watching": forced.watching(), f"skip-{skips}": forced.skipping(skips)}
    ids = random_prompt(model, batch_size=1, tokens=context, seed=0)
    found: dict[str, Any] = {}
    for name, policy in policies.items():
        found[name] = _traced(visit, model, architecture, policy, ids, tokens)
        said = "; ".join(
            f"{n} {f['launches']:.0f} launches, {f['busy_us']:.0f} us busy, {f['gap_us']:.0f} between"
            for n, f in found.items()
        )
        yield {"a_token": found, "said": said if visit.on_gpu else f"torch calls on a CPU: {said}"}


@torch.no_grad()
def _traced(
    visit: Visit, model: Any, architecture: Any, policy: Policy, ids: torch.Tensor, tokens: int
) -> dict[str, Any]:
    activity = ProfilerActivity.CUDA if visit.on_gpu else ProfilerActivity.CPU
    profiler = profile(activities=[activity])
    new_tokens = _BEFORE + tokens + 2
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens}
    with (
        endless_greedy(model),
        skipping(model, policy=policy, engine="graph", architecture=architecture) as run,
    ):
        model.generate(**given)  # captured and proven
        traced = _Traced(profiler, tokens, on_gpu=visit.on_gpu)
        model.generate(**given, logits_processor=LogitsProcessorList([traced]))
    if run.report.engine != "graph":
        raise AssertionError(f"ran by {run.report.engine}: {run.report.engine_reason}")
    events = [e for e in profiler.events() if (e.device_type == DeviceType.CUDA) == visit.on_gpu]
    return _table(events, tokens, on_gpu=visit.on_gpu)


def _table(events: list[Any], tokens: int, *, on_gpu: bool) -> dict[str, Any]:
    launches: Counter[str] = Counter()
    us: Counter[str] = Counter()
    busy, end, first = 0.0, float("-inf"), float("inf")
    for event in sorted(events, key=lambda e: e.time_range.start):
        taken = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        launches[event.name[:_NAME]] += 1
        us[event.name[:_NAME]] += taken
        first = min(first, event.time_range.start)
        busy += max(0.0, event.time_range.end - max(event.time_range.start, end))
        end = max(end, event.time_range.end)
    if not events:
        raise AssertionError("nothing was traced")
    return {
        "launches": len(events) / tokens,
        "busy_us": busy / tokens,
        "span_us": (end - first) / tokens,
        "gap_us": (end - first - busy) / tokens,
        "kernels": {
            name: {"launches": launches[name] / tokens, "us": total / tokens}
            for name, total in us.most_common(_MOST_KERNELS)
        },
    }
