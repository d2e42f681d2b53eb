"""Which engine runs an FFN-skipping policy, and why that one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skipcal.errors import ConfigError, asking

if TYPE_CHECKING:
    from skipcal.arch.locate import Architecture
    from skipcal.runtime.engines.base import Engine
    from skipcal.runtime.rules import Rule
    from skipcal.runtime.surrogates import Surrogates

ENGINES = ("auto", "eager", "graph", "recorded")


def check_engine(name: str) -> None:
    """Raise ConfigError for an unknown name."""
    if name not in ENGINES:
        raise ConfigError(asking(f"engine {name!r} is not one of {', '.join(ENGINES)}", name, ENGINES))


def fastest(device: str) -> str:
    """The engine that "auto" takes for a long run on a type of device, where it supports the model."""
    return {"cuda": "graph", "cpu": "recorded"}.get(device, "eager")


def ffn_engine(
    architecture: Architecture, rule: Rule, asked: str, *, surrogates: Surrogates | None = None
) -> Engine:
    """A fresh engine that runs `rule`, by its name or, for "auto", the fastest that supports the case.

    surrogates: what is added to the stream in place of a skipped FFN; None: nothing.
    """
    from skipcal.arch.stored import compute_place
    from skipcal.runtime.engines import graph, recorded
    from skipcal.runtime.engines.eager import EagerEngine

    def eager(reason: str) -> EagerEngine:
        return EagerEngine(architecture, rule, surrogates=surrogates, reason=reason)

    if asked == "eager":
        return eager("asked for")
    device = compute_place(architecture.stack)[0].type  # offloaded weights lie on none
    wanted = asked if asked != "auto" else fastest(device)
    if wanted == "eager":
        return eager(f"there is no other for a {device}")
    refusal, kind = {
        "graph": (graph.refusal, graph.GraphEngine),
        "recorded": (recorded.refusal, recorded.RecordedEngine),
    }[wanted]
    if reason := refusal(architecture):
        return eager(f"{wanted} is not possible: {reason}")
    return kind(architecture, rule, surrogates=surrogates, asked=asked == wanted)
