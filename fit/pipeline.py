"""From a profile to a profile with a gate: text, damage, sweeps, closed loop, top to bottom."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from tqdm.auto import tqdm

from skipcal.arch.loading import LoadedModel
from skipcal.calibrate.closed_loop import RealisedCurve
from skipcal.calibrate.passes import teacher_forced_ratio
from skipcal.configs.fit import FitConfig
from skipcal.core.gate import NEVER, GatePolicy
from skipcal.fit.on_policy import Fitted, Sweep
from skipcal.fit.prepared import TARGETS as TARGETS
from skipcal.fit.prepared import Prepared
from skipcal.profiles.parts import GateFit, GateInfo, GatePoint, GateSettings, tensors_file
from skipcal.profiles.policies import threshold_for
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.sources import model_slug
from skipcal.profiles.tensors import GateTensors


def fit_gate_profile(
    loaded: LoadedModel, profile: SkipProfile, config: FitConfig | None = None
) -> SkipProfile:
    """Fit surrogates and gates to a loaded model; the profile's policy becomes the gate's.

    Progress bars go to stderr when it is a terminal. Raises as `Prepared.of` does.
    """
    config = config or FitConfig()
    started = time.perf_counter()
    prepared = Prepared.of(loaded, profile, config)
    fitted, ratios = _sweeps(prepared)
    tensors = GateTensors.pack(fitted.gates, fitted.surrogates, profile.model.fingerprint)
    warm_up = profile.policy.warm_up_tokens
    points = _operating_points(prepared, fitted, tensors)
    threshold = threshold_for(points, config.target_skip_ratio, never=NEVER)
    name = tensors_file(Path(config.output or f"{model_slug(profile.model.name)}.json"))
    gate = GateInfo(
        tensors=name,
        sha256=tensors.sha256,
        layers=list(fitted.gates.layers),
        warm_up_tokens=warm_up,
        operating_points=points,
        fit=GateFit(
            **prepared.record([tensors.surrogates], time.perf_counter() - started),
            sweeps=ratios,
            gate_r_squared=list(fitted.r_squared),
            surrogate_error=list(fitted.surrogate_error),
        ),
    )
    policy = GateSettings(threshold=threshold, warm_up_tokens=warm_up, tensors=name, sha256=tensors.sha256)
    return profile.with_gate(gate, policy, tensors)


def _sweeps(prepared: Prepared) -> tuple[Fitted, list[float]]:
    """A sweep on the clean stream, then those on policy; the last one's fit and all skip ratios.

    Half of the windows are enough to say which tokens will skip, so only the last sweep is over all of them.
    """
    config, rows = prepared.config, prepared.rows
    damage = prepared.damage()
    fitted = Sweep.of(prepared, rows[::2], damage).fit()
    ratios = [fitted.skip_ratio]
    share = config.target_skip_ratio * prepared.architecture.num_layers / len(prepared.layers)
    for left in reversed(range(config.sweeps)):
        threshold = fitted.scores.threshold(share)
        some = rows[::2] if left else rows
        fitted = Sweep.of(prepared, some, damage).fit(fitted.gates, threshold)
        ratios.append(fitted.skip_ratio)
    return fitted, ratios


def _operating_points(prepared: Prepared, fitted: Fitted, tensors: GateTensors) -> list[GatePoint]:
    """Thresholds for TARGETS and the ratio fitted for, by what windows not fitted on realise."""
    candidates = len(prepared.layers) / prepared.architecture.num_layers
    targets = {ratio for ratio in TARGETS if ratio <= candidates}
    policy = GatePolicy(
        gates=tensors.gates,
        surrogates=tensors.surrogates,
        threshold=NEVER,
        warm_up_tokens=prepared.profile.policy.warm_up_tokens,
    )
    by_corpus: dict[float, dict[str, float]] = {}
    ratio = partial(
        teacher_forced_ratio,
        prepared.loaded.model,
        prepared.architecture,
        batch_size=prepared.config.batch_size,
        prompt_tokens=prepared.given,
    )

    def measure(threshold: float) -> float:
        tried = replace(policy, threshold=threshold)
        by_corpus[threshold] = {s.corpus.name: ratio(tried, s.held_out) for s in prepared.samples}
        return fmean(by_corpus[threshold].values())  # of as many windows each

    curve = RealisedCurve(
        largest=candidates,
        threshold_at=lambda ratio: fitted.scores.threshold(ratio / candidates),
        predicted_at=lambda threshold: candidates * fitted.scores.share_below(threshold),
        measure=measure,
    )
    points = []
    wanted = sorted(targets | {prepared.config.target_skip_ratio})
    for target in tqdm(wanted, desc="close the loop", unit="point", leave=False, disable=None):
        threshold, realised = curve.threshold(target)
        points.append(
            GatePoint(
                target_skip_ratio=target,
                threshold=threshold,
                predicted_skip_ratio=curve.predicted_at(threshold),
                realised_skip_ratio=realised,
                by_corpus=by_corpus[threshold],
            )
        )
    return points
