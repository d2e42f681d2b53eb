"""Which steps a visit has, the most important first, and their limits on an H100."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_visit.steps import Step, Visit


def check(visit: Visit) -> list[Step]:
    """Does everything work, and what does each kernel take."""
    gpu = visit.on_gpu
    context, processes = (512, 8) if gpu else (16, 0)
    decoded = {"context_tokens": [context], "new_tokens": 16 if gpu else 5, "ratios": [0.25], "rounds": 1}
    traced = {"context": context, "tokens": 8 if gpu else 2, "skips": 8 if gpu else 2}
    matrix = {"hidden": 4096, "width": 11008} if gpu else {"hidden": 32, "width": 48}
    heads, kv_heads, head_dim = (32, 32, 128) if gpu else (4, 2, 16)
    attended = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    contexts = [512, 2048] if gpu else [24]
    kernels = {} if gpu else {"TRITON_INTERPRET": "1"}
    ops = "tests/ops" if gpu else "tests/ops/test_arm.py"
    none = None if gpu else "nothing is captured on a CPU"
    return [
        Step("versions", 60, "gpu_visit.device:versions"),
        Step("if_node", 60, "gpu_visit.device:if_node"),
        _tests("captured", 120, "tests/runtime/test_graph_capture.py", processes, left_out=none),
        _tests("served", 60, "tests/serving/test_captured.py", processes, left_out=none),
        Step("bench", 110, "gpu_visit.bench:bench", {"settings": {"engine": "graph", **decoded}}),
        Step("ffn", 60, "gpu_visit.ops:ffns", {"rows": 1, **matrix}, env=kernels),
        Step("trace", 75, "gpu_visit.trace:trace", traced),
        Step("attention", 60, "gpu_visit.ops:attentions", {**attended, "contexts": contexts}, env=kernels),
        Step("ffn_rows", 60, "gpu_visit.ops:ffns", {"rows": 8 if gpu else 3, **matrix}, env=kernels),
        _tests("ops", 150, ops, processes),
    ]


def measure(visit: Visit) -> list[Step]:
    """The numbers of docs/gpu.md, the settings of kernels, and each command on a GPU."""
    gpu = visit.on_gpu
    ops = "tests/ops" if gpu else "tests/ops/test_lang.py"
    larger = "llama-2-13b" if gpu else visit.shape
    calls = ("model_folder", "profile", "generate", "fit", "evaluate")
    matrices = {"shapes": [[4096, 11008], [5120, 13824]], "rows": [1, 8, 64]}
    timed = {**(matrices if gpu else {"shapes": [[16, 24]], "rows": [1, 3]}), "limit_s": 60.0}
    kernels = {} if gpu else {"TRITON_INTERPRET": "1"}
    return [
        Step("versions", 60, "gpu_visit.device:versions"),
        _bench(visit, "decode", visit.shape, 62, rounds=5),
        _bench(visit, "decode_gate", f"{visit.shape}-gate", 36, rounds=5, rule="gate"),
        _bench(visit, "decode_larger", "llama-2-13b" if gpu else "larger", 50, rounds=2, shape=larger),
        _bench(visit, "decode_batch_8", f"{visit.shape}-batch-8", 36, rounds=3, batch_size=[8]),
        Step("settings", 90, "gpu_visit.settings:settings", timed, env=kernels),
        *(Step(name, 60, f"gpu_visit.commands:{name}") for name in calls),
        _tests("ops", 150, ops, 8 if gpu else 0),
    ]


def _bench(visit: Visit, name: str, saved: str, limit_s: float, *, rounds: int, **settings: Any) -> Step:
    """limit_s: for its rounds, of which the first always runs; loading comes on top."""
    gpu = visit.on_gpu
    ratios = [0.125, 0.25, 0.5] if gpu else [0.25]
    size = {"context_tokens": [512 if gpu else 16], "new_tokens": 64 if gpu else 5}
    options = {
        "settings": {"ratios": ratios, "rounds": rounds if gpu else 1, **size, **settings},
        "limit_s": limit_s,
        "save": f"gpu_decode_{saved}",
    }
    return Step(name, 1.5 * limit_s + 40, "gpu_visit.bench:bench", options)


def _tests(name: str, limit_s: float, path: str, processes: int, *, left_out: str | None = None) -> Step:
    options = {"paths": [path], "processes": processes}
    return Step(name, limit_s, "gpu_visit.suite:tests", options, left_out=left_out)


PLANS: dict[str, Callable[[Visit], list[Step]]] = {"check": check, "measure": measure}
