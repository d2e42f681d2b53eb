"""From a model and a configuration to a profile: the whole calibration, top to bottom."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import numpy as np
from tqdm.auto import tqdm

from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import Architecture, locate
from skipcal.calibrate.chat import sample_prompts
from skipcal.calibrate.corpora import CorpusSample, resolve_corpora
from skipcal.calibrate.passes import ENDED_EARLY, Passes
from skipcal.calibrate.provenance import corpus_info, environment, model_info
from skipcal.calibrate.recommend import (
    check_reachable,
    cosine_curve,
    predicted_skip_ratio,
    predicted_threshold,
    target_ratios,
)
from skipcal.calibrate.regions import check_region, find_regions
from skipcal.calibrate.saturation import Trace, pooled_statistics
from skipcal.configs.run import ProfileConfig
from skipcal.errors import ConfigError, Unavailable
from skipcal.profiles.parts import CalibrationInfo, OperatingPoint, Regions
from skipcal.profiles.schema import PROFILE_FORMAT, SkipProfile, threshold_for
from skipcal.runtime.policy import FULL_MODEL_THRESHOLD, SkipPolicy

logger = logging.getLogger(__name__)

DEFAULT_TARGET_SKIP_RATIO = 0.25  # the paper's 25-30 %
MISSED = 0.02  # a realised skip ratio this far from its target is worth a warning


@dataclass(frozen=True)
class Calibration:
    """A profile and the traces it was made from, one per corpus."""

    profile: SkipProfile
    traces: list[Trace]


def calibrate_model(loaded: LoadedModel, config: ProfileConfig | None = None) -> Calibration:
    """Profile a loaded model. Progress bars go to stderr when it is a terminal.

    Raises Unavailable when text is missing or too short, TargetOutOfReach for an explicit
    `target_skip_ratio` beyond the region, UnsupportedModel when no FFN blocks are located.
    """
    config = config or ProfileConfig()
    architecture = locate(loaded.model)
    run = _Calibrator(loaded, architecture, config)
    run.check()
    samples = run.samples()
    rows = [run.rows(sample) for sample in samples]
    traces = [run.trace(sample, text) for sample, text in zip(samples, rows, strict=True)]
    regions = run.regions(traces)
    policy, points = run.recommend(regions, traces, rows)
    if config.verify:
        points = run.verify(policy, points, samples)
    profile = SkipProfile(
        format=PROFILE_FORMAT,
        model=model_info(loaded, architecture, trust_remote_code=config.trust_remote_code),
        calibration=CalibrationInfo(
            mode=config.mode,
            corpora=[corpus_info(s, t) for s, t in zip(samples, traces, strict=True)],
            prompt_tokens=config.prompt_tokens,
            new_tokens=config.new_tokens if config.mode == "generate" else 0,
            seed=config.seed,
            chat_template=config.chat_template,
            closed_loop=config.closed_loop if config.closed_loop_prompts else None,
        ),
        layers={"pooled": pooled_statistics(traces), **{t.corpus: t.statistics() for t in traces}},
        regions=regions,
        policy=policy,
        operating_points=points,
        environment=environment(architecture),
        config=config.recorded(),
    )
    return Calibration(profile=profile, traces=traces)


class _Calibrator:
    """The steps of one calibration; what they share is the model and the configuration."""

    def __init__(self, loaded: LoadedModel, architecture: Architecture, config: ProfileConfig) -> None:
        self._loaded = loaded
        self._architecture = architecture
        self._config = config
        self._passes = Passes(loaded, architecture, config)

    def check(self) -> None:
        """Refuse what can be refused before any text is read."""
        config, layers = self._config, self._architecture.num_layers
        given = self._given_region()
        if given is not None:
            check_region(*given, layers)
        if config.target_skip_ratio is not None:  # the widest region there can be, if none is given
            cold_s, cold_e = given or (1, layers - 1)
            policy = SkipPolicy(cold_s=cold_s, cold_e=cold_e, threshold=1.0, max_skips=config.max_skips)
            check_reachable(policy, config.target_skip_ratio, layers)
        context = getattr(self._loaded.model.config.get_text_config(), "max_position_embeddings", None)
        length = config.prompt_tokens + (config.new_tokens if config.mode == "generate" else 0)
        if context and length > context:
            raise ConfigError(
                f"{length} tokens a row do not fit the model's context of {context}; lower "
                "--prompt-tokens or --new-tokens"
            )

    def _given_region(self) -> tuple[int, int] | None:
        config = self._config
        if config.cold_s is None or config.cold_e is None:
            return None
        return config.cold_s, config.cold_e

    def samples(self) -> list[CorpusSample]:
        config = self._config
        corpora = resolve_corpora(config.corpora(), config.data_files, text_column=config.text_column)
        return [
            sample_prompts(
                corpus,
                self._loaded.tokenizer,
                chat_template=config.chat_template,
                prompts=config.prompts,
                prompt_tokens=config.prompt_tokens,
                seed=config.seed,
                held_out=config.verify_prompts if config.verify else 0,
            )
            for corpus in corpora
        ]

    def rows(self, sample: CorpusSample) -> list[list[int]]:
        """Prompts with the full model's greedy continuations; in mode prefill the windows alone."""
        if self._config.mode == "prefill":
            return sample.prompts
        return self._passes.continued(sample.prompts, f"generate {sample.corpus.name}")

    def trace(self, sample: CorpusSample, rows: list[list[int]]) -> Trace:
        return self._passes.trace(sample.corpus.name, rows)

    def regions(self, traces: list[Trace]) -> Regions:
        config = self._config
        curve = np.average(
            [trace.cosine.mean(axis=0, dtype=np.float64) for trace in traces],
            axis=0,
            weights=[len(trace.cosine) for trace in traces],
        )
        per_prompt = [trace.prompt_sums() for trace in traces]
        return find_regions(
            curve,
            np.concatenate([sums for sums, _ in per_prompt]),
            np.concatenate([counts for _, counts in per_prompt]),
            seed=config.seed,
            given=self._given_region(),
        )

    def recommend(
        self, regions: Regions, traces: list[Trace], texts: list[list[list[int]]]
    ) -> tuple[SkipPolicy, list[OperatingPoint]]:
        """Operating points for all target ratios, and the policy of the one asked for."""
        config = self._config
        base = SkipPolicy(
            cold_s=regions.cold_s,
            cold_e=regions.cold_e,
            threshold=FULL_MODEL_THRESHOLD,
            warm_up_tokens=config.warm_up_tokens,
            max_skips=config.max_skips,
        )
        layers = self._architecture.num_layers
        if config.target_skip_ratio is not None:
            check_reachable(base, config.target_skip_ratio, layers)
        cosine = np.concatenate([trace.after_warm_up(config.warm_up_tokens) for trace in traces])
        if not len(cosine):
            raise Unavailable(ENDED_EARLY)
        targets = target_ratios(base, layers)
        wanted = config.target_skip_ratio
        if wanted is not None and wanted > 0 and not any(math.isclose(wanted, t) for t in targets):
            targets = sorted([*targets, wanted])
        points = self._operating_points(base, cosine, targets, texts)
        if not points:
            logger.warning("no FFN can be skipped within [%d, %d)", base.cold_s, base.cold_e)
            return base, []
        default = min(DEFAULT_TARGET_SKIP_RATIO, points[-1].target_skip_ratio)
        if wanted is None and default < DEFAULT_TARGET_SKIP_RATIO:
            logger.warning(
                "the default target skip ratio %.2f is out of reach; the policy is for %.2f, the largest "
                "operating point",
                DEFAULT_TARGET_SKIP_RATIO,
                default,
            )
        threshold = threshold_for(points, default if wanted is None else wanted, never=FULL_MODEL_THRESHOLD)
        return replace(base, threshold=threshold), points

    def _operating_points(
        self, base: SkipPolicy, cosine: np.ndarray, targets: list[float], texts: list[list[list[int]]]
    ) -> list[OperatingPoint]:
        rows = [row for text in texts for row in text[: self._config.closed_loop_prompts]]
        passes = self._passes
        measure = passes.decoded if self._config.closed_loop == "decode" else passes.teacher_forced
        curve = cosine_curve(cosine, base, lambda policy: measure(policy, rows))
        points = []
        for target in tqdm(targets, desc="close the loop", unit="point", disable=None):
            realised = None
            if rows:
                threshold, realised = curve.threshold(target)
                if abs(realised - target) > MISSED:
                    logger.warning("target %.2f: the closest threshold found realises %.3f", target, realised)
            else:
                threshold = predicted_threshold(cosine, base, target)
            points.append(
                OperatingPoint(
                    target_skip_ratio=target,
                    threshold=threshold,
                    predicted_skip_ratio=predicted_skip_ratio(cosine, replace(base, threshold=threshold)),
                    realised_skip_ratio=realised,
                )
            )
        return points

    def verify(
        self, policy: SkipPolicy, points: list[OperatingPoint], samples: list[CorpusSample]
    ) -> list[OperatingPoint]:
        """Decode held-out prompts at every operating point up to the recommended one."""
        prompts = [row for sample in samples for row in sample.held_out]
        checked = []
        for point in tqdm(points, desc="verify", unit="point", disable=None):
            if point.threshold >= policy.threshold and prompts:
                try:
                    ratio = self._passes.decoded(replace(policy, threshold=point.threshold), prompts)
                except Unavailable as error:  # no reason to lose what was measured so far
                    logger.warning("target %.2f not verified: %s", point.target_skip_ratio, error)
                    ratio = None
                point = point.model_copy(update={"verified_skip_ratio": ratio})
            checked.append(point)
        return checked
