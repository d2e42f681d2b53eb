"""The whole calibration against a naive one: prompt by prompt, layer by layer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lively

from skipcal.arch.loading import LoadedModel
from skipcal.calibrate.capture import capture
from skipcal.calibrate.damage_rule import damage_policy
from skipcal.calibrate.gather import first_rows
from skipcal.calibrate.pipeline import Calibration, calibrate_model
from skipcal.configs.run import ProfileConfig
from skipcal.errors import ConfigError, TargetOutOfReach
from skipcal.profiles.methods import Ask, make_policy
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping


class Words:
    chat_template = None

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}


@pytest.fixture
def loaded() -> LoadedModel:
    model = lively("llama", num_hidden_layers=8)
    tokenizer: Any = Words()
    return LoadedModel(model=model, tokenizer=tokenizer, name="org/lively", revision=None)


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    paths = []
    for name in ("first", "second"):
        ids = torch.randint(3, 97, (300,), generator=generator).tolist()
        paths.append(tmp_path / f"{name}.txt")
        paths[-1].write_text(" ".join(f"w{n}" for n in ids))
    return [str(path) for path in paths]


def config(texts: list[str], **changes: Any) -> ProfileConfig:
    settings = {"prompts": 6, "prompt_tokens": 8, "new_tokens": 14, "warm_up_tokens": 2, "batch_size": 4}
    return ProfileConfig(data_files=texts, **{**settings, **changes})


def calibrate(loaded: LoadedModel, texts: list[str], **changes: Any) -> Calibration:
    return calibrate_model(loaded, config(texts, **changes))


def naive_cosines(loaded: LoadedModel, prompts: list[list[int]], new_tokens: int) -> list[np.ndarray]:
    """Per prompt, cosines [generated tokens, layers]: one row at a time, no batch, no padding."""
    model: Any = loaded.model
    result = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        text = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
        )
        with capture(model) as recorder:
            model(text)
        result.append(recorder.take()[0][len(prompt) :])
    return result


def prompts_of(texts: list[str], drawn: Calibration) -> list[list[list[int]]]:
    """The prompts behind each trace, found again by the seed."""
    from skipcal.text.corpora import resolve_corpora, sample_corpus

    return [
        sample_corpus(corpus, Words(), prompts=6, prompt_tokens=8, seed=0).prompts
        for corpus in resolve_corpora([], texts)
    ]


def test_statistics_are_those_of_generated_positions_one_row_at_a_time(
    loaded: LoadedModel, texts: list[str]
) -> None:
    result = calibrate(loaded, texts)
    pooled = []
    for trace, prompts in zip(result.traces, prompts_of(texts, result), strict=True):
        expected = np.concatenate(naive_cosines(loaded, prompts, 14))
        np.testing.assert_allclose(trace.cosine, expected, atol=1e-5)
        np.testing.assert_allclose(result.profile.layers[trace.corpus].mean, expected.mean(0), atol=1e-5)
        assert set(trace.position) == set(range(8, 22))
        pooled.append(expected)
    np.testing.assert_allclose(
        result.profile.layers["pooled"].mean, np.concatenate(pooled).mean(0), atol=1e-5
    )


def test_what_follows_an_end_of_sequence_is_not_counted(loaded: LoadedModel, texts: list[str]) -> None:
    free = calibrate(loaded, texts).traces[0]
    prompts = prompts_of(texts, calibrate(loaded, texts))[0]
    model: Any = loaded.model
    ids = torch.tensor(prompts[:1])
    row = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False
    )
    end = int(row[0, 8 + 5])
    model.generation_config.eos_token_id = end
    ended = calibrate(loaded, texts).traces[0]
    first = row[0, 8:].tolist().index(end) + 1  # the end itself is a generated token
    assert (ended.prompt == 0).sum() == first
    np.testing.assert_allclose(
        ended.cosine[ended.prompt == 0], free.cosine[free.prompt == 0][:first], atol=1e-5
    )


def test_the_result_does_not_depend_on_the_batch_size(loaded: LoadedModel, texts: list[str]) -> None:
    one, many = calibrate(loaded, texts, batch_size=1), calibrate(loaded, texts, batch_size=5)
    for a, b in zip(one.traces, many.traces, strict=True):
        np.testing.assert_allclose(a.cosine, b.cosine, atol=1e-5)
        np.testing.assert_array_equal(a.prompt, b.prompt)
    assert one.profile.regions.cold_e == many.profile.regions.cold_e


def test_a_run_is_repeatable(loaded: LoadedModel, texts: list[str]) -> None:
    profiles = [calibrate(loaded, texts).profile.model_dump(exclude={"environment"}) for _ in range(2)]
    assert profiles[0] == profiles[1]


@pytest.mark.parametrize("closed_loop", ["teacher-forced", "decode"])
def test_realised_ratios_are_what_a_session_reports(
    loaded: LoadedModel, texts: list[str], closed_loop: str
) -> None:
    result = calibrate(loaded, texts, closed_loop=closed_loop, cold_s=1, cold_e=7, closed_loop_prompts=3)
    model: Any = loaded.model
    rows = [torch.tensor([prompt]) for corpus in prompts_of(texts, result) for prompt in corpus[:3]]

    def continued(ids: torch.Tensor) -> Any:
        mask = torch.ones_like(ids)
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=14, do_sample=False)

    if closed_loop == "teacher-forced":
        rows = [continued(ids) for ids in rows]
    teacher: dict[str, Any] = {"teacher_forced": True, "prompt_tokens": 8}
    assert len(result.profile.operating_points) == 12  # 0.05 to 0.6: 5 of 8 FFNs can be skipped
    for point in result.profile.operating_points:
        policy = result.profile.policy_for(point.target_skip_ratio)
        with skipping(model, policy=policy, **({} if closed_loop == "decode" else teacher)) as run:
            for ids in rows:
                continued(ids) if closed_loop == "decode" else model(ids, use_cache=False)
        found = run.report.skipped_blocks / (8 * run.report.decode_steps_after_warm_up)
        assert point.realised_skip_ratio == pytest.approx(found, abs=0.004)


def test_prefill_mode_measures_the_text_itself(loaded: LoadedModel, texts: list[str]) -> None:
    result = calibrate(loaded, texts, mode="prefill", prompt_tokens=16, warm_up_tokens=3)
    assert result.profile.calibration.new_tokens == 0
    for trace in result.traces:
        assert set(trace.position) == set(range(1, 16))
        assert len(trace.cosine) == 6 * 15
        assert sum(block.shape[1] for block in trace.after_warm_up(3, slice(2))) == 6 * 12


def test_an_explicit_target_out_of_reach_is_an_error_and_the_default_falls_back(
    loaded: LoadedModel, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(TargetOutOfReach, match=r"allows 0\.125 at most"):
        calibrate(loaded, texts, cold_s=2, cold_e=4, target_skip_ratio=0.25)
    with caplog.at_level(logging.WARNING):
        profile = calibrate(loaded, texts, cold_s=2, cold_e=4).profile
    assert "the policy is for 0.10" in caplog.text
    assert profile.policy == profile.policy_for(0.1)


def test_a_target_between_the_steps_gets_its_own_point(loaded: LoadedModel, texts: list[str]) -> None:
    profile = calibrate(loaded, texts, cold_s=1, cold_e=7, target_skip_ratio=0.33).profile
    assert 0.33 in [point.target_skip_ratio for point in profile.operating_points]
    assert profile.policy == profile.policy_for(0.33)


def test_without_a_closed_loop_the_clean_traces_threshold_stands(
    loaded: LoadedModel, texts: list[str]
) -> None:
    profile = calibrate(loaded, texts, cold_s=1, cold_e=7, closed_loop_prompts=0).profile
    assert profile.calibration.closed_loop is None
    for point in profile.operating_points:
        assert point.realised_skip_ratio is None
        # the highest threshold that reaches the target overshoots by one token's skips at most
        assert 0 <= point.predicted_skip_ratio - point.target_skip_ratio <= 6 / (8 * 12 * 12)


def test_nothing_is_left_on_the_model(loaded: LoadedModel, texts: list[str]) -> None:
    model: Any = loaded.model
    before = [(sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    calibrate(loaded, texts, verify=True, verify_prompts=3)
    after = [(sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert before == after


def naive_loss_of_one(
    model: Any, rows: list[list[int]], first: int, skipped: int | None
) -> tuple[float, int]:
    """Summed loss past the warm-up with one FFN's output taken away there, by a hook: no session, no rule."""
    total, count = 0.0, 0

    def take_away(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.cat((output[:, :first], torch.zeros_like(output[:, first:])), dim=1)

    handle = None if skipped is None else model.model.layers[skipped].mlp.register_forward_hook(take_away)
    for row in rows:
        with torch.no_grad():
            found = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        for place in range(first, len(row) - 1):
            total -= float(found[place, row[place + 1]])
            count += 1
    if handle:
        handle.remove()
    return total, count


def test_a_rule_by_damage_is_measured_and_has_operating_points(loaded: LoadedModel, texts: list[str]) -> None:
    result = calibrate(loaded, texts, by_damage=True)
    profile = result.profile
    rule = profile.damage_rule
    assert rule is not None and rule.policy.tolerances is not None

    rows = [row for trace in result.traces for row in first_rows(trace, 16)]
    full, count = naive_loss_of_one(loaded.model, rows, 8 + 2, None)
    assert rule.tokens == count
    for layer in range(8):
        lost = (naive_loss_of_one(loaded.model, rows, 8 + 2, layer)[0] - full) / count
        assert rule.excess_nll[layer] == pytest.approx(lost, abs=1e-5)

    mean = profile.layers["pooled"].mean
    least = 0.1 * float(np.median(rule.excess_nll[2:7]))
    shares = [(1 - mean[j - 1]) / max(rule.excess_nll[j], least) for j in range(2, 7)]
    assert rule.policy.tolerances[2:7] == pytest.approx([share / min(shares) for share in shares])
    assert (rule.policy.cold_s, rule.policy.cold_e, rule.policy.max_skips) == (1, 7, 2)

    for point in rule.operating_points:
        policy = profile.damage_policy(point.target_skip_ratio)
        with skipping(loaded.model, policy=policy, teacher_forced=True, prompt_tokens=8) as run:
            for row in rows:
                loaded.model(torch.tensor([row]), use_cache=False)
        assert run.report.skip_ratio == pytest.approx(point.realised_skip_ratio, abs=1e-9)


def test_a_rule_by_damage_leaves_the_rest_of_the_profile_as_it_is(
    loaded: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    plain, found = (calibrate(loaded, texts, by_damage=each).profile for each in (False, True))
    assert "damage_rule" not in plain.to_json() and "tolerances" not in plain.to_json()
    assert found.operating_points == plain.operating_points
    assert found.policy == plain.policy
    found.save(tmp_path / "found.json")
    assert SkipProfile.load(tmp_path / "found.json") == found
    ask = Ask(target_skip_ratio=0.25, new_tokens=8, warm_up_tokens=3)
    policy = make_policy("ffn-skip+damage", found, ask)
    assert policy.method == "ffn-skip+damage" and policy.warm_up_tokens == 3
    with pytest.raises(ConfigError, match="--by-damage"):
        make_policy("ffn-skip+damage", plain, ask)


def test_ffns_that_lose_nothing_or_gain_are_no_more_tolerant_than_a_tenth_of_the_median() -> None:
    policy = damage_policy([0.0, 0.9, 0.9, 0.9, 0.9, 0.0], [9.0, 9.0, 0.1, -0.5, 0.1, 9.0], 4)
    assert policy.tolerances == pytest.approx((1, 1, 1, 10, 1, 1))
    assert policy.warm_up_tokens == 4 and policy.method == "full"
