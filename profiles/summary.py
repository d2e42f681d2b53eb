"""A profile in words and columns, for a terminal of 80 columns."""

from __future__ import annotations

import textwrap

from skipcal.configs.names import DAMAGE
from skipcal.files.reading import printable
from skipcal.profiles.data import ProfileData
from skipcal.profiles.parts import (
    CalibrationInfo,
    DamageRule,
    Fit,
    GatePoint,
    GateSettings,
    OperatingPoint,
    StaticSettings,
)

WIDTH = 80


def summarize(profile: ProfileData, *, by_layer: bool = False) -> str:
    """Recommendation, operating points and warnings; with `by_layer` the statistics too."""
    parts = [_head(profile)]
    if by_layer:
        parts.append(_layers(profile))
    parts += [_points(profile), *(_warning(text) for text in profile.regions.warnings)]
    if profile.damage_rule is not None:
        parts.append(_damage_rule(profile, profile.damage_rule))
    if profile.gate is not None:
        parts += [_gate(profile), _gate_points(profile)]
    if profile.fixed_sets is not None:
        parts.append(_fixed_sets(profile))
    if isinstance(profile.policy, StaticSettings):
        parts.append(_static(profile.policy))
    return printable("\n\n".join(parts))


def _head(profile: ProfileData) -> str:
    model, regions, policy = profile.model, profile.regions, profile.cosine_policy
    calibration = profile.calibration
    texts = ", ".join(f"{c.name} ({c.tokens:,} tokens)" for c in calibration.corpora)
    bound = "no bound" if policy.max_skips is None else str(policy.max_skips)
    fit = "-" if regions.fit_r2 is None else f"{regions.fit_r2:.4f}"
    rho = "-" if regions.monotonicity is None else f"{regions.monotonicity:.2f}"
    lines = [
        ("model", f"{model.name}, {model.num_layers} layers, {model.dtype}"),
        ("calibrated on", f"{texts}, mode {calibration.mode}{_opening(calibration)}"),
        ("cold_s", f"{policy.cold_s}{_interval(regions.cold_s_interval)}"),
        ("cold_e", f"{policy.cold_e}{_interval(regions.cold_e_interval)}"),
        ("fit", f"R2 {fit}, Spearman's rho of the middle {rho} ({regions.method})"),
        ("threshold", f"{policy.threshold:.6f}"),
        ("max_skips", bound),
        ("warm-up", f"{policy.warm_up_tokens} tokens"),
    ]
    return "\n".join(
        textwrap.fill(f"{name:<14}{value}", WIDTH, subsequent_indent=" " * 14) for name, value in lines
    )


def _opening(calibration: CalibrationInfo) -> str:
    return f", each text begun with {' '.join(calibration.opening)}" if calibration.opening else ""


def _interval(interval: tuple[int, int] | None) -> str:
    return f"   (95 % bootstrap {interval[0]} to {interval[1]})" if interval else ""


def _layers(profile: ProfileData) -> str:
    pooled, policy = profile.layers["pooled"], profile.cosine_policy
    lines = [f"{'layer':>5} {'mean cos':>9} {'std':>7} {'q05':>8} {'q50':>8} {'q95':>8} {'|f|/|h|':>8}"]
    for layer in range(profile.model.num_layers):
        region = "skippable" if policy.cold_s <= layer < policy.cold_e else "cold"
        lines.append(
            f"{layer:>5} {pooled.mean[layer]:>9.4f} {pooled.std[layer]:>7.4f} {pooled.q05[layer]:>8.4f} "
            f"{pooled.q50[layer]:>8.4f} {pooled.q95[layer]:>8.4f} {pooled.norm_ratio_mean[layer]:>8.3f}"
            f"  {region}"
        )
    return "\n".join(lines)


def _points(profile: ProfileData) -> str:
    if not profile.operating_points:
        return "no operating points: no FFN can be skipped within the region"
    lines = [f"{'skip ratio':<12}{'threshold':>10}{'predicted':>11}{'realised':>10}{'held-out':>10}"]
    for point in profile.operating_points:
        mark = "  <- policy" if is_policy(profile, point) else ""
        lines.append(
            f"{point.target_skip_ratio:<12.2f}{point.threshold:>10.6f}{point.predicted_skip_ratio:>11.3f}"
            f"{ratio(point.realised_skip_ratio):>10}{ratio(point.verified_skip_ratio):>10}{mark}"
        )
    how = {"teacher-forced": "calibration text, teacher-forced", "decode": "calibration prompts, decoded"}
    measured = how.get(profile.calibration.closed_loop or "", "not measured")
    unverified = all(point.verified_skip_ratio is None for point in profile.operating_points)
    held_out = "not measured (--verify)" if unverified else "prompts decoded"
    note = f"predicted: on the clean trace; realised: {measured}; held-out: {held_out}"
    lines.append(textwrap.fill(note, WIDTH, break_on_hyphens=False))
    return "\n".join(lines)


def _damage_rule(profile: ProfileData, rule: DamageRule) -> str:
    """What each FFN alone loses, and thresholds of the method that weighs layers by it."""
    losses = ", ".join(f"{loss:.3f}" for loss in rule.excess_nll)
    what = f"skipping one FFN alone loses, by layer, in nats/token over {rule.tokens:,} tokens: {losses}"
    lines = [textwrap.fill(what, WIDTH), f"{DAMAGE}, {rule.policy.max_skips} skips in a row at most:"]
    lines.append(f"{'skip ratio':<12}{'threshold':>10}{'predicted':>11}{'realised':>10}")
    for point in rule.operating_points:
        lines.append(
            f"{point.target_skip_ratio:<12.2f}{point.threshold:>10.6f}{point.predicted_skip_ratio:>11.3f}"
            f"{ratio(point.realised_skip_ratio):>10}{'  <- policy' if is_policy(profile, point) else ''}"
        )
    return "\n".join(lines)


def tuning_table(profile: ProfileData) -> str:
    """What a search measured, the chosen point, and the rules that lose to random skipping."""
    tuning = profile.tuning
    if tuning is None:
        return "this profile was not tuned"
    lines = [f"{'rule':<18}{'warm-up':>8}{'ratio':>7}{'KL':>9}{'95 %':>16}{'ideal x':>9}"]
    for n, point in enumerate(tuning.points):
        mark = "  <- chosen" if n == tuning.chosen else "  front" if point.on_front else ""
        interval = f"{point.kl_low:.4f}-{point.kl_high:.4f}"
        lines.append(
            f"{point.line:<18}{point.warm_up_tokens:>8}{point.skip_ratio_all:>7.3f}{point.kl:>9.4f}"
            f"{interval:>16}{point.ideal_speed_up:>9.3f}{mark}"
        )
    note = "ratio: of all FFNs and decoded tokens; KL: nats per decoded token; ideal x: if time were bytes"
    requests = tuning.config.get("requests", 1)
    note += f", {requests} requests together" if requests > 1 else ""
    lines.append(textwrap.fill(note, WIDTH))
    losers = dict.fromkeys(point.line for point in tuning.points if point.loses_to_random)
    warnings = [_warning(f"{name} diverges more than skipping as many FFNs at random") for name in losers]
    return printable("\n\n".join(["\n".join(lines), *warnings]))


def _static(policy: StaticSettings) -> str:
    """The fixed set of FFNs that is the policy."""
    layers = f"layers {ranges(policy.layers)}"
    stead = {
        False: "nothing stands in for them",
        True: "surrogates of the gate stand in for them",
        "fitted": "surrogates that were fitted to the set stand in for them",
    }[policy.surrogates]
    return textwrap.fill(
        f"{'static':<14}the policy: the FFNs of {layers} are skipped, {stead}; warm-up "
        f"{policy.warm_up_tokens} tokens",
        WIDTH,
        subsequent_indent=" " * 14,
    )


def _fixed_sets(profile: ProfileData) -> str:
    """What each fitted set skips and loses, and how they were made."""
    fixed = profile.fixed_sets
    assert fixed is not None
    fit = fixed.fit
    texts = ", ".join(c.name for c in fit.corpora)
    facts = [
        ("fitted sets", f"on {fit.tokens:,} tokens of {texts}; warm-up {fixed.warm_up_tokens} tokens"),
        ("surrogates", _surrogates(fit)),
        ("tensors", fixed.tensors),
    ]
    lines = [
        textwrap.fill(f"{name:<14}{value}", WIDTH, subsequent_indent=" " * 14, break_on_hyphens=False)
        for name, value in facts
    ]
    lines.append(f"\n{'skip ratio':<12}{'realised':>9}{'loss':>8}  layers")
    for each in fixed.sets:
        realised = len(each.layers) / profile.model.num_layers
        row = (
            f"{each.target_skip_ratio:<12.2f}{realised:>9.3f}{each.excess_nll:>+8.3f}  {ranges(each.layers)}"
        )
        lines.append(textwrap.fill(row, WIDTH, subsequent_indent=" " * 31))
    note = "loss: nats per token over the full model, on text that was not fitted on, teacher-forced"
    lines.append(textwrap.fill(note, WIDTH, break_on_hyphens=False))
    return "\n".join(lines)


def _surrogates(fit: Fit) -> str:
    """How large they are, and what a token reads of them."""
    share = f"{100 * fit.surrogate_share:.1f} % of their FFN's bytes"
    if fit.maps == 1:
        return f"rank {fit.rank}, {share}"
    return f"rank {fit.rank}, {fit.maps} maps each; a token reads one, {share}"


def _gate(profile: ProfileData) -> str:
    """What was fitted, on what, and how well."""
    gate = profile.gate
    assert gate is not None
    fit = gate.fit
    rule = "the policy's rule" if isinstance(profile.policy, GateSettings) else "fitted, not the policy"
    texts = ", ".join(c.name for c in fit.corpora)
    skipped = ", ".join(f"{share:.3f}" for share in fit.sweeps)
    damage = {"fisher": "Fisher metric", "relative-error": "relative error, weighed by layer"}[fit.damage]
    lines = [
        ("gate", f"{rule}, in {len(gate.layers)} layers: {ranges(gate.layers)}"),
        ("fitted on", f"{fit.tokens:,} tokens of {texts}"),
        ("sweeps", f"{len(fit.sweeps)}, skipping {skipped}"),
        ("surrogates", _surrogates(fit)),
        ("error", f"{span(fit.surrogate_error)} of the variance of f is left"),
        ("damage", f"by {damage}; R2 of the gates {span(fit.gate_r_squared)}"),
        ("warm-up", f"{gate.warm_up_tokens} tokens"),
        ("tensors", gate.tensors),
    ]
    return "\n".join(
        textwrap.fill(f"{name:<14}{value}", WIDTH, subsequent_indent=" " * 14, break_on_hyphens=False)
        for name, value in lines
    )


def _gate_points(profile: ProfileData) -> str:
    gate = profile.gate
    assert gate is not None
    corpora = list(gate.operating_points[0].by_corpus) if gate.operating_points else []
    names = "".join(f"{name[:9]:>10}" for name in corpora[:3])
    lines = [f"{'skip ratio':<12}{'threshold':>10}{'predicted':>11}{'realised':>10}{names}"]
    for point in gate.operating_points:
        each = "".join(f"{ratio(point.by_corpus.get(name)):>10}" for name in corpora[:3])
        mark = "  <- policy" if is_policy(profile, point) else ""
        lines.append(
            f"{point.target_skip_ratio:<12.2f}{point.threshold:>10.3f}{point.predicted_skip_ratio:>11.3f}"
            f"{ratio(point.realised_skip_ratio):>10}{each}{mark}"
        )
    note = "predicted: in the last sweep; realised: on text that was not fitted on, teacher-forced"
    lines.append(textwrap.fill(note, WIDTH, break_on_hyphens=False))
    return "\n".join(lines)


def is_policy(profile: ProfileData, point: OperatingPoint | GatePoint) -> bool:
    """Whether the profile's policy is of the point's rule and has its threshold."""
    own = any(point is one for one in profile.points_of_policy)
    return own and getattr(profile.policy, "threshold", None) == point.threshold


def ranges(layers: list[int]) -> str:
    """Layers in words: `1 to 3, 5, 7 to 9`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"


def span(values: list[float]) -> str:
    """The least and the largest of some values."""
    return f"{min(values):.2f} to {max(values):.2f}" if values else "-"


def ratio(value: float | None) -> str:
    """A skip ratio, or a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"


def _warning(text: str) -> str:
    return textwrap.fill(f"warning: {text}", WIDTH, subsequent_indent="  ")
