"""The recorded engine: on a CPU, decode steps of generate() as lists of torch calls.

The list is what the model's forward does with one token a row, without the modules around it; FFNs in
which the rule has a say, and attention, which grows, are called in between as they are. Decisions,
counts and FFNs are those of the eager engine, whose own code makes them; logits are the same bit for bit.

To record and compare takes as long as some five steps. Chosen for a CPU rather than asked for, the
engine therefore waits until a session has decoded so many tokens that this is little beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from skipcal.arch.locate import Architecture
from skipcal.core.rule import Rule
from skipcal.core.surrogates import Surrogates
from skipcal.runtime.engines import step_engine
from skipcal.runtime.engines.recorded_step import RecordedStep

# transformers' hooks collect hidden states, with which generate() is decoded eagerly anyway.
_KNOWN_HOOKS = ("skipcal.", "transformers.")
FIRST_EAGER = 100  # decode steps of a session before one is recorded: a twentieth is lost at most


class RecordedEngine(step_engine.StepEngine):
    """Decode steps without the Python of the modules."""

    name_of_steps = "recorded"

    def __init__(
        self, architecture: Architecture, rule: Rule, *, surrogates: Surrogates | None = None, asked: bool
    ) -> None:
        """asked: it was, by name; else it was chosen for the model's device, and begins later."""
        super().__init__(architecture, rule, surrogates=surrogates, asked=asked)
        self._waits = 0 if asked else FIRST_EAGER
        if not asked:
            self._why += f", after {FIRST_EAGER} eager decode steps"

    @property
    def reason(self) -> str:
        """Why this engine, how it ran the steps, and what it left to the eager one."""
        if self._waits and not self._refusals:
            return f"on a CPU recorded takes over after {FIRST_EAGER} decode steps of generate()"
        return super().reason

    def prepare(self, given: dict[str, Any]) -> bool:
        """Whether the step over `given`, the arguments of the model's forward, is prepared; else be eager."""
        if self._waits > 0:
            self._waits -= 1
            return False
        return super().prepare(given)

    def runs_ahead(self, cache: Any) -> bool:
        """Whether the next step may be launched before it is known to be wanted; no, it is waited for."""
        return False

    def _new_step(self, forward: Callable[..., Any], batch: int, room: int) -> RecordedStep:
        return RecordedStep(forward, self._architecture, self._memories, self._eager, batch=batch)

    def _refused(self, forward: Callable[..., Any], room: int) -> str | None:
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on, which decides anew for each call"
        model = getattr(forward, "__self__", None)  # none where another was set on the instance
        inside = [] if model is None else [module for module in model.modules() if module is not model]
        if model is None or any(self._eager.has_another_forward(module) for module in inside):
            return "modules have been given another forward, and a recorded step calls none"
        if torch_module._has_any_global_hook() or any(map(_has_hooks, inside)):
            return "forward hooks are set on modules, and a recorded step calls none"
        return super()._refused(forward, room)


def refusal(architecture: Architecture) -> str | None:
    """Why no decode step of the model can be recorded; None: it can be tried."""
    stack: Any = architecture.stack
    device = next(stack.parameters()).device.type
    if device != "cpu":
        return f"the model is on a {device}"
    attention = stack.config._attn_implementation
    if attention != "sdpa":
        return f"attention {attention!r} is not torch's own; sdpa is"
    return step_engine.refusal(architecture)


def _has_hooks(module: nn.Module) -> bool:
    """Whether there are forward hooks of somebody else's."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not str(getattr(hook, "__module__", "")).startswith(_KNOWN_HOOKS) for hook in hooks)
