"""From a model and a configuration to a profile: the whole calibration, top to bottom."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm.auto import tqdm

from skipcal.arch.limits import check_angles, check_ids, check_length
from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import Architecture, locate
from skipcal.calibrate.checkpoint import Checkpoint
from skipcal.calibrate.closed_loop import middle_first
from skipcal.calibrate.damage_rule import damage_policy, losses_of_one
from skipcal.calibrate.gather import first_rows, gather
from skipcal.calibrate.passes import ENDED_EARLY, Passes, progress, skip_ratio
from skipcal.calibrate.processes import ALONE, Counts, Processes
from skipcal.calibrate.provenance import corpus_info, environment, model_info, what_decides
from skipcal.calibrate.recommend import (
    LastCosinePrediction,
    Prediction,
    arming_layers,
    check_reachable,
    cosine_curve,
    target_ratios,
)
from skipcal.calibrate.regions import check_region, find_regions
from skipcal.calibrate.saturation import Trace, pooled_statistics
from skipcal.configs.run import ProfileConfig
from skipcal.core.policy import FULL_MODEL_THRESHOLD, SkipPolicy
from skipcal.errors import ConfigError, Unavailable
from skipcal.profiles.data import PROFILE_FORMAT
from skipcal.profiles.parts import CalibrationInfo, DamageRule, LayerStatistics, OperatingPoint, Regions
from skipcal.profiles.policies import threshold_for
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.greedy import warn_of_overruled
from skipcal.text.batching import batches
from skipcal.text.chat import sample_prompts
from skipcal.text.corpora import CorpusSample, resolve_corpora

logger = logging.getLogger(__name__)

DEFAULT_TARGET_SKIP_RATIO = 0.25  # the paper's 25-30 %
MISSED = 0.02  # a realised skip ratio this far from its target is worth a warning


@dataclass(frozen=True)
class Calibration:
    """A profile and the traces it was made from, one per corpus.

    checkpoint: where the traces are kept, if they are in files; to be removed when all is written.
    """

    profile: SkipProfile
    traces: list[Trace]
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True)
class Measurement:
    """What the closed loop asks all processes to do: run the policy, count the skips.

    held_out: over the held-out prompts instead of the calibration text.
    """

    policy: SkipPolicy
    how: Literal["teacher-forced", "decode"]
    held_out: bool = False


Ask = Callable[[Measurement], Counts]


def calibrate_model(
    loaded: LoadedModel, config: ProfileConfig | None = None, *, keep_in: Path | None = None
) -> Calibration:
    """Profile a loaded model. Progress bars go to stderr when it is a terminal.

    keep_in: a folder for finished batches. The same calibration goes on from them, and memory does not grow
             with the number of prompts; the caller removes `checkpoint` in the end. None: all is in memory.
    Raises Unavailable when text is missing or too short, TargetOutOfReach for an explicit
    `target_skip_ratio` beyond the region, UnsupportedModel when no FFN blocks are located.
    """
    result = calibrate_together(loaded, config or ProfileConfig(), ALONE, keep_in)
    assert result is not None
    return result


def calibrate_together(
    loaded: LoadedModel, config: ProfileConfig, processes: Processes, keep_in: Path | None
) -> Calibration | None:
    """`calibrate_model` by several processes, each of which loaded the model and calls this.

    Batches are shared out whole, so the result is that of one process.
    keep_in: a folder that all processes see.
    Returns None in all but process 0.
    """
    started = time.monotonic()
    if processes.size > 1 and keep_in is None:
        raise ConfigError("several processes need a folder for what they capture; give keep_in")
    architecture = processes.agree(lambda: locate(loaded.model))
    run = _Calibrator(loaded, architecture, config, processes)
    processes.agree(run.check)
    samples = processes.share(run.samples)
    checkpoint = run.open_checkpoint(keep_in, samples) if keep_in else None
    try:
        traces = run.traces(samples, checkpoint)
        run.prepare_loop(samples, traces)

        def conclude(ask: Ask) -> Calibration:
            again = checkpoint is not None and checkpoint.resumed
            begun = None if again else started  # what a run took that was killed in between, nobody knows
            profile = run.profile(samples, traces, _remembering(ask, checkpoint), started=begun)
            return Calibration(profile, traces, checkpoint)

        return processes.directed(conclude, run.measure)
    except BaseException:
        if checkpoint is not None and processes.size == 1:
            checkpoint.remove_if_unused()
        raise


def _remembering(ask: Ask, checkpoint: Checkpoint | None) -> Ask:
    """`ask`, but what the checkpoint holds is not measured again."""
    if checkpoint is None:
        return ask

    def asked(measurement: Measurement) -> Counts:
        name = json.dumps(asdict(measurement), sort_keys=True)
        if name not in checkpoint.measured:
            checkpoint.keep_measured(name, ask(measurement))
        return tuple(checkpoint.measured[name])

    return asked


class _Calibrator:
    """The steps of one calibration; what they share is the model and the configuration."""

    def __init__(
        self, loaded: LoadedModel, architecture: Architecture, config: ProfileConfig, processes: Processes
    ) -> None:
        self._loaded = loaded
        self._architecture = architecture
        self._config = config
        self._processes = processes
        self._passes = Passes(loaded, architecture, config)
        self._rows: list[list[int]] = []
        self._held_out: list[list[int]] = []

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
        generates = config.mode == "generate"
        length = config.prompt_tokens + (config.new_tokens if generates else 0)
        what, model = f"{length} tokens a row do", self._loaded.model
        lower = "--prompt-tokens or --new-tokens"
        check_length(model, length, what, lower=lower)
        if generates or config.closed_loop_prompts:  # else the text is a prefill, and nothing is decoded
            check_angles(model, length, self._passes.prompt_tokens, lower=lower)
        if generates and self._processes.leads:
            warn_of_overruled(model)

    def _given_region(self) -> tuple[int, int] | None:
        config = self._config
        if config.cold_s is None or config.cold_e is None:
            return None
        return config.cold_s, config.cold_e

    # In every process

    def samples(self) -> list[CorpusSample]:
        """The prompts of each corpus; in process 0 alone, for the hub limits how often it is asked."""
        config = self._config
        corpora = resolve_corpora(config.corpora(), config.data_files, text_column=config.text_column)
        samples = [
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
        check_ids(self._loaded.model, (row for s in samples for row in (*s.prompts, *s.held_out)))
        return samples

    def open_checkpoint(self, root: Path, samples: list[CorpusSample]) -> Checkpoint:
        """The folder for finished batches. Raises ConfigError where a process does not see it."""
        processes = self._processes
        found = processes.share(
            lambda: Checkpoint.open(
                root.absolute(), what_decides(self._loaded, self._architecture, self._config, samples)
            )
        )
        processes.agree(lambda: found.check_visible(processes.rank))
        return found

    def traces(self, samples: list[CorpusSample], checkpoint: Checkpoint | None) -> list[Trace]:
        """One trace for each corpus: greedy continuations (in mode prefill the text itself), captured."""
        return gather(
            self._passes,
            samples,
            self._config.batch_size,
            processes=self._processes,
            checkpoint=checkpoint,
        )

    def prepare_loop(self, samples: list[CorpusSample], traces: list[Trace]) -> None:
        """Hand out the rows that the closed loop measures on."""
        count = self._config.closed_loop_prompts
        self._rows = self._processes.share(lambda: [r for trace in traces for r in first_rows(trace, count)])
        self._held_out = [row for sample in samples for row in sample.held_out]

    def measure(self, asked: Measurement) -> Counts:
        """This process's share of a measurement."""
        rows = self._held_out if asked.held_out else self._rows
        mine = self._processes.mine(list(batches(rows, self._config.batch_size)))
        if not mine:
            return 0, 0
        run = self._passes.decoded if asked.how == "decode" else self._passes.teacher_forced
        return run(asked.policy, _watched(mine, asked.how, self._processes.leads))

    # In process 0

    def profile(
        self, samples: list[CorpusSample], traces: list[Trace], ask: Ask, *, started: float | None
    ) -> SkipProfile:
        """Statistics, regions and operating points from the traces. started: on `time.monotonic`."""
        config, architecture = self._config, self._architecture
        pooled = pooled_statistics(traces)
        regions = self._regions(traces, pooled)
        policy, points = self._recommend(regions, traces, ask)
        damage_rule = self._damage_rule(traces, pooled, ask) if config.by_damage else None
        if config.verify:
            points = self._verify(policy, points, ask)
        return SkipProfile(
            format=PROFILE_FORMAT,
            model=model_info(self._loaded, architecture, trust_remote_code=config.trust_remote_code),
            calibration=CalibrationInfo(
                mode=config.mode,
                corpora=[corpus_info(s, t) for s, t in zip(samples, traces, strict=True)],
                prompt_tokens=config.prompt_tokens,
                new_tokens=config.new_tokens if config.mode == "generate" else 0,
                seed=config.seed,
                chat_template=config.chat_template,
                closed_loop=config.closed_loop if config.closed_loop_prompts else None,
            ),
            layers={"pooled": pooled, **{t.corpus: t.statistics() for t in traces}},
            regions=regions,
            policy=policy,
            operating_points=points,
            damage_rule=damage_rule,
            environment=environment(architecture, started=started, processes=self._processes.size),
            config=config.recorded(),
        )

    def _regions(self, traces: list[Trace], pooled: LayerStatistics) -> Regions:
        per_prompt = [trace.prompt_sums() for trace in traces]
        return find_regions(
            np.array(pooled.mean),
            np.concatenate([sums for sums, _ in per_prompt]),
            np.concatenate([counts for _, counts in per_prompt]),
            seed=self._config.seed,
            given=self._given_region(),
        )

    def _recommend(
        self, regions: Regions, traces: list[Trace], ask: Ask
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
        wanted = config.target_skip_ratio
        if wanted is not None:
            check_reachable(base, wanted, layers)
        prediction = Prediction(lambda: _past_warm_up(traces, base), base, layers)
        if not prediction.tokens:
            raise Unavailable(ENDED_EARLY)
        targets = target_ratios(base, layers)
        if wanted is not None and wanted > 0 and not any(math.isclose(wanted, t) for t in targets):
            targets = sorted([*targets, wanted])
        points = self._operating_points(prediction, targets, ask)
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

    def _damage_rule(self, traces: list[Trace], pooled: LayerStatistics, ask: Ask) -> DamageRule:
        """What skipping each FFN alone loses, and operating points of the rule that weighs layers by it."""
        warm_up, layers = self._config.warm_up_tokens, self._architecture.num_layers
        excess, tokens = losses_of_one(
            self._loaded.model,
            self._architecture,
            self._rows,
            prompt_tokens=self._passes.prompt_tokens,
            warm_up_tokens=warm_up,
        )
        policy = damage_policy(pooled.mean, excess, warm_up)
        prediction = LastCosinePrediction(lambda: _past_warm_up(traces, policy), policy, layers)
        points = self._operating_points(prediction, target_ratios(policy, layers), ask)
        return DamageRule(excess_nll=excess, tokens=tokens, policy=policy, operating_points=points)

    def _operating_points(
        self, prediction: Prediction | LastCosinePrediction, targets: list[float], ask: Ask
    ) -> list[OperatingPoint]:
        curve = cosine_curve(prediction, lambda policy: self._ratio(ask, policy, self._config.closed_loop))
        points = []
        for target in tqdm(middle_first(targets), desc="close the loop", unit="point", disable=None):
            realised = None
            if self._rows:
                threshold, realised = curve.threshold(target)
                if abs(realised - target) > MISSED:
                    logger.warning("target %.2f: the closest threshold found realises %.3f", target, realised)
            else:
                threshold = prediction.threshold(target)
            points.append(
                OperatingPoint(
                    target_skip_ratio=target,
                    threshold=threshold,
                    predicted_skip_ratio=prediction.skip_ratio(threshold),
                    realised_skip_ratio=realised,
                )
            )
        return sorted(points, key=lambda point: point.target_skip_ratio)

    def _verify(self, policy: SkipPolicy, points: list[OperatingPoint], ask: Ask) -> list[OperatingPoint]:
        """Decode held-out prompts at every operating point up to the recommended one."""
        checked = []
        for point in tqdm(points, desc="verify", unit="point", disable=None):
            if point.threshold >= policy.threshold and self._held_out:
                try:
                    tried = replace(policy, threshold=point.threshold)
                    ratio = self._ratio(ask, tried, "decode", held_out=True)
                except Unavailable as error:  # no reason to lose what was measured so far
                    logger.warning("target %.2f not verified: %s", point.target_skip_ratio, error)
                    ratio = None
                point = point.model_copy(update={"verified_skip_ratio": ratio})
            checked.append(point)
        return checked

    def _ratio(
        self,
        ask: Ask,
        policy: SkipPolicy,
        how: Literal["teacher-forced", "decode"],
        *,
        held_out: bool = False,
    ) -> float:
        skipped, steps = ask(Measurement(policy, how, held_out))
        return skip_ratio((skipped, steps), self._architecture.num_layers)


def _past_warm_up(traces: list[Trace], policy: SkipPolicy) -> Iterator[np.ndarray]:
    layers = arming_layers(policy)
    return (block for trace in traces for block in trace.after_warm_up(policy.warm_up_tokens, layers))


def _watched(groups: list[list[list[int]]], what: str, shown: bool) -> Iterator[list[list[int]]]:
    """The batches, with a bar that moves when one is done."""
    with progress(what, sum(map(len, groups)), shown=shown) as bar:
        for group in groups:
            yield group
            bar.update(len(group))
