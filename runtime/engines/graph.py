"""The graph engine: decode steps of generate() as CUDA graphs.

A step is captured whole (runtime.engines.graph_step), with the skip decision on the device, so the
host launches one graph a token and waits for nothing. On a CPU the same step runs uncaptured: slower, and
the proof of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from skipcal.arch.locate import Architecture
from skipcal.core.rule import Rule
from skipcal.core.surrogates import Surrogates
from skipcal.runtime.engines import step_engine
from skipcal.runtime.engines.graph_rules import StepCounts
from skipcal.runtime.engines.graph_step import DecodeStep

_ATTENTION = ("eager", "sdpa")  # those that take a mask for one token


class GraphEngine(step_engine.StepEngine):
    """Decode steps with the decisions on the device."""

    name_of_steps = "graph"

    def __init__(
        self, architecture: Architecture, rule: Rule, *, surrogates: Surrogates | None = None, asked: bool
    ) -> None:
        """asked: it was, by name; else it was chosen for the model's device."""
        super().__init__(architecture, rule, surrogates=surrogates, asked=asked)
        device = next(architecture.stack.parameters()).device
        self._counts = StepCounts(architecture.num_layers, tuple(rule.layers), device)

    @property
    def skipped_per_layer(self) -> list[int]:
        """Skipped FFN blocks of live rows, by layer."""
        skipped, _, _ = self._counts.read()
        return [a + b for a, b in zip(skipped, super().skipped_per_layer, strict=True)]

    @property
    def weight_bytes_saved(self) -> int:
        """Bytes of weights not read: a block's once for each pass in which every row skipped it."""
        _, by_all, by_some = self._counts.read()
        saved = super().weight_bytes_saved
        for block, all_rows, some in zip(self._architecture.blocks, by_all, by_some, strict=True):
            saved += all_rows * block.weight_bytes - some * self._surrogates.weight_bytes(block.index)
        return saved

    @property
    def row_decisions(self) -> tuple[int, int]:
        """Decisions on which all live rows agreed, and decisions."""
        return self._counts.agreement()

    def runs_ahead(self, cache: Any) -> bool:
        """Whether the next step may be launched before it is known to be wanted: the host need not wait.

        A step that is still to be prepared is waited for, so that the token before it is heard of first.
        """
        return self.takes(cache) and self._step is not None and self._is_ready(self._step)

    def _refused(self, forward: Callable[..., Any], room: int) -> str | None:
        chains = [module for block in self._architecture.blocks for module in block.chain]
        if any(self._eager.has_another_forward(module) for module in chains):
            return "modules have been given another forward, which kernels in their place would not call"
        return super()._refused(forward, room)

    def _new_step(self, forward: Callable[..., Any], batch: int, room: int) -> DecodeStep:
        return DecodeStep(
            forward,
            self._architecture,
            self._memories,
            self._rule,
            batch=batch,
            room=room,
            surrogates=self._surrogates,
            counts=self._counts,
            extras=self._eager.extras,
        )


def refusal(architecture: Architecture) -> str | None:
    """Why no decode step of the model can be captured; None: it can be tried."""
    stack: Any = architecture.stack
    device = next(stack.parameters()).device.type
    if device not in ("cpu", "cuda"):
        return f"{device} has no CUDA graphs"
    attention = stack.config._attn_implementation
    if attention not in _ATTENTION:
        return f"attention {attention!r} takes no mask for one token; {' or '.join(_ATTENTION)} does"
    return step_engine.refusal(architecture)
