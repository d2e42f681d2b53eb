"""Which steps a visit has, the most important first, and their limits on an H100."""

from __future__ import annotations

from collections.abc import Callable

from gpu_visit.steps import Step, Visit


def check(visit: Visit) -> list[Step]:
    """Does everything work, and what does each kernel take."""
    gpu = visit.on_gpu
    context, processes = (512, 8) if gpu else (16, 0)
    decoded = {"context_tokens": [context], "new_tokens": 16 if gpu else 5, "ratios": [0.25], "rounds": 1}
    traced = {"context": context, "tokens": 8 if gpu else 2, "skips": 8 if gpu else 2}
    matrix = {"hidden": 4096, "width": 11008} if gpu else {"hidden": 64, "width": 96}
    heads, kv_heads, head_dim = (32, 32, 128) if gpu else (4, 2, 16)
    attended = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    contexts = [512, 2048] if gpu else [24]
    kernels = {} if gpu else {"TRITON_INTERPRET": "1"}
    ops = "tests/runtime/ops" if gpu else "tests/runtime/ops/test_arm.py"
    none = None if gpu else "nothing is captured on a CPU"
    return [
        Step("versions", 60, "gpu_visit.device:versions"),
        Step("if_node", 60, "gpu_visit.device:if_node"),
        _tests("captured", 120, "tests/runtime/test_graph_capture.py", processes, left_out=none),
        Step("bench", 110, "gpu_visit.bench:bench", {"settings": {"engine": "graph", **decoded}}),
        Step("ffn", 60, "gpu_visit.ops:ffns", {"rows": 1, **matrix}, env=kernels),
        Step("trace", 75, "gpu_visit.trace:trace", traced),
        Step("attention", 60, "gpu_visit.ops:attentions", {**attended, "contexts": contexts}, env=kernels),
        Step("ffn_rows", 60, "gpu_visit.ops:ffns", {"rows": 8 if gpu else 3, **matrix}, env=kernels),
        _tests("ops", 150, ops, processes),
    ]


def _tests(name: str, limit_s: float, path: str, processes: int, *, left_out: str | None = None) -> Step:
    options = {"paths": [path], "processes": processes}
    return Step(name, limit_s, "gpu_visit.suite:tests", options, left_out=left_out)


PLANS: dict[str, Callable[[Visit], list[Step]]] = {"check": check}
