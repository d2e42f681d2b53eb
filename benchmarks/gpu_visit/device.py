"""What the machine is, and whether its CUDA graphs know IF nodes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from gpu_visit.steps import Visit

from skipcal.runtime.engines.if_node import IfNode, prepare_if_nodes
from skipcal.speed.hardware import copy_bandwidth, environment

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy", "pydantic", "cuda-bindings")
_FLAGS = (1, 0, 1)


def versions(visit: Visit) -> Iterator[dict[str, Any]]:
    """Versions, the GPU, its driver and memory, what a copy reaches."""
    device = torch.device(visit.device)
    found = {name: _version(name) for name in _PACKAGES}
    gpu: dict[str, Any] = {}
    if visit.on_gpu:
        properties = torch.cuda.get_device_properties(device)
        fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit"
        asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        gpu = {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "nvidia_smi": dict(zip(fields.split(","), _output(asked).split(", "), strict=False)),
        }
    driver = gpu.get("nvidia_smi", {}).get("driver_version")
    said = f"torch {found['torch']}, triton {found['triton']}, transformers {found['transformers']}, "
    said += f"{gpu.get('name', 'a CPU')}, driver {driver}"
    yield {"versions": found, "gpu": gpu, "cpus": os.cpu_count(), "said": said}
    yield {"environment": environment(device)}
    bandwidth = copy_bandwidth(device, rounds=3, size=None if visit.on_gpu else 2**20)
    yield {"copy_gb_per_s": bandwidth.to_dict(), "said": f"{said}, copy {bandwidth.median:.0f} GB/s"}


def if_node(visit: Visit) -> Iterator[dict[str, Any]]:
    """A graph with one IF node, replayed with the flag set, unset, set: two additions."""
    device = torch.device(visit.device)
    flag = torch.ones((), dtype=torch.bool, device=device)
    total = torch.zeros(1, device=device)

    def step() -> None:
        node = IfNode(flag)
        node.begin()
        if node.runs:
            total.add_(1)
        node.end()

    run = _captured(step) if visit.on_gpu else step
    total.zero_()
    for value in _FLAGS:
        flag.fill_(bool(value))
        run()
    additions = int(total)
    yield {
        "additions": additions,
        "captured": visit.on_gpu,
        "by": "torch" if hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node") else "driver",
        "said": f"{additions} additions" + ("" if visit.on_gpu else ", not captured on a CPU"),
    }
    if additions != sum(_FLAGS):
        raise AssertionError(f"{additions} additions, expected {sum(_FLAGS)}")


def _captured(step: Any) -> Any:
    bodies = prepare_if_nodes()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for warm in filter(None, (stream, bodies)):
        with torch.cuda.stream(warm):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph.replay


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
