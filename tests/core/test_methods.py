"""Each method is asked for by a ratio, and skips that much."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from skipcal.arch.loading import LoadedModel
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.gate import GatePolicy
from skipcal.core.substituted import Substituted
from skipcal.errors import ConfigError, TargetOutOfReach
from skipcal.profiles.methods import (
    METHODS,
    SURROGATES,
    Ask,
    largest,
    make_policy,
    nearest_count,
    recommended_ratio,
)
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping

SHIPPED = SkipProfile.load("smollm2-135m-instruct")


def asked(method: str, ratio: float | None = 0.25, new_tokens: int = 64, **values: Any) -> Any:
    return make_policy(method, SHIPPED, Ask(target_skip_ratio=ratio, new_tokens=new_tokens, **values))


@pytest.mark.parametrize(
    ("ratio", "layers", "count"), [(0.25, 32, 8), (0.05, 32, 2), (0.05, 30, 1), (0.15, 30, 4), (0.001, 30, 1)]
)
def test_a_whole_number_of_layers_comes_closest_ties_to_fewer(ratio: float, layers: int, count: int) -> None:
    assert nearest_count("static", ratio, layers) == count


def test_static_takes_the_largest_cosines_and_shortgpt_the_least_influence() -> None:
    mean = SHIPPED.layers["pooled"].mean
    static = asked("static").layers
    assert len(static) == 7
    assert min(mean[i] for i in static) >= max(m for i, m in enumerate(mean) if i not in static)
    influence = SHIPPED.layers["pooled"].block_influence
    assert influence is not None
    removed = asked("shortgpt").removed
    assert len(removed) == 7
    assert max(influence[i] for i in removed) <= min(b for i, b in enumerate(influence) if i not in removed)


def test_equal_values_are_chosen_by_index() -> None:
    assert largest(np.array([1.0, 2.0, 2.0, 0.5, 2.0]), 2) == (1, 2)


def test_no_input_adaptive_stays_within_the_region() -> None:
    policy = asked("no-input-adaptive")
    region = range(SHIPPED.cosine_policy.cold_s, SHIPPED.cosine_policy.cold_e)
    assert policy.layers == tuple(region)
    assert policy.probability * len(region) / 30 == pytest.approx(0.25)
    assert asked("random").layers == tuple(range(30))


@pytest.mark.parametrize(
    ("method", "ratio", "error", "message"),
    [
        ("ramdom", 0.25, ConfigError, "did you mean 'random'"),
        ("random", 0.0, ConfigError, "fraction within"),
        ("random", 25.0, ConfigError, "fraction within"),
        ("no-input-adaptive", 0.95, TargetOutOfReach, "no-input-adaptive, which can skip 0"),
        ("static", 1.0, TargetOutOfReach, "out of reach for static"),
        ("skipdecode", 0.95, TargetOutOfReach, "out of reach for skipdecode"),
    ],
)
def test_ratios_out_of_reach_are_refused(method: str, ratio: float, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        asked(method, ratio)


def test_a_profile_without_block_influence_says_so() -> None:
    layers = {k: v.model_copy(update={"block_influence": None}) for k, v in SHIPPED.layers.items()}
    with pytest.raises(ConfigError, match="Block Influence"):
        make_policy(
            "shortgpt",
            SHIPPED.model_copy(update={"layers": layers}),
            Ask(target_skip_ratio=0.25, new_tokens=9),
        )


FITTED = ("ffn-skip", "ffn-skip+damage", "gate", "static+fitted")  # what a profile may lack
WITHOUT_GATE = [m for m in METHODS if m not in ("full", *FITTED) and SURROGATES not in m]


WITH_SURROGATES = [m for m in METHODS if SURROGATES in m]


@pytest.mark.parametrize("method", ["gate", *WITH_SURROGATES])
def test_methods_of_a_fitted_profile_skip_what_they_are_asked_for(
    gated: SkipProfile, worded: LoadedModel, method: str
) -> None:
    """Surrogates change later cosines: thresholds that were tuned without them realise more."""
    policy = make_policy(method, gated, Ask(target_skip_ratio=0.25, new_tokens=64, warm_up_tokens=3))
    text = torch.randint(3, 97, (12, 40), generator=torch.Generator().manual_seed(7))
    with skipping(worded.model, policy=policy, teacher_forced=True) as run:
        worded.model(text)
    report = run.report
    assert report.method == method
    assert report.decode_steps_after_warm_up == 12 * (40 - 1 - 3)
    near = 0.1 if method == "ffn-skip+surrogates" else 0.04
    assert report.skip_ratio == pytest.approx(0.25, abs=near)
    block, layer = 4 * (3 * 32 * 48 + 32), 4 * (3 * 32 * 48 + 3 * 32 * 32 + 2 * 32)
    surrogate = 4 * ((3 + 8) * 32 + 3 * 32 + 32 + 8)  # the shared rows, eight of the route, and one map
    saved = sum(
        n * (block - (surrogate if 1 <= i <= 6 else 0)) for i, n in enumerate(report.skipped_per_layer)
    )
    assert report.skip_ratio_bytes == pytest.approx(saved / (8 * layer * report.decode_steps_after_warm_up))


@pytest.mark.parametrize("method", WITH_SURROGATES)
def test_surrogates_change_what_is_added_and_not_what_is_chosen(gated: SkipProfile, method: str) -> None:
    ask = Ask(target_skip_ratio=0.25, new_tokens=64, seed=3)
    policy = make_policy(method, gated, ask)
    assert isinstance(policy, Substituted)
    assert policy.policy == make_policy(method.removesuffix(SURROGATES), gated, ask)
    assert policy.surrogates is gated.tensors().surrogates
    assert policy.warm_up_tokens == 2
    assert method != "random+surrogates" or policy.to_dict()["policy"]["seed"] == 3


def test_without_a_ratio_methods_take_what_the_gate_is_meant_to_skip(gated: SkipProfile) -> None:
    own = make_policy("gate", gated, Ask(target_skip_ratio=None, new_tokens=64))
    assert isinstance(own, GatePolicy) and own.threshold == getattr(gated.policy, "threshold", None)
    assert recommended_ratio(gated) == 0.25
    static = make_policy("static", gated, Ask(target_skip_ratio=None, new_tokens=64))
    assert isinstance(static, ChosenFFNs) and len(static.layers) == 2


@pytest.mark.parametrize("method", ["gate", *WITH_SURROGATES])
def test_without_a_gate_its_methods_say_how_to_get_one(method: str) -> None:
    shipped = SHIPPED.model_copy(update={"gate": None, "paper_policy": None, "policy": SHIPPED.cosine_policy})
    with pytest.raises(ConfigError, match="no gate; fit one with: skipcal fit"):
        make_policy(method, shipped, Ask(target_skip_ratio=0.25, new_tokens=64))


def test_a_gates_ratio_out_of_reach_is_refused(gated: SkipProfile) -> None:
    for ratio in (0.01, 0.7):
        with pytest.raises(TargetOutOfReach, match=r"operating points from 0\.05 to 0\.5"):
            make_policy("gate", gated, Ask(target_skip_ratio=ratio, new_tokens=64))


@pytest.mark.slow
@pytest.mark.parametrize("method", WITHOUT_GATE)
def test_every_baseline_skips_what_it_was_asked_for(smollm: LoadedModel, method: str) -> None:
    model: Any = smollm.model
    ids = torch.tensor([smollm.tokenizer("The harbour of the old town lies")["input_ids"]])
    policy = asked(method, 0.2, new_tokens=48, warm_up_tokens=3)
    with skipping(model, policy=policy) as run:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, min_new_tokens=48,
            do_sample=False,
        )  # fmt: skip
    report = run.report
    assert report.skip_ratio == pytest.approx(0.2, abs=0.02)
    assert report.method == method
    share = report.skip_ratio_bytes / report.skip_ratio
    assert share == pytest.approx(1.0 if report.unit == "layer" else 0.75, abs=0.01)
