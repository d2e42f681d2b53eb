"""What a report says in words and tables; numbers are rounded here, charts have them whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from skipcal.core.policy import SkipPolicy
from skipcal.evaluation.token_map import TokenMap
from skipcal.files.reading import printable
from skipcal.plots.tokens import label
from skipcal.profiles.parts import CorpusInfo, GatePoint, GateSettings, OperatingPoint, StaticSettings
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.summary import is_policy, ranges, ratio, span

Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Cells as they are shown. name: of the element; marked: the row that the policy is at."""

    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: int | None = None


def headline(profile: SkipProfile) -> str:
    """What was measured, in one sentence."""
    how = profile.calibration
    tokens = sum(corpus.tokens for corpus in how.corpora)
    texts = ", ".join(corpus.name for corpus in how.corpora) or "no named text"
    what = "generated tokens" if how.mode == "generate" else "tokens of text"
    return f"{profile.model.num_layers} FFN blocks, measured over {tokens:,} {what} ({texts})"


def key_facts(profile: SkipProfile) -> Facts:
    """What a reader wants first: the policy, what it skips, where, and how sure that is."""
    regions, cosine = profile.regions, profile.cosine_policy
    facts = [("policy", policy_words(profile)), ("skips", _skips(profile))]
    facts.append(("warm-up", f"{profile.policy.warm_up_tokens} tokens by the full model"))
    facts.append(("skippable by the rule cosine", _region(profile)))
    intervals = [
        f"{name} {interval[0]} to {interval[1]}"
        for name, interval in (("cold_s", regions.cold_s_interval), ("cold_e", regions.cold_e_interval))
        if interval is not None
    ]
    facts.append(("95 % bootstrap", ", ".join(intervals) or "not measured"))
    fit = "-" if regions.fit_r2 is None else f"{regions.fit_r2:.4f}"
    rho = "-" if regions.monotonicity is None else f"{regions.monotonicity:.2f}"
    facts.append(("fit of the curve", f"R² {fit}, Spearman's rho of the middle {rho} ({regions.method})"))
    if profile.policy is not cosine:
        facts.append(("the paper's rule", f"cosine, threshold {cosine.threshold:.6f}, not the policy"))
    return facts


def policy_words(profile: SkipProfile) -> str:
    """The rule and what decides."""
    policy, gate = profile.policy, profile.gate
    if isinstance(policy, GateSettings):
        count = len(gate.layers) if gate is not None else 0
        return f"rule gate in {count} layers, predicted log damage below {policy.threshold:.3f}"
    if isinstance(policy, StaticSettings):
        stead = {False: "without surrogates", True: "with the gate's surrogates", "fitted": "with surrogates"}
        return f"fixed set: layers {ranges(policy.layers)}, {stead[policy.surrogates]}"
    if policy.method == "full":
        return "the full model: nothing is skipped"
    if policy.tolerances is not None:
        bound = "" if policy.max_skips is None else f", at most {policy.max_skips} FFNs in a row"
        return f"rule cosine, threshold {policy.threshold:.6f}, layers weighed by damage{bound}"
    bound = "" if policy.max_skips is None else f", at most {policy.max_skips} FFNs a token"
    return f"rule cosine, threshold {policy.threshold:.6f}{bound}"


def _skips(profile: SkipProfile) -> str:
    """The realised ratio of the point that the policy is at."""
    if isinstance(profile.policy, SkipPolicy) and profile.policy.method == "full":
        return "nothing"
    for point in profile.points_of_policy:
        if is_policy(profile, point):
            found = point.realised_skip_ratio
            told = (
                f"{found:.3f} realised"
                if found is not None
                else f"{point.predicted_skip_ratio:.3f} predicted"
            )
            return f"{told}, of all FFN blocks after the warm-up"
    if profile.tuning is not None:
        chosen = profile.tuning.points[profile.tuning.chosen]
        return f"{chosen.skip_ratio:.3f} in the search, of all FFN blocks after the warm-up"
    return "at no operating point of this profile"


def _region(profile: SkipProfile) -> str:
    policy = profile.cosine_policy
    if policy.cold_s == policy.cold_e:
        return "none: every FFN always runs"
    return f"layers {policy.cold_s} to {policy.cold_e - 1} of 0 to {profile.model.num_layers - 1}"


def point_table(profile: SkipProfile) -> Table:
    """The operating points of the rule cosine."""
    points = profile.operating_points
    rows = [
        (
            f"{point.target_skip_ratio:g}",
            f"{point.threshold:.6f}",
            ratio(point.predicted_skip_ratio),
            ratio(point.realised_skip_ratio),
            ratio(point.verified_skip_ratio),
        )
        for point in points
    ]
    return Table(
        "points", ("target", "threshold", "predicted", "realised", "held-out"), rows, _at(profile, points)
    )


def gate_point_table(profile: SkipProfile) -> Table:
    """The operating points of the rule gate."""
    points = profile.gate.operating_points if profile.gate is not None else []
    corpora = list(points[0].by_corpus) if points else []
    rows = [
        (
            f"{point.target_skip_ratio:g}",
            f"{point.threshold:.3f}",
            ratio(point.predicted_skip_ratio),
            ratio(point.realised_skip_ratio),
            *(ratio(point.by_corpus.get(name)) for name in corpora),
        )
        for point in points
    ]
    return Table(
        "gate-points", ("target", "threshold", "predicted", "realised", *corpora), rows, _at(profile, points)
    )


def _at(profile: SkipProfile, points: Sequence[OperatingPoint | GatePoint]) -> int | None:
    return next((n for n, point in enumerate(points) if is_policy(profile, point)), None)


def gate_facts(profile: SkipProfile) -> Facts:
    """How gate and surrogates were made, and how good they are on the text they were fitted on."""
    gate = profile.gate
    if gate is None:
        return []
    fit = gate.fit
    damage = {"fisher": "Fisher metric", "relative-error": "relative error, weighed by layer"}[fit.damage]
    return [
        ("candidates", f"{len(gate.layers)} layers: {ranges(gate.layers)}"),
        ("fitted on", f"{fit.tokens:,} tokens of {', '.join(c.name for c in fit.corpora)}"),
        ("sweeps", f"{len(fit.sweeps)}, skipping {', '.join(f'{share:.3f}' for share in fit.sweeps)}"),
        ("surrogates", f"rank {fit.rank}, {fit.surrogate_share:.3f} of their FFN's bytes"),
        ("variance of f left", span(fit.surrogate_error)),
        ("damage", f"{damage}; R² of the gates {span(fit.gate_r_squared)}"),
        ("warm-up fitted for", f"{gate.warm_up_tokens} tokens"),
        ("tensors", f"{gate.tensors}, sha256 {gate.sha256}"),
    ]


def fixed_sets_facts(profile: SkipProfile) -> Facts:
    """How the fitted sets and their surrogates were made."""
    fixed = profile.fixed_sets
    if fixed is None:
        return []
    fit = fixed.fit
    return [
        ("fitted on", f"{fit.tokens:,} tokens of {', '.join(c.name for c in fit.corpora)}"),
        ("surrogates", f"rank {fit.rank}, {fit.surrogate_share:.3f} of their FFN's bytes"),
        ("warm-up fitted for", f"{fixed.warm_up_tokens} tokens"),
        ("tensors", f"{fixed.tensors}, sha256 {fixed.sha256}"),
    ]


def fixed_sets_table(profile: SkipProfile) -> Table:
    """Each fitted set, with what it lost on text that was not fitted on."""
    fixed = profile.fixed_sets
    corpora = [] if fixed is None else list(fixed.sets[0].by_corpus)
    head = ("skip ratio", "realised", "loss", *corpora, "layers")
    rows = [
        (
            f"{each.target_skip_ratio:.2f}",
            f"{len(each.layers) / profile.model.num_layers:.3f}",
            f"{each.excess_nll:+.3f}",
            *(f"{each.by_corpus[name]:+.3f}" for name in corpora),
            ranges(each.layers),
        )
        for each in ([] if fixed is None else fixed.sets)
    ]
    return Table("fixed-sets", head, rows)


def tuning_table(profile: SkipProfile) -> Table:
    """All that a search measured."""
    head = (
        "rule",
        "warm-up",
        "skip ratio",
        "of all tokens",
        "KL",
        "95 %",
        "excess NLL",
        "ideal speed-up",
        "",
    )
    if profile.tuning is None:
        return Table("tuning", head, ())
    rows = [
        (
            point.line,
            str(point.warm_up_tokens),
            f"{point.skip_ratio:.3f}",
            f"{point.skip_ratio_all:.3f}",
            f"{point.kl:.4f}",
            f"{point.kl_low:.4f} to {point.kl_high:.4f}",
            f"{point.excess_nll:.4f}",
            f"{point.ideal_speed_up:.3f}",
            "front" if point.on_front else "loses to random" if point.loses_to_random else "",
        )
        for point in profile.tuning.points
    ]
    return Table("tuning", head, rows, profile.tuning.chosen)


def budget_words(profile: SkipProfile) -> str:
    """What the search was allowed."""
    if profile.tuning is None:
        return ""
    budget = profile.tuning.budget
    named = {
        "KL": budget.max_kl,
        "perplexity increase": budget.max_perplexity_increase,
        "speed-up by bytes": budget.min_speedup,
    }
    return ", ".join(f"{name} {value:g}" for name, value in named.items() if value is not None) or "none"


def layer_table(profile: SkipProfile) -> Table:
    """Statistics by layer, over all corpora."""
    pooled, policy = profile.layers["pooled"], profile.cosine_policy
    influence = pooled.block_influence
    columns = {
        "mean": pooled.mean, "std": pooled.std, "min": pooled.min, "q05": pooled.q05, "q25": pooled.q25,
        "q50": pooled.q50, "q75": pooled.q75, "q95": pooled.q95, "‖f‖/‖h‖": pooled.norm_ratio_mean,
        **({"block influence": influence} if influence is not None else {}),
    }  # fmt: skip
    rows = [
        (
            str(layer),
            *(f"{values[layer]:.4f}" for values in columns.values()),
            "skippable" if policy.cold_s <= layer < policy.cold_e else "cold",
        )
        for layer in range(profile.model.num_layers)
    ]
    return Table("layers", ("layer", *columns, "region"), rows)


def token_table(tokens: TokenMap) -> Table:
    """What each token skipped, for those who cannot point at a cell."""
    counts = tokens.skipped.sum(axis=1)
    rows = []
    for number, (piece, part) in enumerate(zip(tokens.pieces, tokens.parts, strict=True)):
        layers = [int(layer) for layer in np.flatnonzero(tokens.skipped[number])]
        rows.append((str(number), label(piece), part, str(counts[number]), ranges(layers) if layers else "-"))
    return Table("tokens", ("token", "text", "part", "FFNs skipped", "layers"), rows)


def token_facts(tokens: TokenMap) -> Facts:
    """What the map is of."""
    after = tokens.report.decode_steps_after_warm_up
    return [
        ("method", tokens.report.method),
        ("skip ratio", f"{tokens.skip_ratio:.3f} over {after} tokens after the warm-up" if after else "-"),
        ("tokens", f"{len(tokens.ids)}: prompt {tokens.prompt_tokens}, warm-up {tokens.warm_up_tokens}"),
    ]


def corpus_table(name: str, corpora: Iterable[CorpusInfo], unit: str) -> Table:
    """Where the text came from, and how much of it was used."""
    head = ("corpus", "source", "version", "documents", "passed over", unit, "tokens")
    rows = [
        (
            corpus.name,
            corpus.place,
            " ".join(
                filter(
                    None,
                    [
                        f"revision {corpus.revision}" if corpus.revision else None,
                        f"sha256 {corpus.sha256}" if corpus.sha256 else None,
                    ],
                )
            )
            or "-",
            f"{corpus.documents:,}",
            f"{corpus.short_documents:,}",
            f"{corpus.prompts:,}",
            f"{corpus.tokens:,}",
        )
        for corpus in corpora
    ]
    return Table(name, head, rows)


def provenance(profile: SkipProfile) -> Facts:
    """Which model, how it was measured, and what made the file."""
    model, how, made = profile.model, profile.calibration, profile.environment
    lengths = (
        f"prompts of {how.prompt_tokens} tokens, up to {how.new_tokens} generated after each"
        if how.mode == "generate"
        else f"windows of {how.prompt_tokens} tokens"
    )
    facts = [
        ("model", model.name),
        ("revision", model.revision or "-"),
        ("type", f"{model.model_type}, {model.num_layers} layers of width {model.hidden_size}"),
        ("FFN width", "-" if model.intermediate_size is None else str(model.intermediate_size)),
        ("dtype", model.dtype + (f", quantization {model.quantization}" if model.quantization else "")),
        ("adapter", model.adapter or "-"),
        ("code of its own", "trusted" if model.trust_remote_code else "none"),
        ("weights fingerprint", model.fingerprint),
        ("calibration", f"mode {how.mode}: {lengths}"),
        ("chat template", "yes" if how.chat_template else "no"),
        (
            "texts begin with",
            "not recorded" if how.opening is None else " ".join(how.opening) or "no special token",
        ),
        ("closed loop", how.closed_loop or "not run"),
        ("seed", str(how.seed)),
        (
            "made with",
            f"skipcal {made.skipcal}, Python {made.python}, torch {made.torch}, "
            f"transformers {made.transformers}",
        ),
        ("on", made.device),
        ("at", made.created_at),
    ]
    if made.seconds is not None:
        facts.append(("took", f"{made.seconds:.0f} s"))
    if made.processes is not None:
        facts.append(("processes", str(made.processes)))
    return facts


def configuration(config: dict[str, Any]) -> str:
    """The resolved configuration as JSON."""
    return printable(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False))
