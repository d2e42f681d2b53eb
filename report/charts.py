"""The numbers behind a report's charts, as plain values that its script reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from skipcal.evaluation.token_map import TokenMap
from skipcal.plots.tokens import label, region_edges, scale_start
from skipcal.profiles.parts import HISTOGRAM_BINS, GatePoint, OperatingPoint
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.summary import is_policy

POOLED = "pooled"
_CURVE = ("count", "mean", "std", "min", "q05", "q25", "q50", "q75", "q95", "norm_ratio_mean")


def chart_data(profile: SkipProfile, tokens: TokenMap | None) -> dict[str, Any]:
    """Everything that is drawn; None where a profile has nothing of the kind."""
    policy = profile.cosine_policy
    return {
        "layers": profile.model.num_layers,
        "corpora": corpora(profile),
        "region": {"cold_s": policy.cold_s, "cold_e": policy.cold_e},
        "threshold": policy.threshold if policy.threshold <= 1 else None,
        "bins": HISTOGRAM_BINS,
        "influence": profile.layers[POOLED].block_influence,
        "norm": profile.layers[POOLED].norm_ratio_mean,
        "points": _points(profile),
        "gatePoints": _gate_points(profile),
        "gate": _gate(profile),
        "tuning": _tuning(profile),
        "tokens": None if tokens is None else _tokens(tokens),
    }


def corpora(profile: SkipProfile) -> list[dict[str, Any]]:
    """Statistics by corpus, in the order of calibration; all together come last and are hidden at first.

    A single corpus is the same as all together.
    """
    order = [corpus.name for corpus in profile.calibration.corpora if corpus.name in profile.layers]
    order += [name for name in profile.layers if name not in order and name != POOLED]
    names = order if len(order) == 1 else [*order, POOLED]
    found = []
    for name in names:
        statistics = profile.layers[name]
        found.append(
            {
                "name": name,
                "shown": name != POOLED or len(names) == 1,
                "histogram": statistics.histogram,
                **{key: getattr(statistics, key) for key in _CURVE},
            }
        )
    return found


def _points(profile: SkipProfile) -> dict[str, Any] | None:
    points = profile.operating_points
    return _ratios(
        profile,
        points,
        {
            "predicted": [point.predicted_skip_ratio for point in points],
            "realised": [point.realised_skip_ratio for point in points],
            "held-out": [point.verified_skip_ratio for point in points],
        },
    )


def _gate_points(profile: SkipProfile) -> dict[str, Any] | None:
    points = profile.gate.operating_points if profile.gate is not None else []
    names = points[0].by_corpus if points else {}
    return _ratios(
        profile,
        points,
        {
            "predicted": [point.predicted_skip_ratio for point in points],
            "realised": [point.realised_skip_ratio for point in points],
            **{f"on {name}": [point.by_corpus.get(name) for point in points] for name in names},
        },
    )


def _ratios(
    profile: SkipProfile,
    points: Sequence[OperatingPoint | GatePoint],
    lines: Mapping[str, Sequence[float | None]],
) -> dict[str, Any] | None:
    """Lines over the targets of operating points; what was not measured at any is no line."""
    if not points:
        return None
    return {
        "target": [point.target_skip_ratio for point in points],
        "threshold": [point.threshold for point in points],
        "policy": [is_policy(profile, point) for point in points],
        "lines": [
            {"name": name, "ratio": values}
            for name, values in lines.items()
            if any(value is not None for value in values)
        ],
    }


def _gate(profile: SkipProfile) -> dict[str, Any] | None:
    if profile.gate is None:
        return None
    fit = profile.gate.fit
    return {"layers": profile.gate.layers, "r2": fit.gate_r_squared, "error": fit.surrogate_error}


def _tuning(profile: SkipProfile) -> dict[str, Any] | None:
    if profile.tuning is None:
        return None
    return {
        "points": [point.model_dump() for point in profile.tuning.points],
        "chosen": profile.tuning.chosen,
        "maxKl": profile.tuning.budget.max_kl,
    }


def _tokens(tokens: TokenMap) -> dict[str, Any]:
    """The heat map: rows are layers, columns tokens."""
    return {
        "labels": [label(piece) for piece in tokens.pieces],
        "parts": tokens.parts,
        "cosine": tokens.cosine.T.astype(float).tolist(),
        "skipped": tokens.skipped.T.astype(int).tolist(),
        "edges": region_edges(tokens.layers),
        "from": scale_start(tokens),
    }
