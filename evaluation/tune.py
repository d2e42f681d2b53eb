"""Find the operating point that skips most within a quality budget, over rules, thresholds and warm-ups.

Everything is measured teacher-forced over windows of text: divergence from the full model and loss, per
decoded token, the warm-up's included, so that warm-ups can be compared. Each rule is followed from small
ratios upwards until it has left the budget; random skipping is measured at the same ratios.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from tqdm.auto import tqdm

from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import Architecture, locate
from skipcal.calibrate.recommend import TARGET_STEP
from skipcal.configs.names import DAMAGE, FITTED
from skipcal.configs.sweep import PerplexitySettings
from skipcal.configs.tune import RULES, TuneConfig
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.report import SkipReport
from skipcal.core.substituted import Substituted
from skipcal.core.surrogates import Surrogates
from skipcal.errors import ConfigError, TargetOutOfReach
from skipcal.evaluation.statistics import Share, estimate
from skipcal.evaluation.tasks.answers import Subject
from skipcal.evaluation.tasks.perplexity import Perplexity, load_perplexity
from skipcal.evaluation.tasks.task import Record
from skipcal.evaluation.together import SkipsByPosition, unread_bytes
from skipcal.profiles.fits import warn_of_other_opening
from skipcal.profiles.methods import largest
from skipcal.profiles.parts import Budget, GateSettings, StaticSettings, TunedPoint, Tuning
from skipcal.profiles.schema import SkipProfile
from skipcal.speed.cost import step_bytes

logger = logging.getLogger(__name__)

FAR_BEYOND = 2.0  # a rule is followed until its divergence is this many times the budget
Settings = SkipPolicy | GateSettings | StaticSettings


@dataclass(frozen=True)
class Candidate:
    """Something to measure: a policy, the form in which a profile keeps it, and whose line it is on."""

    line: str
    policy: Policy
    settings: Settings | None  # None: a reference that is never chosen


def tune_profile(loaded: LoadedModel, profile: SkipProfile, config: TuneConfig) -> SkipProfile:
    """The profile with the policy that skips most within the budget, and all that was measured.

    Raises TargetOutOfReach when nothing meets the budget, ConfigError for rules the profile does not have.
    """
    profile.check_fits(loaded.model)
    warn_of_other_opening(profile, loaded.tokenizer)
    run = _Tuner(loaded, profile, config)
    points, settings = run.measured()
    budget = Budget(
        max_kl=config.max_kl,
        max_perplexity_increase=config.max_perplexity_increase,
        min_speedup=config.min_speedup,
    )
    chosen = choose(points, budget, requests=config.requests)
    tuning = Tuning(
        budget=budget,
        text=run.task.header(),
        windows=len(run.task.ids),
        points=points,
        chosen=chosen,
        config=config.recorded(),
    )
    found = settings[chosen]
    assert found is not None
    return profile.with_tuning(tuning, found)


def choose(points: list[TunedPoint], budget: Budget, *, requests: int = 1) -> int:
    """Index of the point that skips most among those within the budget; among equals the least divergent.

    Of several requests that run together: the one that leaves most unread, by its ideal speed-up.
    """
    within = [n for n, point in enumerate(points) if point.rule != "random" and meets(point, budget)]
    if not within:
        best = min(
            (p for p in points if p.rule != "random" and _fast_enough(p, budget)),
            key=lambda p: p.kl,
            default=None,
        )
        closest = (
            f"the closest is {best.line} at a ratio of {best.skip_ratio_all:.3f} with a KL of {best.kl:.4f} "
            f"(up to {best.kl_high:.4f})" if best else "no point is that fast"
        )  # fmt: skip
        raise TargetOutOfReach(f"no operating point is within the budget; {closest}; widen the budget")
    gain = operator.attrgetter("skip_ratio_all" if requests == 1 else "ideal_speed_up")
    return max(within, key=lambda n: (gain(points[n]), -points[n].kl))


def meets(point: TunedPoint, budget: Budget) -> bool:
    """Whether the upper ends of a point's intervals lie within the budget."""
    if budget.max_kl is not None and point.kl_high > budget.max_kl:
        return False
    increase = budget.max_perplexity_increase
    if increase is not None and math.expm1(point.excess_nll_high) > increase:
        return False
    return _fast_enough(point, budget)


def _fast_enough(point: TunedPoint, budget: Budget) -> bool:
    return budget.min_speedup is None or point.ideal_speed_up >= budget.min_speedup


class _Tuner:
    """The measurements of one run; they share the model, the windows and its full passes over them."""

    def __init__(self, loaded: LoadedModel, profile: SkipProfile, config: TuneConfig) -> None:
        self._profile = profile
        self._config = config
        self._architecture: Architecture = locate(loaded.model)
        self._subject = Subject(loaded, self._architecture, chat_template=False)
        text = PerplexitySettings(
            corpus=config.corpora(),
            data_files=config.data_files,
            text_column=config.text_column,
            windows=config.prompts,
            window_tokens=config.prompt_tokens,
            prompt_tokens=1,
            warm_up_tokens=0,
        )
        self.task: Perplexity = load_perplexity(text, self._subject, config.seed)
        self._bytes = step_bytes(
            loaded.model, self._architecture, batch_size=config.requests, tokens=config.prompt_tokens / 2
        )
        if config.requests > len(self.task.ids):
            raise ConfigError(
                f"{config.requests} requests are more than the {len(self.task.ids)} windows of text; "
                "raise --prompts, or lower --requests"
            )
        self._rules = self._chosen_rules()

    def _chosen_rules(self) -> list[str]:
        lacking: dict[str, tuple[str, str]] = {}  # by rule: what it needs, and the command that makes it
        if self._profile.gate is None:
            lacking |= dict.fromkeys(("gate", "static+surrogates"), ("a gate", "skipcal fit"))
        if self._profile.fixed_sets is None:
            lacking[FITTED] = ("fitted sets", "skipcal fit --method static")
        if self._profile.damage_rule is None:
            lacking[DAMAGE] = ("the losses of single FFNs", "skipcal profile --by-damage")
        if self._config.rules is None:
            return [rule for rule in RULES if rule not in lacking]
        for rule in self._config.rules:
            if rule in lacking:
                what, command = lacking[rule]
                raise ConfigError(f"rule {rule} needs {what}, which this profile lacks; run: {command}")
        return self._config.rules

    def measured(self) -> tuple[list[TunedPoint], list[Settings | None]]:
        """Every point that was measured, and how a profile would keep it."""
        points: list[TunedPoint] = []
        settings: list[Settings | None] = []
        kept = self._subject.full_passes.kept()
        with kept, tqdm(desc="tune", unit="point", disable=None) as bar:
            for warm_up in self._config.warm_up_tokens or [self._profile.policy.warm_up_tokens]:
                for line in self._lines(warm_up):
                    for candidate in line:
                        points.append(self._point(candidate, warm_up))
                        settings.append(candidate.settings)
                        bar.update()
                        if self._beyond(points[-1]):
                            break
        return _marked(points), settings

    def _beyond(self, point: TunedPoint) -> bool:
        config = self._config
        if config.max_kl is not None and point.kl_low > FAR_BEYOND * config.max_kl:
            return True
        increase = config.max_perplexity_increase
        return increase is not None and point.excess_nll_low > FAR_BEYOND * math.log1p(increase)

    def _lines(self, warm_up: int) -> Iterator[Iterator[Candidate]]:
        """Candidates of each rule, from little skipping to much."""
        for rule in self._rules:
            if rule == "gate":
                yield self._gate(warm_up)
            elif rule == "cosine":
                own = self._profile.cosine_policy.max_skips
                for bound in dict.fromkeys([own, *self._config.max_skips]):
                    yield self._cosine(warm_up, bound)
            elif rule == DAMAGE:
                yield self._damage(warm_up)
            elif rule == FITTED:
                yield self._fitted(warm_up)
            else:
                yield self._static(warm_up, surrogates=rule.endswith("+surrogates"))
        yield self._random(warm_up)

    def _gate(self, warm_up: int) -> Iterator[Candidate]:
        gate = self._profile.gate
        assert gate is not None
        for point in sorted(gate.operating_points, key=lambda p: p.target_skip_ratio):
            policy = self._profile.gate_policy(point.target_skip_ratio)
            settings = GateSettings(
                threshold=point.threshold, warm_up_tokens=warm_up, tensors=gate.tensors, sha256=gate.sha256
            )
            yield Candidate("gate", replace(policy, warm_up_tokens=warm_up), settings)

    def _cosine(self, warm_up: int, bound: int | None) -> Iterator[Candidate]:
        base = replace(self._profile.cosine_policy, warm_up_tokens=warm_up, max_skips=bound)
        line = "cosine" if bound is None else f"cosine, k = {bound}"
        for point in sorted(self._profile.operating_points, key=lambda p: p.target_skip_ratio):
            policy = replace(base, threshold=point.threshold)
            yield Candidate(line, policy, policy)

    def _damage(self, warm_up: int) -> Iterator[Candidate]:
        found = self._profile.damage_rule
        assert found is not None
        for point in sorted(found.operating_points, key=lambda p: p.target_skip_ratio):
            policy = replace(found.policy, threshold=point.threshold, warm_up_tokens=warm_up)
            yield Candidate(DAMAGE, policy, policy)

    def _static(self, warm_up: int, *, surrogates: bool) -> Iterator[Candidate]:
        layers = self._profile.model.num_layers
        cosine = np.asarray(self._profile.layers["pooled"].mean)
        cosine[[0, -1]] = -2.0  # the first and the last always run
        for count in sorted({max(1, round(ratio * layers)) for ratio in _ratios()}):
            settings = StaticSettings(
                layers=list(largest(cosine, min(count, layers - 2))),
                surrogates=surrogates,
                warm_up_tokens=warm_up,
            )
            line = "static+surrogates" if surrogates else "static"
            yield Candidate(line, self._profile.static_policy(settings), settings)

    def _fitted(self, warm_up: int) -> Iterator[Candidate]:
        for each in self._profile.fitted_sets().sets:
            settings = StaticSettings(layers=each.layers, surrogates="fitted", warm_up_tokens=warm_up)
            yield Candidate(FITTED, self._profile.static_policy(settings), settings)

    def _random(self, warm_up: int) -> Iterator[Candidate]:
        inner = tuple(range(1, self._profile.model.num_layers - 1))
        for ratio in _ratios():
            policy = ChosenFFNs(
                method="random",
                layers=inner,
                probability=ratio * self._profile.model.num_layers / len(inner),
                warm_up_tokens=warm_up,
                seed=self._config.seed,
            )
            yield Candidate("random", policy, None)

    def _point(self, candidate: Candidate, warm_up: int) -> TunedPoint:
        width = self._config.prompt_tokens
        seen = SkipsByPosition(
            self._architecture.num_layers, width=width, first=self.task.prompt_tokens + warm_up
        )
        task = replace(self.task, warm_up_tokens=warm_up, watcher=seen.see)
        records: list[Record] = []
        reports: list[SkipReport] = []
        for found, report in task.run(self._subject, candidate.policy, task.ids, self._config.batch_size):
            records += found
            reports.append(report)
        report = SkipReport.merged(reports)
        kl = estimate([Share(r["kl"], r["tokens"]) for r in records], seed=self._config.seed)
        excess = estimate(
            [Share(r["nll"] - r["full_nll"], r["tokens"]) for r in records], seed=self._config.seed
        )
        saved = unread_bytes(
            seen.skips,
            len(task.ids),
            self._config.requests,
            self._architecture.blocks,
            getattr(candidate.policy, "surrogates", Surrogates({})),
        )
        policy = candidate.policy.policy if isinstance(candidate.policy, Substituted) else candidate.policy
        return TunedPoint(
            line=candidate.line,
            rule=candidate.line.partition(",")[0],
            threshold=getattr(policy, "threshold", None),
            max_skips=getattr(policy, "max_skips", None),
            warm_up_tokens=warm_up,
            skip_ratio=report.skip_ratio,
            skip_ratio_all=report.skip_ratio_all,
            kl=kl.value,
            kl_low=_known(kl.ci_low, kl.value),
            kl_high=_known(kl.ci_high, kl.value),
            excess_nll=excess.value,
            excess_nll_low=_known(excess.ci_low, excess.value),
            excess_nll_high=_known(excess.ci_high, excess.value),
            ideal_speed_up=self._bytes.ideal_speed_up(saved),
            on_front=False,
            loses_to_random=False,
        )


def _marked(points: list[TunedPoint]) -> list[TunedPoint]:
    """The points with what can be said only of all: who is on the Pareto front, who loses to random."""
    return [
        point.model_copy(
            update={
                "on_front": not any(_better(other, point) for other in points),
                "loses_to_random": point.rule != "random" and _loses(point, points),
            }
        )
        for point in points
    ]


def _better(other: TunedPoint, point: TunedPoint) -> bool:
    """Whether `other` skips as much with less divergence, or more with as little."""
    as_good = other.skip_ratio_all >= point.skip_ratio_all and other.kl <= point.kl
    return as_good and (other.skip_ratio_all > point.skip_ratio_all or other.kl < point.kl)


def _loses(point: TunedPoint, points: list[TunedPoint]) -> bool:
    """Whether random skipping, at this ratio by interpolation, diverges less than the point does for sure."""
    line = sorted(
        (p.skip_ratio, p.kl)
        for p in points
        if p.rule == "random" and p.warm_up_tokens == point.warm_up_tokens
    )
    ratios, divergence = [0.0, *(r for r, _ in line)], [0.0, *(k for _, k in line)]
    if point.skip_ratio > ratios[-1]:
        return False  # random was not followed so far
    return point.kl_low > float(np.interp(point.skip_ratio, ratios, divergence))


def _ratios() -> list[float]:
    return [round(n * TARGET_STEP, 10) for n in range(1, 11)]


def _known(bound: float | None, value: float) -> float:
    """The end of an interval; a single window has none."""
    return value if bound is None else bound
