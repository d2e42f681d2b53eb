"""A whole measurement of the tiny shape: what is forced, what is read, what is compared with what."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from gated import random_gates

from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import locate
from skipcal.configs.bench import BenchConfig, load_bench
from skipcal.core.gate import GatePolicy
from skipcal.core.host import PassTokens
from skipcal.core.surrogates import Surrogates
from skipcal.errors import ConfigError, SkipcalError, TargetOutOfReach
from skipcal.files.writing import dump_json
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping
from skipcal.speed import bench, shapes
from skipcal.speed.arms import Run
from skipcal.speed.bench import Subject, check_shape, load_subject, run_bench
from skipcal.speed.compared import Compared
from skipcal.speed.cost import StepBytes
from skipcal.speed.forced import ForcedGate
from skipcal.speed.table import to_text
from skipcal.speed.timing import Spread, Timing

FFN_BYTES = 4 * (3 * 32 * 48 + 32)  # of a tiny layer, with its norm


def arms(case: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [arm for arm in case["arms"] if arm["arm"] == name]


def test_the_document_has_its_fields(result: dict[str, Any]) -> None:
    assert json.loads(dump_json(result)) == result
    assert result["format"] == "skipcal.bench/1"
    assert result["note"] == "random weights: speed only, no quality"
    assert result["model"]["name"] == "tiny" and result["model"]["num_layers"] == 8
    assert result["settings"]["ratios"] == [0.1, 0.25, 0.5]
    assert result["copy_gb_per_s"]["median"] > 0
    assert result["peak_memory"]["of"] == "process" and result["peak_memory"]["bytes"] > 2**20
    assert {"cpu", "torch", "transformers", "skipcal", "made_at"} <= set(result["environment"])
    assert [(c["batch_size"], c["context_tokens"]) for c in result["cases"]] == [(1, 8), (2, 8)]
    assert "left out" in result["peers"]


def test_the_ratio_is_forced_exactly(result: dict[str, Any]) -> None:
    for case in result["cases"]:
        assert [arm["skip_ratio"] for arm in arms(case, "skipping")] == pytest.approx([0.1, 0.25, 0.5])
        assert arms(case, "watching")[0]["skip_ratio"] == 0.0
        assert arms(case, "full")[0]["skip_ratio"] == 0.0
    assert arms(result["cases"][0], "skipping")[0]["skips"] == pytest.approx({"0": 0.2, "1": 0.8})


def test_bytes_and_the_ideal_follow_from_what_was_skipped(result: dict[str, Any]) -> None:
    for case in result["cases"]:
        total = case["weight_bytes_per_step"] + case["kv_cache_bytes_per_step"]
        # Four steps read 9 to 12 tokens of 8 layers: 2 heads of 8 numbers, keys and values.
        assert case["kv_cache_bytes_per_step"] == case["batch_size"] * 10.5 * 8 * 2 * 16 * 4
        for arm, skips in zip(arms(case, "skipping"), (0.8, 2, 4), strict=True):
            assert arm["bytes_per_step"] == pytest.approx(total - skips * FFN_BYTES)
            assert arm["ideal_speed_up"] == pytest.approx(total / (total - skips * FFN_BYTES))
        assert arms(case, "plain")[0]["bytes_per_step"] == total


def test_every_number_follows_from_the_times(result: dict[str, Any]) -> None:
    for case in result["cases"]:
        for arm in case["arms"]:
            step = arm["step_ms"]["median"]
            own, plain = arm["speed_up_over_full"]["median"], arm["speed_up_over_plain"]["median"]
            assert arm["realised_over_ideal"] == pytest.approx(own / arm["ideal_speed_up"])
            assert arm["realised_over_ideal_from_plain"] == pytest.approx(plain / arm["ideal_speed_up"])
            assert arm["tok_per_s"] == pytest.approx(case["batch_size"] * 1e3 / step)
            gb_per_s = arm["bytes_per_step"] / step / 1e6
            assert arm["share_of_copy_bandwidth"] == pytest.approx(
                gb_per_s / result["copy_gb_per_s"]["median"]
            )
            assert arm["step_ms"]["rounds"] == 2
            assert arm["prefill_s"]["min"] <= arm["prefill_s"]["median"] <= arm["prefill_s"]["max"]


def test_a_speed_up_is_the_median_of_the_rounds_own() -> None:
    """The third round ran on a machine at half speed: it counts like the others."""

    def runs(*rounds: tuple[float, ...]) -> list[Run]:
        return [Run(Timing(0.5, steps), None) for steps in rounds]

    measured = {
        "plain": runs((1.2, 1.0, 9.0), (1.1, 1.1, 1.1), (2.4, 2.4, 2.4)),
        "full": runs((1.0, 1.0, 1.0), (1.0, 1.0, 7.0), (2.0, 2.0, 2.0)),
        "skip-2": runs((0.8, 0.8, 0.8), (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)),
        "skip-3": runs((0.4, 0.4, 0.4), (0.5, 0.5, 0.5), (0.8, 0.8, 0.8)),
    }
    compared = Compared(measured, StepBytes(100, 0), Spread(1e-6, 1e-6, 1e-6, 1), 2, "eager")
    row = compared.row("skipping", (("skip-2", 0.75), ("skip-3", 0.25)))
    steps = [0.75 * 0.8 + 0.25 * 0.4, 0.5, 0.75 * 1.0 + 0.25 * 0.8]  # of each round
    over_full = sorted([1.0 / steps[0], 1.0 / steps[1], 2.0 / steps[2]])
    assert row["speed_up_over_full"] == pytest.approx(
        {"median": over_full[1], "min": over_full[0], "max": over_full[2], "rounds": 3}
    )
    over_plain = sorted([1.2 / steps[0], 1.1 / steps[1], 2.4 / steps[2]])
    assert row["speed_up_over_plain"]["median"] == pytest.approx(over_plain[1])
    assert row["step_ms"]["median"] == pytest.approx(1e3 * (0.75 * 0.8 + 0.25 * 0.5))
    assert row["tok_per_s"] == pytest.approx(2 / (0.75 * 0.8 + 0.25 * 0.5))


def test_the_model_is_left_as_it_was() -> None:
    config = BenchConfig(
        shape="tiny", device="cpu", ratios=[0.25], new_tokens=3, rounds=1, context_tokens=[4]
    )
    subject = load_subject(config)
    before = dict(vars(subject.model))
    run_bench(config, subject)
    assert vars(subject.model) == before


def test_an_engine_that_skips_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from skipcal.speed import arms as module

    def one_less(model: Any, *, policy: Any, **options: Any) -> Any:
        fewer = max((policy.max_skips or 0) - 1, 0)
        return skipping(model, policy=replace(policy, max_skips=fewer), **options)

    monkeypatch.setattr(module, "skipping", one_less)
    config = BenchConfig(
        shape="tiny", device="cpu", ratios=[0.25], new_tokens=3, rounds=1, context_tokens=[4]
    )
    with pytest.raises(SkipcalError, match=r"a skip ratio of 0.25 was to be forced, 0.125 was counted"):
        run_bench(config, load_subject(config))


def test_a_profiles_gate_skips_the_forced_ratio_and_its_surrogates_are_read(
    gated: SkipProfile, worded: LoadedModel
) -> None:
    config = BenchConfig(
        profile="gated.json", device="cpu", ratios=[0.25, 0.5], new_tokens=4, rounds=1, context_tokens=[4]
    )
    subject = Subject(worded.model, "worded", random_weights=False, profile=gated)
    result = run_bench(config, subject)
    (case,) = result["cases"]
    total = case["weight_bytes_per_step"] + case["kv_cache_bytes_per_step"]
    assert arms(case, "watching")[0]["skip_ratio"] == 0
    surrogate = gated.tensors().surrogates.weight_bytes(1)
    saved = locate(worded.model).blocks[1].weight_bytes - surrogate
    assert 0 < surrogate < saved
    for arm, skips in zip(arms(case, "skipping"), (2, 4), strict=True):
        assert arm["skip_ratio"] == skips / 8
        assert arm["bytes_per_step"] == pytest.approx(total - skips * saved)
    assert "rule gate with the surrogates of gated.json" in to_text(result)
    config = BenchConfig(profile="gated.json", device="cpu", ratios=[0.8], context_tokens=[4])
    with pytest.raises(TargetOutOfReach, match=r"the gate may skip 6 of 8 FFNs; .* up to 0\.750"):
        run_bench(config, subject)


def test_a_shape_can_have_a_random_gate() -> None:
    config = BenchConfig(
        shape="tiny", rule="gate", device="cpu", ratios=[0.75], new_tokens=3, rounds=1, context_tokens=[4]
    )
    check_shape(config)
    subject = load_subject(config)
    result = run_bench(config, subject)
    total = result["cases"][0]["weight_bytes_per_step"] + result["cases"][0]["kv_cache_bytes_per_step"]
    surrogate = 4 * (2 * 32 * 3 + 32)  # rank 3 is 0.0483 of the FFN's bytes, rank 4 would be 0.0621
    assert arms(result["cases"][0], "skipping")[0]["bytes_per_step"] == pytest.approx(
        total - 6 * (FFN_BYTES - surrogate)
    )
    assert "rule gate, random" in to_text(result)
    with pytest.raises(TargetOutOfReach, match="the gate may skip 6 of 8 FFNs"):
        check_shape(config.model_copy(update={"ratios": [0.8]}))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8])
def test_a_forced_gate_skips_so_many_candidates_spread_over_the_layers(count: int) -> None:
    gates = random_gates(tuple(range(1, 9)))
    policy = GatePolicy(gates=gates, surrogates=Surrogates({}), threshold=0.3, warm_up_tokens=25)
    forced = ForcedGate(policy, 10).skipping(count)
    assert isinstance(forced, GatePolicy) and forced.warm_up_tokens == 0
    rule = forced.make_rule()
    stream = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * 1e3
    state = rule.start(PassTokens(torch.ones(5, dtype=torch.bool)), torch.device("cpu"))
    skips = torch.stack([torch.as_tensor(rule.before(layer, state, stream)[0]) for layer in range(1, 9)])
    assert (skips == skips[:, :1]).all()  # every token alike
    chosen = skips[:, 0].nonzero().flatten().tolist()
    assert len(chosen) == count
    if count:
        assert max(b - a for a, b in pairwise([-1, *chosen, 8])) <= math.ceil(8 / count)
    assert gates.bias.abs().max() < 10  # the profile's own are as they were


def test_running_out_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    config = BenchConfig(
        shape="tiny", device="cpu", ratios=[0.25], new_tokens=3, rounds=1, context_tokens=[4]
    )
    subject = load_subject(config)
    monkeypatch.setattr(bench, "interleave", fail)
    with pytest.raises(
        SkipcalError, match=r"1 rows of 7 tokens do not fit the memory; give fewer --batch-size"
    ):
        run_bench(config, subject)


def test_a_shape_larger_than_the_memory_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "free_memory", lambda device: 10_000_000)
    config = BenchConfig(shape="llama-2-7b", device="cpu", dtype="bfloat16")
    with pytest.raises(SkipcalError, match=r"takes 13\.5 GB of weights in bfloat16, 0\.0 GB of cpu memory"):
        load_subject(config)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-3.1-8b", 8_030_261_248),
        ("mistral-7b", 7_248_023_552),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_a_shape_has_the_parameters_of_its_model(name: str, parameters: int) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.shape_config(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape 'llama-7b' is not known; did you mean 'llama-2-7b'"):
        check_shape(BenchConfig(shape="llama-7b"))
    with pytest.raises(TargetOutOfReach, match=r"up to 0\.625"):
        check_shape(BenchConfig(shape="tiny", ratios=[0.7]))
    with pytest.raises(ConfigError, match=r"do not fit the model's context of 512; .* --context-tokens 480"):
        check_shape(BenchConfig(shape="tiny", ratios=[0.5], context_tokens=[500]))
    with pytest.raises(ConfigError, match=r"--shape for random ones"):
        load_bench(None, {"shape": "tiny", "model": "org/name"})
    with pytest.raises(ConfigError, match=r"batch_size 2 is asked for twice"):
        load_bench(None, {"batch_size": [2, 2]})
    with pytest.raises(ConfigError, match=r"--ratios"):
        load_bench(None, {"ratios": [1.5]})
    with pytest.raises(ConfigError, match=r"engine 'warp' is not one of auto"):
        load_bench(None, {"engine": "warp"})
