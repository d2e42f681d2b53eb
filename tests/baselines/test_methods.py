"""Each method is asked for by a ratio, and skips that much."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from skipcal.arch.loading import LoadedModel
from skipcal.baselines.methods import METHODS, SURROGATES, Ask, largest, make_policy, nearest_count
from skipcal.errors import ConfigError, TargetOutOfReach
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping

SHIPPED = SkipProfile.load("smollm2-135m-instruct")


def asked(method: str, ratio: float | None = 0.25, **values: Any) -> Any:
    return make_policy(method, SHIPPED, Ask(target_skip_ratio=ratio, new_tokens=64, **values))


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


WITHOUT_GATE = [m for m in METHODS if m not in ("full", "ffn-skip", "gate") and SURROGATES not in m]


@pytest.mark.slow
@pytest.mark.parametrize("method", WITHOUT_GATE)
def test_every_baseline_skips_what_it_was_asked_for(smollm: LoadedModel, method: str) -> None:
    model: Any = smollm.model
    ids = torch.tensor([smollm.tokenizer("The harbour of the old town lies")["input_ids"]] * 2)
    policy = asked(method, 0.2, warm_up_tokens=3)
    with skipping(model, policy=policy) as run:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, min_new_tokens=64,
            do_sample=False,
        )  # fmt: skip
    report = run.report
    assert report.skip_ratio == pytest.approx(0.2, abs=0.02)
    assert report.method == method
    share = report.skip_ratio_bytes / report.skip_ratio
    assert share == pytest.approx(1.0 if report.unit == "layer" else 0.75, abs=0.01)
