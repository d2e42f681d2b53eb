"""A stand-in for torch.cuda, as far as captures use it, and for the graphs that it captures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from skipcal.runtime.engines import graph_step
from skipcal.runtime.engines.graph_step import DecodeStep

SECOND = torch.device("cuda", 1)


class StandIn:
    """Which GPU and which stream are the current ones, and what was computed where."""

    def __init__(self) -> None:
        self.device, self.stream = torch.device("cuda", 0), "default"
        self.computed_on: list[tuple[torch.device, str]] = []
        self.captures = 0
        self.replays = 0
        self.captured: Graph  # the last one

    @contextmanager
    def using_device(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device
        yield
        self.device = before

    @contextmanager
    def using_stream(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def capturing(self, graph: Graph, *, stream: str, **_: Any) -> Iterator[None]:
        """As torch's: where the capture cannot be ended, the stream is not put back."""
        self.stream, self.captured = f"captures on {stream}", graph
        try:
            yield
        except Exception:
            raise RuntimeError("capture was invalidated") from None
        self.stream = "default"
        self.captures += 1


class Graph:
    """Computes the step that it captured, with the memory that it captured."""

    def __init__(self, gpu: StandIn, compute: Any) -> None:
        self._gpu, self._compute = gpu, compute

    def capture(self, step: Any) -> None:
        self._step, self._memory = step, memory_of(step)

    def pool(self) -> int:
        return 0

    def replay(self) -> None:
        self._gpu.replays += 1
        assert memory_of(self._step) == self._memory, "a graph would write where its step no longer is"
        self._compute(self._step)


def memory_of(step: Any) -> list[Any]:
    """Where a step keeps what it reads and writes: addresses and shapes."""
    inputs = vars(step.inputs).values()
    cached = [t for layer in step.cache.layers for t in (layer.keys, layer.values)]
    return [(t.data_ptr(), t.shape, t.stride()) for t in (*inputs, *cached, step._skips)]


class _Stream(str):
    def wait_stream(self, other: str) -> None:
        """All is done at once."""


def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Steps believe that they are on the second GPU."""
    found = StandIn()
    make, compute = DecodeStep.__init__, DecodeStep._compute

    def on_second(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.device = SECOND

    def noted(self: Any) -> Any:
        found.computed_on.append((found.device, found.stream))
        if found.stream.startswith("captures"):
            found.captured.capture(self)
        return compute(self)

    stand_ins = {
        "CUDAGraph": lambda: Graph(found, compute),
        "Stream": lambda device: _Stream(f"a stream of {device}"),
        "current_stream": lambda *_: _Stream(found.stream),
        "device": found.using_device,
        "graph": found.capturing,
        "stream": found.using_stream,
        "synchronize": lambda *_: None,
    }
    for name, instead in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, instead)
    monkeypatch.setattr(DecodeStep, "__init__", on_second)
    monkeypatch.setattr(DecodeStep, "_compute", noted)
    graph_step._capture_stream.cache_clear()
    return found
