"""The search within a budget: what is chosen, what is on the front, what loses to random skipping."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from skipcal.arch.loading import LoadedModel
from skipcal.configs.tune import TuneConfig
from skipcal.core.policy import SkipPolicy
from skipcal.errors import ConfigError, TargetOutOfReach
from skipcal.evaluation.tune import _marked, choose, meets, tune_profile
from skipcal.plots.pareto import plot_pareto
from skipcal.profiles.parts import (
    Budget,
    DamageRule,
    GateSettings,
    OperatingPoint,
    StaticSettings,
    TunedPoint,
)
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.summary import tuning_table
from skipcal.runtime.session import skipping


def point(line: str, ratio: float, kl: float, spread: float = 0.0, **values: Any) -> TunedPoint:
    fields: dict[str, Any] = {
        "line": line, "rule": line.partition(",")[0], "threshold": 0.5, "max_skips": None,
        "warm_up_tokens": 2, "skip_ratio": ratio, "skip_ratio_all": ratio,
        "kl": kl, "kl_low": kl - spread, "kl_high": kl + spread,
        "excess_nll": kl, "excess_nll_low": kl - spread, "excess_nll_high": kl + spread,
        "ideal_speed_up": 1 + ratio, "on_front": False, "loses_to_random": False,
    }  # fmt: skip
    return TunedPoint(**{**fields, **values})


def budget(**values: float) -> Budget:
    return Budget(**{"max_kl": None, "max_perplexity_increase": None, "min_speedup": None, **values})


POINTS = [
    point("gate", 0.1, 0.02, 0.005),
    point("gate", 0.25, 0.10, 0.03),
    point("cosine, k = 3", 0.09, 0.30, 0.01),
    point("cosine, k = 3", 0.25, 0.10, 0.0),
    point("random", 0.1, 0.2),
    point("random", 0.4, 0.05),
]


def test_the_most_skips_within_the_upper_end_of_the_interval_are_chosen() -> None:
    assert choose(POINTS, budget(max_kl=0.12)) == 3  # the gate's interval reaches 0.13
    assert choose(POINTS, budget(max_kl=0.13)) == 1  # as many skips: the first of equal divergence
    assert choose(POINTS, budget(max_kl=0.03)) == 0


def test_random_skipping_is_a_reference_and_never_chosen() -> None:
    assert POINTS[choose(POINTS, budget(max_kl=10.0))].rule != "random"


def test_a_perplexity_increase_is_the_exponential_of_excess_loss() -> None:
    inside = point("gate", 0.1, 0.0, excess_nll_high=math.log(1.05) - 1e-9)
    outside = point("gate", 0.1, 0.0, excess_nll_high=math.log(1.05) + 1e-9)
    assert meets(inside, budget(max_perplexity_increase=0.05))
    assert not meets(outside, budget(max_perplexity_increase=0.05))


def test_a_least_speed_up_leaves_out_what_is_slower() -> None:
    assert choose(POINTS, budget(max_kl=0.5, min_speedup=1.2)) == 1
    with pytest.raises(TargetOutOfReach, match="no point is that fast"):
        choose(POINTS, budget(min_speedup=3.0))


def test_a_budget_that_nothing_meets_is_refused_with_the_closest() -> None:
    with pytest.raises(TargetOutOfReach, match=r"closest is gate at a ratio of 0\.100 with a KL of 0\.0200"):
        choose(POINTS, budget(max_kl=0.001))


def test_the_front_has_what_nothing_beats_in_both() -> None:
    assert [p.on_front for p in _marked(POINTS)] == [True, False, False, False, False, True]


def test_a_rule_loses_where_random_skipping_as_much_surely_diverges_less() -> None:
    """Random has 0.2 at 0.1 and nothing at 0, so 0.18 at 0.09: by interpolation."""
    marked = _marked(POINTS)
    assert [p.loses_to_random for p in marked[:4]] == [False, False, True, False]
    unsure = _marked([point("cosine", 0.09, 0.3, 0.13), *POINTS[4:]])
    assert not unsure[0].loses_to_random
    beyond = _marked([point("cosine", 0.5, 9.0), *POINTS[4:]])
    assert not beyond[0].loses_to_random  # random was not followed that far


def test_of_several_requests_the_fastest_by_bytes_is_chosen_not_what_skips_most() -> None:
    points = [
        point("gate", 0.4, 0.02, ideal_speed_up=1.01),
        point("static+fitted", 0.2, 0.03, ideal_speed_up=1.15),
        point("static+fitted", 0.3, 0.3, ideal_speed_up=1.3),
    ]
    assert choose(points, budget(max_kl=0.05)) == 0
    assert choose(points, budget(max_kl=0.05), requests=8) == 1


def test_a_search_for_several_requests_counts_what_all_of_them_skip(
    tuned: SkipProfile, worded: LoadedModel, gated: SkipProfile, worded_text: Path
) -> None:
    """Fixed sets leave as much unread as for one request, the gate and random skipping less."""
    config = TuneConfig(
        data_files=[str(worded_text)], prompts=6, prompt_tokens=24, max_kl=0.05, max_skips=[2],
        warm_up_tokens=[2], requests=3,
    )  # fmt: skip
    several = tune_profile(worded, gated, config).tuning
    assert several is not None and tuned.tuning is not None and several.config["requests"] == 3
    alone = {(p.line, p.threshold, p.skip_ratio): p for p in tuned.tuning.points if p.warm_up_tokens == 2}
    compared = set()
    for each in several.points:
        one = alone[each.line, each.threshold, each.skip_ratio]
        assert each.kl == pytest.approx(one.kl, rel=1e-6, abs=1e-9)
        # The KV cache of three rows is read, so that as many bytes of weights are a smaller share.
        if each.rule in ("gate", "random") and 0.02 < each.skip_ratio < 0.6:
            assert each.ideal_speed_up < 1 + 0.75 * (one.ideal_speed_up - 1)
            compared.add(each.rule)
        if each.rule == "static":
            assert each.ideal_speed_up > 1 + 0.8 * (one.ideal_speed_up - 1)
            compared.add(each.rule)
    assert compared == {"gate", "random", "static"}
    config = config.model_copy(update={"requests": 7})
    with pytest.raises(ConfigError, match="7 requests are more than the 6 windows of text; raise --prompts"):
        tune_profile(worded, gated, config)


@pytest.fixture(scope="module")
def tuned(worded: LoadedModel, gated: SkipProfile, worded_text: Path) -> SkipProfile:
    config = TuneConfig(
        data_files=[str(worded_text)], prompts=6, prompt_tokens=24, max_kl=0.05, max_skips=[2],
        warm_up_tokens=[2, 6],
    )  # fmt: skip
    with torch.no_grad():
        return tune_profile(worded, gated, config)


def test_every_rule_and_warm_up_is_measured(tuned: SkipProfile) -> None:
    assert tuned.tuning is not None
    lines = {(p.line, p.warm_up_tokens) for p in tuned.tuning.points}
    names = ("gate", "cosine", "cosine, k = 2", "static", "static+surrogates", "random")
    assert lines == {(name, warm_up) for name in names for warm_up in (2, 6)}


def test_a_point_is_what_the_naive_way_measures(
    tuned: SkipProfile, worded: LoadedModel, worded_text: Path
) -> None:
    """KL and loss over all decoded tokens, of the policy that the profile now has."""
    assert tuned.tuning is not None
    chosen = tuned.tuning.points[tuned.tuning.chosen]
    model: Any = worded.model
    ids = worded.tokenizer(worded_text.read_text())["input_ids"]
    import random as shuffle

    starts = shuffle.Random(1).sample(range(0, len(ids) - 24 + 1, 24), 6)
    rows = torch.tensor([ids[start : start + 24] for start in starts])
    full = model(rows, use_cache=False).logits[:, :-1].log_softmax(-1)
    with skipping(model, tuned, teacher_forced=True) as run:
        mine = model(rows, use_cache=False).logits[:, :-1].log_softmax(-1)
    kl = float((full.exp() * (full - mine)).sum(-1).mean())
    targets = rows[:, 1:].reshape(-1)
    excess = F.nll_loss(mine.flatten(0, 1), targets) - F.nll_loss(full.flatten(0, 1), targets)
    assert chosen.skip_ratio_all == pytest.approx(run.report.skip_ratio_all)
    # The measured sum leaves out the steps of the warm-up, where the two differ by rounding alone.
    assert chosen.kl == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert chosen.excess_nll == pytest.approx(float(excess), rel=1e-3, abs=1e-5)
    assert chosen.kl_high <= 0.05


def test_the_full_model_runs_once_for_all_points(
    worded: LoadedModel, gated: SkipProfile, worded_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    original: Any = type(worded.model).forward

    def counted(self: Any, *args: Any, **named: Any) -> Any:
        widths.append(named["input_ids"].shape[1])
        return original(self, *args, **named)

    monkeypatch.setattr(type(worded.model), "forward", counted)
    config = TuneConfig(
        data_files=[str(worded_text)], prompts=6, prompt_tokens=24, max_kl=0.5, rules=["static"], batch_size=2
    )  # fmt: skip
    found = tune_profile(worded, gated, config).tuning
    assert found is not None and len(found.points) > 2
    assert widths.count(24) == 3 * (len(found.points) + 1)  # the blocks are located by a shorter row


def test_the_profile_keeps_the_chosen_policy_and_the_papers(tuned: SkipProfile, gated: SkipProfile) -> None:
    region = (tuned.cosine_policy.cold_s, tuned.cosine_policy.cold_e)
    assert region == (gated.cosine_policy.cold_s, gated.cosine_policy.cold_e)
    assert isinstance(tuned.policy, SkipPolicy | GateSettings | StaticSettings)
    again = SkipProfile.model_validate_json(tuned.to_json())
    assert again.tuning == tuned.tuning and again.policy == tuned.policy


def test_the_table_names_the_chosen_point(tuned: SkipProfile) -> None:
    lines = tuning_table(tuned).splitlines()
    assert sum("<- chosen" in line for line in lines) == 1
    assert max(map(len, lines)) <= 80


def test_the_figure_has_a_line_a_rule_and_the_budget(tuned: SkipProfile) -> None:
    import matplotlib.pyplot as plt

    assert tuned.tuning is not None
    _, ax = plt.subplots()
    plot_pareto(tuned, ax=ax)
    assert len(ax.containers) == len({(p.line, p.warm_up_tokens) for p in tuned.tuning.points})
    assert any(list(line.get_ydata()) == [0.05, 0.05] for line in ax.lines)  # type: ignore[arg-type]
    plt.close("all")


def test_a_static_choice_round_trips_and_skips_its_set(worded: LoadedModel, gated: SkipProfile) -> None:
    assert gated.tuning is None
    for surrogates, method in ((False, "static"), (True, "static+surrogates")):
        settings = StaticSettings(layers=[2, 4], warm_up_tokens=1, surrogates=surrogates)
        policy = gated.static_policy(settings)
        model: Any = worded.model
        with skipping(model, policy=policy, teacher_forced=True) as run:
            model(torch.randint(3, 97, (1, 12)), use_cache=False)
        assert policy.method == method
        assert run.report.skipped_per_layer == (0, 0, 10, 0, 10, 0, 0, 0)


def test_rules_that_need_a_gate_are_refused_without_one(
    worded: LoadedModel, worded_profile: SkipProfile, worded_text: Path
) -> None:
    config = TuneConfig(data_files=[str(worded_text)], prompt_tokens=24, max_kl=0.1, rules=["gate"])
    with pytest.raises(ConfigError, match="needs a gate"):
        tune_profile(worded, worded_profile, config)


def test_the_rule_by_damage_is_followed_and_can_be_chosen(
    worded: LoadedModel, worded_profile: SkipProfile, worded_text: Path
) -> None:
    """Its own points, at the warm-ups asked for; the paper's rule stays what it was."""
    config = TuneConfig(
        data_files=[str(worded_text)], prompts=6, prompt_tokens=24, max_kl=50.0, warm_up_tokens=[2, 6],
        rules=["ffn-skip+damage"],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="which this profile lacks; run: skipcal profile --by-damage"):
        tune_profile(worded, worded_profile, config)
    layers = worded_profile.model.num_layers
    policy = SkipPolicy(
        cold_s=1, cold_e=layers - 1, threshold=2.0, max_skips=2, tolerances=(1.0, 3.0) * (layers // 2)
    )
    points = [
        OperatingPoint(target_skip_ratio=at, threshold=threshold, predicted_skip_ratio=at,
                       realised_skip_ratio=at)
        for at, threshold in ((0.1, 0.99), (0.3, 0.5))
    ]  # fmt: skip
    rule = DamageRule(excess_nll=[0.1] * layers, tokens=5, policy=policy, operating_points=points)
    weighed = worded_profile.model_copy(update={"damage_rule": rule})
    found = tune_profile(worded, weighed, config)
    assert found.tuning is not None
    own = [p for p in found.tuning.points if p.rule == "ffn-skip+damage"]
    assert [(p.threshold, p.max_skips, p.warm_up_tokens) for p in own] == [
        (0.99, 2, 2), (0.5, 2, 2), (0.99, 2, 6), (0.5, 2, 6)
    ]  # fmt: skip
    chosen = found.tuning.points[found.tuning.chosen]
    assert chosen.skip_ratio_all == max(p.skip_ratio_all for p in own) > 0
    assert found.policy == replace(policy, threshold=0.5, warm_up_tokens=2) == found.policy_for()
    assert found.cosine_policy == worded_profile.cosine_policy
    again = SkipProfile.model_validate_json(found.to_json())
    assert again.policy == found.policy


def test_a_search_without_a_budget_is_refused() -> None:
    from skipcal.configs.tune import load_tune

    with pytest.raises(ConfigError, match="there is no budget; give --max-kl"):
        load_tune(None, {})
    with pytest.raises(ConfigError, match="rule 'gates' is not one of gate, cosine"):
        load_tune(None, {"max_kl": 0.1, "rules": ["gates"]})
