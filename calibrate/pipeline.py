"""From a model and a configuration to a profile: the whole calibration, top to bottom."""

from __future__ import annotations

import logging
import math
import platform
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm

import skipcal
from skipcal.arch.loading import LoadedModel, fingerprint
from skipcal.arch.locate import Architecture, input_device, locate
from skipcal.calibrate.capture import capture
from skipcal.calibrate.corpora import CorpusSample, batches, resolve_corpora, sample_corpus
from skipcal.calibrate.recommend import (
    RealisedCurve,
    check_reachable,
    predicted_skip_ratio,
    predicted_threshold,
    target_ratios,
)
from skipcal.calibrate.regions import check_region, find_regions
from skipcal.calibrate.saturation import Trace, pooled_statistics
from skipcal.configs.run import ProfileConfig
from skipcal.errors import ConfigError, Unavailable
from skipcal.profiles.schema import (
    PROFILE_FORMAT,
    CalibrationInfo,
    CorpusInfo,
    Environment,
    ModelInfo,
    OperatingPoint,
    Regions,
    SkipProfile,
    threshold_for,
)
from skipcal.runtime.policy import FULL_MODEL_THRESHOLD, SkipPolicy
from skipcal.runtime.report import SkipReport
from skipcal.runtime.session import skipping

logger = logging.getLogger(__name__)

DEFAULT_TARGET_SKIP_RATIO = 0.25  # the paper's 25-30 %
MISSED = 0.02  # a realised skip ratio this far from its target is worth a warning


_ENDED_EARLY = (
    "every text ended within the warm-up, so no skip ratio can be measured; lower --warm-up-tokens or "
    "take more prompts"
)


@dataclass(frozen=True)
class Calibration:
    """A profile and the traces it was made from, one per corpus."""

    profile: SkipProfile
    traces: list[Trace]


@dataclass(frozen=True)
class _Texts:
    """Token rows to run: prompts with their continuations, or windows."""

    sample: CorpusSample
    rows: list[list[int]]


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
    texts = [_Texts(sample, run.rows(sample)) for sample in samples]
    traces = [run.trace(text) for text in texts]
    regions = run.regions(traces)
    policy, points = run.recommend(regions, traces, texts)
    if config.verify:
        points = run.verify(policy, points, samples)
    profile = SkipProfile(
        format=PROFILE_FORMAT,
        model=_model_info(loaded, architecture, config),
        calibration=CalibrationInfo(
            mode=config.mode,
            corpora=[_corpus_info(s, t) for s, t in zip(samples, traces, strict=True)],
            prompt_tokens=config.prompt_tokens,
            new_tokens=config.new_tokens if config.mode == "generate" else 0,
            seed=config.seed,
            chat_template=False,
            closed_loop=config.closed_loop if config.closed_loop_prompts else None,
        ),
        layers={"pooled": pooled_statistics(traces), **{t.corpus: t.statistics() for t in traces}},
        regions=regions,
        policy=policy,
        operating_points=points,
        environment=_environment(architecture),
        config=config.recorded(),
    )
    return Calibration(profile=profile, traces=traces)


class _Calibrator:
    """The steps of one calibration; what they share is the model and the configuration."""

    def __init__(self, loaded: LoadedModel, architecture: Architecture, config: ProfileConfig) -> None:
        self._model: Any = loaded.model
        self._tokenizer = loaded.tokenizer
        self._architecture = architecture
        self._config = config
        self._device = input_device(loaded.model)
        self._prompt_tokens = config.prompt_tokens if config.mode == "generate" else 1

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
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
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
            sample_corpus(
                corpus,
                self._tokenizer,
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
        with self._bar(f"generate {sample.corpus.name}", len(sample.prompts)) as bar:
            return [
                row
                for batch in batches(sample.prompts, self._config.batch_size)
                for row in self._continue(batch, bar)
            ]

    def _continue(self, prompts: list[list[int]], bar: Any) -> list[list[int]]:
        """Each prompt with what the model, as it is set up now, writes after it greedily."""
        ids = torch.tensor(prompts, device=self._device)
        stops = _final_ids(self._model.generation_config)
        output = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self._config.new_tokens,
            **_greedy_settings(self._model.generation_config),
        )
        bar.update(len(prompts))
        length = ids.shape[1]
        return [row[:length] + _until_stop(row[length:], stops) for row in output.tolist()]

    def trace(self, texts: _Texts) -> Trace:
        """One clean forward over every row; cosines of the positions past the prompt."""
        parts = []
        first = self._prompt_tokens
        with (
            capture(self._model, architecture=self._architecture) as recorder,
            self._bar(f"capture {texts.sample.corpus.name}", len(texts.rows)) as bar,
        ):
            done = 0
            for batch in batches(texts.rows, self._config.batch_size):
                ids, mask = self._padded(batch)
                self._forward(ids, mask)
                cosine, norm_ratio = recorder.take()
                kept = mask.cpu().numpy().astype(bool)
                kept[:, :first] = False
                row, position = np.nonzero(kept)
                parts.append(
                    Trace(
                        corpus=texts.sample.corpus.name,
                        prompt=(row + done).astype(np.int32),
                        position=position.astype(np.int32),
                        cosine=cosine[kept.ravel()],
                        norm_ratio=norm_ratio[kept.ravel()],
                        prompt_tokens=first,
                    )
                )
                done += len(batch)
                bar.update(len(batch))
        return Trace.merge(parts)

    def regions(self, traces: list[Trace]) -> Regions:
        config = self._config
        curve = np.average(
            [trace.cosine.mean(axis=0, dtype=np.float64) for trace in traces],
            axis=0,
            weights=[len(trace.cosine) for trace in traces],
        )
        per_prompt = [_prompt_sums(trace) for trace in traces]
        return find_regions(
            curve,
            np.concatenate([sums for sums, _ in per_prompt]),
            np.concatenate([counts for _, counts in per_prompt]),
            seed=config.seed,
            given=self._given_region(),
        )

    def recommend(
        self, regions: Regions, traces: list[Trace], texts: list[_Texts]
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
            raise Unavailable(_ENDED_EARLY)
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
        threshold = threshold_for(points, default if wanted is None else wanted)
        return replace(base, threshold=threshold), points

    def _operating_points(
        self, base: SkipPolicy, cosine: np.ndarray, targets: list[float], texts: list[_Texts]
    ) -> list[OperatingPoint]:
        rows = [row for text in texts for row in text.rows[: self._config.closed_loop_prompts]]
        measure = self._decoded if self._config.closed_loop == "decode" else self._teacher_forced
        curve = RealisedCurve(cosine, base, lambda policy: measure(policy, rows))
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

    def _teacher_forced(self, policy: SkipPolicy, rows: list[list[int]]) -> float:
        """Skip ratio with skipping on, over known rows."""
        with skipping(
            self._model,
            policy=policy,
            teacher_forced=True,
            prompt_tokens=self._prompt_tokens,
            architecture=self._architecture,
        ) as run:
            for batch in batches(rows, self._config.batch_size):
                self._forward(*self._padded(batch))
        return _known_ratio(run.report)

    def verify(
        self, policy: SkipPolicy, points: list[OperatingPoint], samples: list[CorpusSample]
    ) -> list[OperatingPoint]:
        """Decode held-out prompts at every operating point up to the recommended one."""
        prompts = [row for sample in samples for row in sample.held_out]
        checked = []
        for point in tqdm(points, desc="verify", unit="point", disable=None):
            if point.threshold >= policy.threshold and prompts:
                try:
                    ratio = self._decoded(replace(policy, threshold=point.threshold), prompts)
                except Unavailable as error:  # no reason to lose what was measured so far
                    logger.warning("target %.2f not verified: %s", point.target_skip_ratio, error)
                    ratio = None
                point = point.model_copy(update={"verified_skip_ratio": ratio})
            checked.append(point)
        return checked

    def _decoded(self, policy: SkipPolicy, rows: list[list[int]]) -> float:
        """Skip ratio of decoding the prompts that `rows` begin with."""
        prompts = [row[: self._config.prompt_tokens] for row in rows]
        with (
            skipping(self._model, policy=policy, architecture=self._architecture) as run,
            self._bar("decode", len(prompts)) as bar,
        ):
            for batch in batches(prompts, self._config.batch_size):
                self._continue(batch, bar)
        return _known_ratio(run.report)

    @torch.no_grad()
    def _forward(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        # The stack alone: the LM head is a fifth of this work and nobody reads the logits.
        self._architecture.stack(input_ids=ids, attention_mask=mask, use_cache=False)

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded ids and mask, [batch, seq]; a causal model does not see what is right."""
        length = max(map(len, rows))
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return ids.to(self._device), mask.to(self._device)

    @staticmethod
    def _bar(what: str, total: int) -> Any:
        return tqdm(total=total, desc=what, unit="prompt", leave=False, disable=None)


def _known_ratio(report: SkipReport) -> float:
    if math.isnan(report.skip_ratio):
        raise Unavailable(_ENDED_EARLY)
    return report.skip_ratio


def _prompt_sums(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Sums [prompts, layers] and counts [prompts] of the cosines by prompt, in float64."""
    prompts, index = np.unique(trace.prompt, return_inverse=True)
    sums = np.zeros((len(prompts), trace.cosine.shape[1]))
    np.add.at(sums, index, trace.cosine.astype(np.float64))
    return sums, np.bincount(index).astype(np.float64)


def _greedy_settings(config: Any) -> dict[str, Any]:
    """Overrides that make generate() plain greedy decoding, whatever a model's configuration adds."""
    settings: dict[str, Any] = {
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 50,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "min_length": 0,
        "return_dict_in_generate": False,
    }
    if config.pad_token_id is None:
        stops = _final_ids(config)
        settings["pad_token_id"] = min(stops) if stops else 0
    return settings


def _final_ids(config: Any) -> set[int]:
    ends = config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _until_stop(tokens: list[int], stops: set[int]) -> list[int]:
    """The tokens up to and with the first end-of-sequence; what follows is padding."""
    for place, token in enumerate(tokens):
        if token in stops:
            return tokens[: place + 1]
    return tokens


def _model_info(loaded: LoadedModel, architecture: Architecture, config: ProfileConfig) -> ModelInfo:
    quantization = getattr(loaded.model.config, "quantization_config", None)
    method = getattr(quantization, "quant_method", None)
    return ModelInfo(
        name=Path(loaded.name).name if Path(loaded.name).exists() else loaded.name,
        revision=loaded.revision,
        model_type=architecture.model_type,
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        quantization=None if quantization is None else str(getattr(method, "value", method)),
        fingerprint=fingerprint(loaded.model),
        trust_remote_code=config.trust_remote_code,
    )


def _corpus_info(sample: CorpusSample, trace: Trace) -> CorpusInfo:
    corpus = sample.corpus
    return CorpusInfo(
        name=corpus.name,
        source=corpus.source,
        config=corpus.config,
        split=None if corpus.local or corpus.source == "embedded" else corpus.split,
        revision=corpus.revision,
        sha256=sample.sha256,
        documents=sample.documents,
        short_documents=sample.short_documents,
        prompts=len(sample.prompts),
        tokens=len(trace.cosine),
    )


def _environment(architecture: Architecture) -> Environment:
    device = input_device(architecture.stack)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return Environment(
        skipcal=skipcal.__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=f"{device.type} ({name})",
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
