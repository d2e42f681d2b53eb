"""What a captured step asks of the GPU, with a stand-in for it; real captures: test_graph_capture.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import left_padded, lively
from engines import ALWAYS, ROWS, SOME, counts, generated
from gpu_stand_in import SECOND, StandIn

from skipcal.runtime.engines import graph_step, if_node
from skipcal.runtime.engines.generate_loop import _Told
from skipcal.runtime.engines.graph_step import DecodeStep
from skipcal.runtime.session import skipping

pytestmark = pytest.mark.usefixtures("references", "small_caches")


def test_every_launch_goes_to_the_models_gpu(tiny: Any, gpu: StandIn) -> None:
    output, report = generated(tiny, SOME, "graph")
    assert report.engine == "graph", report.engine_reason
    assert {device for device, _ in gpu.computed_on} == {SECOND}
    assert gpu.computed_on[2] == (SECOND, "captures on a stream of cuda:1")
    assert gpu.replays == 2 + 11  # of two proofs, and of each step
    assert gpu.device == torch.device("cuda", 0)
    assert torch.equal(output, generated(tiny, SOME, "eager")[0])


def test_texts_without_padding_have_a_graph_of_their_own(tiny: Any, gpu: StandIn) -> None:
    with skipping(tiny, policy=SOME, engine="graph") as run:
        for rows in (ROWS, [ROWS[2]] * 3, ROWS):
            tiny.generate(**left_padded(rows), max_new_tokens=5, do_sample=False)
        step: Any = run._engine._step  # type: ignore[union-attr]
    assert {padded for *_, padded in step._graphs} == {True, False}
    assert gpu.captures == 2


def test_a_failed_capture_says_its_first_cause_and_leaves_the_stream(
    tiny: Any, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, eager = generated(tiny, SOME, "eager")
    noted = DecodeStep._compute

    def compute(self: Any) -> Any:
        if gpu.stream.startswith("captures"):
            raise ValueError("no room for the kernel")
        return noted(self)

    monkeypatch.setattr(DecodeStep, "_compute", compute)
    output, report = generated(tiny, SOME, "graph")
    assert "could not be captured (no room for the kernel)" in report.engine_reason
    assert gpu.stream == "default"
    assert torch.equal(output, expected) and counts(report) == counts(eager)


def test_if_nodes_are_prepared_only_where_an_ffn_is_a_module(
    gpu: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise RuntimeError("no NVRTC here")

    monkeypatch.setattr(graph_step, "prepare_if_nodes", missing)
    _, fused = generated(lively("llama"), ALWAYS, "graph")
    assert fused.engine == "graph", fused.engine_reason
    _, modules = generated(lively("gpt2"), ALWAYS, "graph")
    assert "no NVRTC here" in modules.engine_reason


def test_the_answer_is_waited_for_on_the_models_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[Any] = []
    event = SimpleNamespace(record=recorded.append, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    _Told(SECOND, None).tell_no_sync(torch.tensor([True]), torch.tensor([5]))
    assert recorded == ["stream of cuda:1"]


# The driver's names: unsuffixed functions of CUDA 12 know no edges, those of CUDA 13 do


@pytest.mark.parametrize(
    ("name", "older"),
    [
        ("cuStreamGetCaptureInfo", "cuStreamGetCaptureInfo_v3"),
        ("cuGraphAddNode", "cuGraphAddNode_v2"),
        ("cuStreamUpdateCaptureDependencies", "cuStreamUpdateCaptureDependencies_v2"),
    ],
)
def test_the_function_that_knows_edges_is_called(name: str, older: str) -> None:
    cuda_12 = SimpleNamespace(**{name: "without", older: "with"})
    cuda_13 = SimpleNamespace(**{name: "with"})
    assert if_node.with_edges(cuda_12, name) == if_node.with_edges(cuda_13, name) == "with"
