"""Captured steps on a GPU; the uncaptured ones are tested in test_graph_engine.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import left_padded, lively

from skipcal.core.policy import SkipPolicy
from skipcal.core.report import SkipReport
from skipcal.runtime.engines import graph_step
from skipcal.runtime.session import skipping

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU"),
]
ROWS = [[5, 17, 31, 8, 44, 9], [7, 12], [60, 61, 62, 63]]
SOME = SkipPolicy(cold_s=0, cold_e=4, threshold=0.6, warm_up_tokens=1)
FEW = SkipPolicy(cold_s=1, cold_e=4, threshold=-1.0, warm_up_tokens=2, max_skips=1)


def on_gpu(model_type: str) -> Any:
    model: Any = lively(model_type)
    return model.cuda()


def generated(model: Any, policy: SkipPolicy, engine: str, rows: list[list[int]]) -> tuple[Any, SkipReport]:
    inputs = {name: tensor.cuda() for name, tensor in left_padded(rows).items()}
    with skipping(model, policy=policy, engine=engine) as run:
        outputs = [model.generate(**inputs, max_new_tokens=n, do_sample=False) for n in (24, 40)]
    return outputs, run.report


def assert_captured_equals_eager(model: Any, policy: SkipPolicy, rows: list[list[int]], how: str) -> None:
    """In float32, where TensorFloat-32 is off by default, tokens and counts are the same."""
    expected, eager = generated(model, policy, "eager", rows)
    outputs, report = generated(model, policy, "graph", rows)
    assert report.engine == "graph", report.engine_reason
    assert "one CUDA graph a step" in report.engine_reason
    assert how in report.engine_reason
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert report.skipped_per_layer == eager.skipped_per_layer
    assert report.weight_bytes_saved == eager.weight_bytes_saved
    assert report.decode_steps == eager.decode_steps


@pytest.mark.parametrize("policy", [SOME, FEW])
@pytest.mark.parametrize("rows", [1, 3])
def test_predicated_kernels_in_a_graph(policy: SkipPolicy, rows: int) -> None:
    assert_captured_equals_eager(on_gpu("llama"), policy, ROWS[:rows], "4 layers fused")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "phi3", "smollm3", "glm"])
def test_families_like_llama_are_fused(model_type: str, rows: int) -> None:
    assert_captured_equals_eager(on_gpu(model_type), SOME, ROWS[:rows], "4 layers fused")


@pytest.mark.parametrize("policy", [SOME, FEW])
@pytest.mark.parametrize("model_type", ["gpt2", "gemma", "opt", "starcoder2"])
def test_modules_in_if_nodes_of_a_graph(policy: SkipPolicy, model_type: str) -> None:
    assert_captured_equals_eager(on_gpu(model_type), policy, ROWS, "as modules in IF nodes")


def test_windows_are_captured_as_the_text_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_step, "MIN_WINDOW", 8)
    monkeypatch.setattr(graph_step, "FIRST_SLOTS", 16)
    assert_captured_equals_eager(on_gpu("llama"), SOME, ROWS, "4 layers fused")


def test_half_precision_captures_and_skips() -> None:
    """Decisions near the threshold may differ from the eager engine's: the kernels round less."""
    model = on_gpu("llama").to(torch.bfloat16)
    _, report = generated(model, FEW, "graph", ROWS)
    assert report.engine == "graph", report.engine_reason
    assert report.skipped_blocks > 0


def test_auto_is_the_graph() -> None:
    _, report = generated(on_gpu("llama"), SOME, "auto", ROWS[:1])
    assert report.engine == "graph"
    assert "on a cuda" in report.engine_reason
