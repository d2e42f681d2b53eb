"""Profiles of one model side by side: regions, fit, thresholds, and how far their curves lie apart."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from skipcal.errors import ProfileMismatch, TargetOutOfReach
from skipcal.profiles.schema import SkipProfile

logger = logging.getLogger(__name__)


def compare_profiles(profiles: Mapping[str, SkipProfile], target_skip_ratio: float) -> pd.DataFrame:
    """One row per profile: its text, regions with intervals, fit, and threshold for the target.

    Columns: profile, corpora, tokens, cold_s, cold_s_low, cold_s_high, cold_e, cold_e_low,
    cold_e_high, fit_r2, monotonicity, threshold, realised_skip_ratio (on the profile's own text, at
    its operating point for the target). What a profile does not have is missing.
    Raises ProfileMismatch when the profiles are not of one model.
    """
    _check_one_model(profiles)
    return pd.DataFrame([_summary_row(n, p, target_skip_ratio) for n, p in profiles.items()])


def curve_distances(profiles: Mapping[str, SkipProfile]) -> pd.DataFrame:
    """One row per pair of profiles: how far apart their curves of mean cosines lie.

    Columns: first, second, max_difference (largest absolute one), at_layer, spearman (of the two
    curves over all layers).
    """
    rows = []
    for (first, one), (second, other) in combinations(profiles.items(), 2):
        a, b = (np.array(profile.layers["pooled"].mean) for profile in (one, other))
        gap = np.abs(a - b)
        varied = np.ptp(a) > 0 and np.ptp(b) > 0
        rows.append(
            {
                "first": first,
                "second": second,
                "max_difference": float(gap.max()),
                "at_layer": int(gap.argmax()),
                "spearman": float(spearmanr(a, b).statistic) if varied else math.nan,
            }
        )
    return pd.DataFrame(rows, columns=["first", "second", "max_difference", "at_layer", "spearman"])


def _summary_row(name: str, profile: SkipProfile, target: float) -> dict[str, Any]:
    regions, policy = profile.regions, profile.cosine_policy
    low_s, high_s = regions.cold_s_interval or (math.nan, math.nan)
    low_e, high_e = regions.cold_e_interval or (math.nan, math.nan)
    threshold = realised = None
    try:
        threshold = profile.cosine_policy_for(target).threshold
    except TargetOutOfReach:
        logger.warning("profile %r has no operating point for a skip ratio of %g", name, target)
    for point in profile.operating_points:
        if math.isclose(point.target_skip_ratio, target, abs_tol=1e-9):
            realised = point.realised_skip_ratio
    return {
        "profile": name,
        "corpora": ", ".join(corpus.name for corpus in profile.calibration.corpora),
        "tokens": sum(corpus.tokens for corpus in profile.calibration.corpora),
        "cold_s": policy.cold_s,
        "cold_s_low": low_s,
        "cold_s_high": high_s,
        "cold_e": policy.cold_e,
        "cold_e_low": low_e,
        "cold_e_high": high_e,
        "fit_r2": math.nan if regions.fit_r2 is None else regions.fit_r2,
        "monotonicity": math.nan if regions.monotonicity is None else regions.monotonicity,
        "threshold": math.nan if threshold is None else threshold,
        "realised_skip_ratio": math.nan if realised is None else realised,
    }


def _check_one_model(profiles: Mapping[str, SkipProfile]) -> None:
    """The same shape, and the same name or the same weights."""
    (first, reference), *others = ((name, profile.model) for name, profile in profiles.items())
    for name, model in others:
        shapes = [(m.model_type, m.num_layers, m.hidden_size) for m in (reference, model)]
        alike = model.fingerprint == reference.fingerprint
        if shapes[0] != shapes[1] or (model.name != reference.name and not alike):
            raise ProfileMismatch(
                f"profile {first!r} is of {reference.name} ({reference.num_layers} layers), {name!r} of "
                f"{model.name} ({model.num_layers} layers); compare profiles of one model"
            )
        if not alike and model.dtype == reference.dtype:
            logger.warning("profiles %r and %r are of different weights of %s", first, name, model.name)
