"""From a profile to a profile with a gate: text, damage, sweeps, closed loop, top to bottom."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm.auto import tqdm

from skipcal.arch.limits import check_angles, check_ids, check_length
from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import Architecture, input_device, locate
from skipcal.calibrate.closed_loop import RealisedCurve
from skipcal.calibrate.passes import teacher_forced_ratio
from skipcal.calibrate.provenance import sample_info
from skipcal.configs.fit import FitConfig
from skipcal.core.gate import NEVER, GatePolicy
from skipcal.core.surrogates import rank_for
from skipcal.errors import ConfigError, TargetOutOfReach
from skipcal.fit.damage import Damage, fisher_damage
from skipcal.fit.layer_damage import relative_damage
from skipcal.fit.on_policy import Fitted, Sweep
from skipcal.profiles.fits import warn_of_other_opening
from skipcal.profiles.parts import GateFit, GateInfo, GatePoint, GateSettings, tensors_file
from skipcal.profiles.policies import threshold_for
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.sources import model_slug
from skipcal.profiles.tensors import GateTensors
from skipcal.speed.hardware import peak_memory
from skipcal.text.corpora import CorpusSample, resolve_corpora, sample_corpus
from skipcal.text.opening import prefill_tokens

logger = logging.getLogger(__name__)

TARGETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)  # beyond them lies no sweep
TOKENS_PER_INPUT = 10  # fewer calibration tokens than this a hidden dimension: worth a warning


def fit_gate_profile(
    loaded: LoadedModel, profile: SkipProfile, config: FitConfig | None = None
) -> SkipProfile:
    """Fit surrogates and gates to a loaded model; the profile's policy becomes the gate's.

    Progress bars go to stderr when it is a terminal. Raises ProfileMismatch for a profile of another
    model or of other weights, ConfigError for settings that do not fit the model, Unavailable when text
    is missing or too short.
    """
    config = config or FitConfig()
    started = time.perf_counter()
    run = _Fitter(loaded, profile, config)
    run.check()
    fitted, ratios = run.sweeps()
    tensors = GateTensors.pack(fitted.gates, fitted.surrogates, profile.model.fingerprint)
    points = run.operating_points(fitted, tensors)
    threshold = threshold_for(points, config.target_skip_ratio, never=NEVER)
    name = tensors_file(Path(config.output or f"{model_slug(profile.model.name)}.json"))
    gate = GateInfo(
        tensors=name,
        sha256=tensors.sha256,
        layers=list(fitted.gates.layers),
        warm_up_tokens=run.warm_up_tokens,
        operating_points=points,
        fit=run.provenance(fitted, tensors, ratios, time.perf_counter() - started),
    )
    policy = GateSettings(
        threshold=threshold, warm_up_tokens=run.warm_up_tokens, tensors=name, sha256=tensors.sha256
    )
    return profile.with_gate(gate, policy, tensors)


class _Fitter:
    """The steps of one fit; what they share is the model, the text and the configuration."""

    def __init__(self, loaded: LoadedModel, profile: SkipProfile, config: FitConfig) -> None:
        self._loaded = loaded
        self._model: Any = loaded.model
        self._profile = profile
        self._config = config
        self._architecture: Architecture = locate(loaded.model)
        self.warm_up_tokens = profile.policy.warm_up_tokens
        self._given = prefill_tokens(loaded.tokenizer)
        self._first = self._given + self.warm_up_tokens

    def check(self) -> None:
        """Refuse what can be refused before any text is read, then read it."""
        config, layers = self._config, self._architecture.num_layers
        self._profile.check_fits(self._model, same_weights=True)
        warn_of_other_opening(self._profile, self._loaded.tokenizer)
        if layers < 3:
            raise ConfigError(
                f"the model has {layers} layers; the first and the last always run, so 3 are needed"
            )
        # The first FFN makes the stream what it is, the last has nobody to make up for it.
        self._layers = range(1, layers - 1)
        if config.target_skip_ratio > len(self._layers) / layers:
            raise TargetOutOfReach(
                f"target skip ratio {config.target_skip_ratio:g} is out of reach: the first and the last of "
                f"{layers} FFNs always run; lower --target-skip-ratio"
            )
        if config.prompt_tokens <= self._first:
            raise ConfigError(
                f"no token of a window of {config.prompt_tokens} lies past the warm-up of "
                f"{self.warm_up_tokens}; raise --prompt-tokens"
            )
        what = f"windows of {config.prompt_tokens} tokens do"
        check_length(self._model, config.prompt_tokens, what, lower="--prompt-tokens")
        check_angles(self._model, config.prompt_tokens, self._given, lower="--prompt-tokens")
        self._rank = self._chosen_rank()
        self._samples = self._read()
        check_ids(self._model, (row for s in self._samples for row in (*s.prompts, *s.held_out)))
        self._tokens = sum(len(s.prompts) for s in self._samples) * (config.prompt_tokens - self._first)
        if self._tokens < TOKENS_PER_INPUT * self._architecture.hidden_size:
            logger.warning(
                "%d tokens to fit on are few for a hidden size of %d; raise --prompts",
                self._tokens,
                self._architecture.hidden_size,
            )

    def _chosen_rank(self) -> int:
        hidden = self._architecture.hidden_size
        if self._config.rank is not None:
            if self._config.rank > hidden:
                raise ConfigError(f"--rank {self._config.rank} is above the hidden size of {hidden}")
            return self._config.rank
        smallest = min(self._architecture.blocks[layer].weight_bytes for layer in self._layers)
        element = torch.finfo(self._model.dtype).bits // 8
        return rank_for(self._config.surrogate_budget, hidden, smallest, element)

    def _read(self) -> list[CorpusSample]:
        config = self._config
        return [
            sample_corpus(
                corpus,
                self._loaded.tokenizer,
                prompts=config.windows(),
                prompt_tokens=config.prompt_tokens,
                seed=config.seed,
                held_out=config.loop_windows(),
            )
            for corpus in resolve_corpora(config.corpora(), config.data_files, text_column=config.text_column)
        ]

    def sweeps(self) -> tuple[Fitted, list[float]]:
        """A sweep on the clean stream, then those on policy; the last one's fit and all skip ratios."""
        rows = [row for sample in self._samples for row in sample.prompts]
        damage = self._damage()
        fitted = self._sweep(rows[::2], damage).fit()  # half is enough to say which tokens will skip
        ratios = [fitted.skip_ratio]
        share = self._config.target_skip_ratio * self._architecture.num_layers / len(self._layers)
        for _ in range(self._config.sweeps):
            threshold = fitted.scores.threshold(share)
            fitted = self._sweep(rows, damage).fit(fitted.gates, threshold)
            ratios.append(fitted.skip_ratio)
        return fitted, ratios

    def _sweep(self, rows: list[list[int]], damage: Damage) -> Sweep:
        return Sweep(
            self._architecture,
            rows,
            layers=self._layers,
            damage=damage,
            rank=self._rank,
            first=self._first,
            batch_size=self._config.batch_size,
        )

    def _damage(self) -> Damage:
        device = input_device(self._model)
        rows = [row for sample in self._samples for row in sample.prompts[: self._config.damage_prompts]]
        bar = tqdm(rows, desc="damage", unit="window", leave=False, disable=None)
        ids = (torch.tensor([row], device=device) for row in bar)
        if self._config.damage == "relative-error":
            return relative_damage(self._model, self._architecture, ids, first=self._first)
        return fisher_damage(self._model, self._architecture, ids, first=self._first, seed=self._config.seed)

    def operating_points(self, fitted: Fitted, tensors: GateTensors) -> list[GatePoint]:
        """Thresholds for TARGETS and the ratio fitted for, by what windows not fitted on realise."""
        candidates = len(self._layers) / self._architecture.num_layers
        targets = {ratio for ratio in TARGETS if ratio <= candidates}
        policy = GatePolicy(
            gates=tensors.gates,
            surrogates=tensors.surrogates,
            threshold=NEVER,
            warm_up_tokens=self.warm_up_tokens,
        )
        by_corpus: dict[float, dict[str, float]] = {}
        ratio = partial(
            teacher_forced_ratio,
            self._model,
            self._architecture,
            batch_size=self._config.batch_size,
            prompt_tokens=self._given,
        )

        def measure(threshold: float) -> float:
            tried = replace(policy, threshold=threshold)
            by_corpus[threshold] = {s.corpus.name: ratio(tried, s.held_out) for s in self._samples}
            return fmean(by_corpus[threshold].values())  # of as many windows each

        curve = RealisedCurve(
            largest=candidates,
            threshold_at=lambda ratio: fitted.scores.threshold(ratio / candidates),
            predicted_at=lambda threshold: candidates * fitted.scores.share_below(threshold),
            measure=measure,
        )
        points = []
        wanted = sorted(targets | {self._config.target_skip_ratio})
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

    def provenance(
        self, fitted: Fitted, tensors: GateTensors, ratios: list[float], seconds: float
    ) -> GateFit:
        config = self._config
        placed = tensors.surrogates.for_blocks(self._architecture.blocks)
        shares = [
            placed.weight_bytes(layer) / self._architecture.blocks[layer].weight_bytes
            for layer in self._layers
        ]
        return GateFit(
            corpora=[
                sample_info(s, len(s.prompts) * (config.prompt_tokens - self._first)) for s in self._samples
            ],
            windows=sum(len(sample.prompts) for sample in self._samples),
            window_tokens=config.prompt_tokens,
            tokens=self._tokens,
            seed=config.seed,
            sweeps=ratios,
            damage=config.damage,
            rank=self._rank,
            surrogate_share=sum(shares) / len(shares),
            gate_r_squared=list(fitted.r_squared),
            surrogate_error=list(fitted.surrogate_error),
            seconds=round(seconds, 1),
            peak_memory_bytes=peak_memory(input_device(self._model))["bytes"],
            config=config.recorded(),
        )
