"""What the parts of a profile must say together, besides what each must say for itself."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from skipcal.core.policy import SkipPolicy, is_papers_rule
from skipcal.profiles.parts import GateInfo, GateSettings, StaticSettings

if TYPE_CHECKING:
    from skipcal.profiles.data import ProfileData


def check_agreement(profile: ProfileData) -> None:
    """Raise ValueError, naming the field, when two parts of the profile contradict each other."""
    checks: tuple[Callable[[ProfileData], None], ...] = (
        _layers, _regions, _policy, _damage_rule, _gate, _fixed_sets, _points,
    )  # fmt: skip
    for check in checks:
        check(profile)


def _layers(profile: ProfileData) -> None:
    if "pooled" not in profile.layers:
        raise ValueError("layers: expected an entry 'pooled'")
    count = profile.model.num_layers
    for name, statistics in profile.layers.items():
        if len(statistics.mean) != count:
            raise ValueError(
                f"layers.{name}: expected {count} entries (model.num_layers), got {len(statistics.mean)}"
            )


def _regions(profile: ProfileData) -> None:
    count, regions = profile.model.num_layers, profile.regions
    if not regions.cold_s <= regions.cold_e <= count:
        raise ValueError(
            f"regions: expected 0 <= cold_s <= cold_e <= {count} (model.num_layers), got cold_s "
            f"{regions.cold_s} and cold_e {regions.cold_e}"
        )
    for field in ("cold_s_interval", "cold_e_interval"):
        interval = getattr(regions, field)
        if interval is not None and not interval[0] <= interval[1] <= count:
            raise ValueError(
                f"regions.{field}: expected two ascending layers up to {count}, got {list(interval)}"
            )


def _policy(profile: ProfileData) -> None:
    policy, gate, count = profile.policy, profile.gate, profile.model.num_layers
    if isinstance(policy, GateSettings):
        if gate is None:
            raise ValueError("gate: expected an entry beside a policy of the rule 'gate'")
        if (policy.tensors, policy.sha256) != (gate.tensors, gate.sha256):
            raise ValueError("policy: expected the file of tensors that the gate names, got another")
    if isinstance(policy, StaticSettings):
        ascending_within("policy.layers", policy.layers, count)
        fixed = profile.fixed_sets
        if policy.surrogates == "fitted":
            if fixed is None or policy.layers not in [each.layers for each in fixed.sets]:
                raise ValueError("policy.surrogates: expected a set of policy.layers among fixed_sets")
        elif policy.surrogates and (gate is None or not set(policy.layers) <= set(gate.layers)):
            raise ValueError("policy.surrogates: expected a gate with a surrogate for each of policy.layers")
    if isinstance(policy, SkipPolicy) and policy.tolerances is not None and profile.damage_rule is None:
        raise ValueError("damage_rule: expected an entry beside a policy with tolerances")
    if profile.paper_policy is None and not is_papers_rule(policy):
        raise ValueError("paper_policy: expected an entry beside a policy other than the paper's rule")
    if profile.paper_policy is not None and not is_papers_rule(profile.paper_policy):
        raise ValueError("paper_policy.tolerances: expected none")
    for name, cosine in (("policy", policy), ("paper_policy", profile.paper_policy)):
        tolerances = cosine.tolerances if isinstance(cosine, SkipPolicy) else None
        if tolerances is not None and len(tolerances) != count:
            raise ValueError(f"{name}.tolerances: expected {count} (model.num_layers), got {len(tolerances)}")
        if isinstance(cosine, SkipPolicy) and cosine.cold_e > count:
            raise ValueError(
                f"{name}.cold_e: expected at most {count} (model.num_layers), got {cosine.cold_e}"
            )


def _damage_rule(profile: ProfileData) -> None:
    found, count = profile.damage_rule, profile.model.num_layers
    if found is None:
        return
    tolerances = found.policy.tolerances
    if tolerances is None or len(tolerances) != count or found.policy.cold_e > count:
        raise ValueError(f"damage_rule.policy: expected a region and tolerances of {count} layers")
    if len(found.excess_nll) != count:
        raise ValueError(f"damage_rule.excess_nll: expected {count} values, got {len(found.excess_nll)}")


def _gate(profile: ProfileData) -> None:
    gate, model = profile.gate, profile.model
    if gate is None:
        return
    ascending_within("gate.layers", gate.layers, model.num_layers)
    if gate.fit.rank > model.hidden_size:
        raise ValueError(
            f"gate.fit.rank: expected at most {model.hidden_size} (model.hidden_size), got {gate.fit.rank}"
        )


def _fixed_sets(profile: ProfileData) -> None:
    fixed, model = profile.fixed_sets, profile.model
    if fixed is None:
        return
    for number, each in enumerate(fixed.sets):
        ascending_within(f"fixed_sets.sets[{number}].layers", each.layers, model.num_layers)
    if fixed.fit.rank > model.hidden_size:
        raise ValueError(
            f"fixed_sets.fit.rank: expected at most {model.hidden_size} (model.hidden_size), got "
            f"{fixed.fit.rank}"
        )
    if profile.gate is not None and profile.gate.tensors == fixed.tensors:
        raise ValueError(f"fixed_sets.tensors: expected another file than the gate's, got {fixed.tensors!r}")


def _points(profile: ProfileData) -> None:
    gate: GateInfo | None = profile.gate
    for name, points in (
        ("operating_points", profile.operating_points),
        ("gate.operating_points", gate.operating_points if gate else []),
        ("fixed_sets.sets", profile.fixed_sets.sets if profile.fixed_sets else []),
    ):
        targets = [point.target_skip_ratio for point in points]
        if any(first >= second for first, second in pairwise(targets)):
            raise ValueError(f"{name}: expected ascending target_skip_ratio, each once, got {targets}")


def ascending_within(field: str, layers: list[int], count: int) -> None:
    """Raise ValueError unless `layers` ascend, each once, within a model of `count` layers."""
    if any(first >= second for first, second in pairwise(layers)):
        raise ValueError(f"{field}: expected ascending layers, each once, got {layers}")
    if layers and not 0 <= layers[0] <= layers[-1] < count:
        raise ValueError(f"{field}: expected layers below {count} (model.num_layers), got {layers}")
