"""Which engine runs a policy, and why that one: chosen and made here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.whole_layers import ShortGPT

if TYPE_CHECKING:
    from skipcal.arch.locate import Architecture
    from skipcal.core.rule import Rule
    from skipcal.core.surrogates import Surrogates
    from skipcal.runtime.engines.base import Engine


def engine_for(
    policy: Policy, architecture: Architecture, asked: str = "auto", *, batch_rule: str = "rows"
) -> Engine:
    """A fresh engine that runs `policy`, by its name or, for "auto", the fastest that supports the case.

    asked: one of configs.names.ENGINES; methods that skip whole layers have engines of their own.
    batch_rule: as `skipping` takes it.
    """
    from skipcal.runtime.engines.whole_layers import RemovedLayers, SkippedLayers

    if isinstance(policy, ShortGPT):
        return RemovedLayers(architecture, policy.removed)
    rule: Rule = (
        policy.make_rule(batch_rule=batch_rule) if isinstance(policy, SkipPolicy) else policy.make_rule()
    )
    if policy.unit == "layer":
        return SkippedLayers(architecture, rule)
    surrogates: Surrogates | None = getattr(policy, "surrogates", None)
    if surrogates is not None:
        surrogates = surrogates.for_model(architecture)
    return _ffn_engine(architecture, rule, asked, surrogates)


def fastest(device: str) -> str:
    """The engine that "auto" takes for a long run on a type of device, where it supports the model."""
    return {"cuda": "graph", "cpu": "recorded"}.get(device, "eager")


def _ffn_engine(architecture: Architecture, rule: Rule, asked: str, surrogates: Surrogates | None) -> Engine:
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
