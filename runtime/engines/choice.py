"""Which engine runs an FFN-skipping policy, and why that one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skipcal.errors import ConfigError, asking

if TYPE_CHECKING:
    from skipcal.arch.locate import Architecture
    from skipcal.runtime.engines.base import Engine
    from skipcal.runtime.rules import Rule
    from skipcal.runtime.surrogates import Surrogates

ENGINES = ("auto", "eager", "graph")


def check_engine(name: str) -> None:
    """Raise ConfigError for an unknown name."""
    if name not in ENGINES:
        raise ConfigError(asking(f"engine {name!r} is not one of {', '.join(ENGINES)}", name, ENGINES))


def ffn_engine(
    architecture: Architecture, rule: Rule, asked: str, *, surrogates: Surrogates | None = None
) -> Engine:
    """A fresh engine that runs `rule`, by its name or, for "auto", the fastest that supports the case.

    surrogates: what is added to the stream in place of a skipped FFN; None: nothing.
    """
    from skipcal.arch.stored import compute_place
    from skipcal.runtime.engines.eager import EagerEngine
    from skipcal.runtime.engines.graph import GraphEngine, refusal

    def eager(reason: str) -> EagerEngine:
        return EagerEngine(architecture, rule, surrogates=surrogates, reason=reason)

    if asked == "eager":
        return eager("asked for")
    device = compute_place(architecture.stack)[0].type  # offloaded weights lie on none
    if asked == "auto" and device != "cuda":
        return eager(f"a {device} gains nothing by graphs")
    if reason := refusal(architecture):
        return eager(f"graph is not possible: {reason}")
    why = "asked for" if asked == "graph" else "chosen, for the model is on a GPU"
    return GraphEngine(architecture, rule, surrogates=surrogates, why=why)
