"""Which engine runs a policy, and why that one: chosen and made here."""

from __future__ import annotations

from skipcal.arch.locate import Architecture
from skipcal.arch.stored import compute_place
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.rule import Rule
from skipcal.core.surrogates import Surrogates
from skipcal.core.whole_layers import ShortGPT
from skipcal.runtime.engines import graph, recorded
from skipcal.runtime.engines.base import Engine
from skipcal.runtime.engines.eager import EagerEngine
from skipcal.runtime.engines.whole_layers import RemovedLayers, SkippedLayers


def engine_for(
    policy: Policy, architecture: Architecture, asked: str = "auto", *, batch_rule: str = "rows"
) -> Engine:
    """A fresh engine that runs `policy`, by its name or, for "auto", the fastest that supports the case.

    asked: one of configs.names.ENGINES; methods that skip whole layers have engines of their own.
    batch_rule: as `skipping` takes it.
    """
    if isinstance(policy, ShortGPT):
        return RemovedLayers(architecture, policy.removed)
    rule: Rule = (
        policy.make_rule(batch_rule=batch_rule) if isinstance(policy, SkipPolicy) else policy.make_rule()
    )
    if policy.unit == "layer":
        return SkippedLayers(architecture, rule)
    given: Surrogates | None = getattr(policy, "surrogates", None)
    surrogates = None if given is None else given.for_blocks(architecture.blocks)

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


def fastest(device: str) -> str:
    """The engine that "auto" takes for a long run on a type of device, where it supports the model."""
    return {"cuda": "graph", "cpu": "recorded"}.get(device, "eager")
