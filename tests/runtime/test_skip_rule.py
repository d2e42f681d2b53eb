"""The skip rule against the naive oracle, on tiny models and on the embedded one."""

from __future__ import annotations

from functools import cache
from typing import Any

import oracle
import pytest
import torch
from conftest import lively
from engines import TOLERANCES, policies

from skipcal.arch.loading import LoadedModel
from skipcal.calibrate.capture import capture
from skipcal.core.policy import SkipPolicy
from skipcal.core.report import SkipReport
from skipcal.runtime.session import skipping

PROMPT = [5, 17, 31, 8, 44]
NEW = 8


def generate(
    model: Any, prompt: list[int], policy: SkipPolicy, new: int, **kw: Any
) -> tuple[Any, SkipReport]:
    ids = torch.tensor([prompt])
    with skipping(model, policy=policy) as run:
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **kw,
        )
    return output, run.report


@cache
def middling_threshold(model: Any) -> float:
    """A cosine that some tokens reach in some layers: without one the grid would test nothing."""
    never = SkipPolicy(cold_s=0, cold_e=4, threshold=2.0)
    seen = [c for row in oracle.decode(model, PROMPT, never, NEW).cosines for c in row[:-1]]
    return sorted(seen)[int(0.7 * len(seen))]


def assert_equals_oracle(model: Any, prompt: list[int], policy: SkipPolicy, new: int) -> list[list[int]]:
    expected = oracle.decode(model, prompt, policy, new)
    output, report = generate(model, prompt, policy, new)
    assert output.sequences[0, len(prompt) :].tolist() == expected.tokens
    for mine, theirs in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine[0], theirs, atol=1e-4, rtol=1e-4)
    layers = len(model.model.layers)
    per_layer = [sum(i in skipped for skipped in expected.skipped) for i in range(layers)]
    assert list(report.skipped_per_layer) == per_layer
    assert report.decode_steps == new - 1
    after = max(new - 1 - policy.warm_up_tokens, 0)
    assert report.decode_steps_after_warm_up == after
    if after:
        assert report.skip_ratio == pytest.approx(sum(per_layer) / (layers * after))
    return expected.skipped


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.no_grad():
        torch.manual_seed(0)
        return lively("llama")


@pytest.mark.parametrize("region", [(0, 4), (1, 4), (2, 3), (1, 1)])
@pytest.mark.parametrize("max_skips", [None, 0, 1, 2])
@pytest.mark.parametrize("warm_up", [0, 2, 40])
def test_equals_the_oracle_token_for_token_and_ffn_for_ffn(
    model: Any, region: tuple[int, int], max_skips: int | None, warm_up: int
) -> None:
    for policy in policies(region, max_skips, warm_up, (-1.0, middling_threshold(model), 2.0)):
        assert_equals_oracle(model, PROMPT, policy, NEW)


@pytest.mark.parametrize("region", [(0, 4), (1, 4), (1, 1)])
@pytest.mark.parametrize("max_skips", [None, 0, 1, 2])
def test_with_tolerances_equals_the_oracle(
    model: Any, region: tuple[int, int], max_skips: int | None
) -> None:
    for policy in policies(region, max_skips, 1, (-1.0, middling_threshold(model), 2.0), TOLERANCES):
        assert_equals_oracle(model, PROMPT, policy, NEW)


def test_with_tolerances_a_token_skips_again_after_an_ffn_that_ran() -> None:
    model = lively("llama", num_hidden_layers=10)
    policy = SkipPolicy(
        cold_s=1, cold_e=9, threshold=-1.0, max_skips=2, warm_up_tokens=0, tolerances=(1.0,) * 10
    )
    skipped = assert_equals_oracle(model, PROMPT, policy, NEW)
    assert all(layers == [2, 3, 5, 6, 8] for layers in skipped)


def test_the_grid_has_partial_skipping(model: Any) -> None:
    """The threshold used above skips some FFNs of some tokens: neither none nor all."""
    policy = SkipPolicy(cold_s=0, cold_e=4, threshold=middling_threshold(model), warm_up_tokens=0)
    counts = {len(skipped) for skipped in oracle.decode(model, PROMPT, policy, NEW).skipped}
    assert len(counts) > 1


def test_spent_skips_do_not_re_arm() -> None:
    """A deep model with one skip: FFNs after it run, though their cosines reach the threshold."""
    model = lively("llama", num_hidden_layers=10)
    policy = SkipPolicy(cold_s=1, cold_e=9, threshold=-1.0, max_skips=2, warm_up_tokens=0)
    skipped = assert_equals_oracle(model, PROMPT, policy, NEW)
    assert all(layers == [2, 3] for layers in skipped)


def test_a_cosine_equal_to_the_threshold_arms(model: Any) -> None:
    never = SkipPolicy(cold_s=0, cold_e=4, threshold=2.0, warm_up_tokens=0)
    output, _ = generate(model, PROMPT, never, 2)
    with capture(model) as recorder:
        model.model(input_ids=output.sequences[:, :-1], use_cache=False)
    cosines, _ = recorder.take()
    at = SkipPolicy(cold_s=0, cold_e=2, threshold=float(cosines[-1, 0]), warm_up_tokens=0)
    with skipping(model, policy=at, teacher_forced=True, prompt_tokens=len(PROMPT)) as run:
        model(output.sequences[:, :-1])
    assert run.report.skipped_per_layer == (0, 1, 0, 0)


@pytest.mark.parametrize("warm_up", [0, 1, 2])
def test_warm_up_covers_exactly_the_first_steps(model: Any, warm_up: int) -> None:
    policy = SkipPolicy(cold_s=1, cold_e=3, threshold=-1.0, warm_up_tokens=warm_up)
    _, report = generate(model, PROMPT, policy, 5)
    assert report.skipped_blocks == 4 - warm_up  # layer 2 of each of the four steps past the warm-up


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cold_s", "cold_e", "threshold", "max_skips", "warm_up"),
    [
        (1, 26, 0.98, None, 2),
        (10, 20, 0.975, None, 0),
        (2, 28, 0.97, 2, 3),
        (2, 28, 0.985, 8, 0),
        (1, 29, -1.0, None, 5),
        (1, 29, 1.01, None, 0),
    ],
)
def test_equals_the_oracle_on_the_embedded_model(
    smollm: LoadedModel, cold_s: int, cold_e: int, threshold: float, max_skips: int | None, warm_up: int
) -> None:
    prompt = smollm.tokenizer("The river Danube flows through ten countries and")["input_ids"]
    policy = SkipPolicy(
        cold_s=cold_s, cold_e=cold_e, threshold=threshold, max_skips=max_skips, warm_up_tokens=warm_up
    )
    assert_equals_oracle(smollm.model, prompt, policy, 8)


def teacher_forced(model: Any, ids: torch.Tensor, policy: SkipPolicy, prompt_tokens: int) -> tuple[Any, Any]:
    with skipping(model, policy=policy, teacher_forced=True, prompt_tokens=prompt_tokens) as run:
        logits = model(ids, use_cache=False).logits
    return logits, run.report


def assert_logits_agree(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-4 of the largest logit.

    A parallel pass multiplies matrices where a step multiplies vectors. The full model's own logits
    differ by 5e-5 between the two on the embedded model (largest logit 34), with skips by 2e-4.
    """
    limit = 1e-4 * float(theirs.abs().max())
    torch.testing.assert_close(mine, theirs, atol=limit, rtol=0.0)


@pytest.mark.parametrize("tolerances", [None, TOLERANCES])
@pytest.mark.parametrize("max_skips", [None, 1])
@pytest.mark.parametrize("warm_up", [0, 3])
def test_teacher_forcing_equals_stepping(
    model: Any, max_skips: int | None, warm_up: int, tolerances: tuple[float, ...] | None
) -> None:
    (policy,) = policies((0, 4), max_skips, warm_up, [middling_threshold(model)], tolerances)
    output, stepped = generate(model, PROMPT, policy, NEW)
    text = output.sequences[:, :-1]
    logits, forced = teacher_forced(model, text, policy, len(PROMPT))
    assert_logits_agree(logits[:, len(PROMPT) - 1 :], torch.stack(output.logits, dim=1))
    assert forced.skipped_per_layer == stepped.skipped_per_layer
    assert forced.decode_steps == stepped.decode_steps == NEW - 1
    assert forced.decode_steps_after_warm_up == stepped.decode_steps_after_warm_up


@pytest.mark.slow
def test_teacher_forcing_equals_stepping_on_the_embedded_model(smollm: LoadedModel) -> None:
    prompt = smollm.tokenizer("Lighthouses warn ships of")["input_ids"]
    policy = SkipPolicy(cold_s=1, cold_e=26, threshold=0.98, warm_up_tokens=2)
    output, stepped = generate(smollm.model, prompt, policy, 12)
    logits, forced = teacher_forced(smollm.model, output.sequences[:, :-1], policy, len(prompt))
    assert_logits_agree(logits[:, len(prompt) - 1 :], torch.stack(output.logits, dim=1))
    assert forced.skipped_per_layer == stepped.skipped_per_layer
    assert 0 < forced.skip_ratio < 25 / 30


@pytest.mark.slow
def test_teacher_forcing_is_exact_but_for_rounding(smollm: LoadedModel) -> None:
    """In float64 the difference between a parallel pass and stepping all but vanishes."""
    prompt = smollm.tokenizer("Lighthouses warn ships of")["input_ids"]
    policy = SkipPolicy(cold_s=1, cold_e=26, threshold=0.98, warm_up_tokens=2)
    try:
        smollm.model.double()
        output, _ = generate(smollm.model, prompt, policy, 6)
        text = output.sequences[:, :-1]
        stepped = step_by_step(smollm.model, text, policy, len(prompt))
        logits, _ = teacher_forced(smollm.model, text, policy, len(prompt))
        torch.testing.assert_close(logits[:, len(prompt) - 1 :], stepped, atol=1e-9, rtol=0.0)
    finally:
        smollm.model.float()


def step_by_step(model: Any, text: torch.Tensor, policy: SkipPolicy, prompt_tokens: int) -> torch.Tensor:
    """Logits [batch, steps + 1, vocabulary] of a hand-written loop over a known text."""
    with skipping(model, policy=policy):
        out = model(text[:, :prompt_tokens], use_cache=True)
        logits = [out.logits[:, -1:]]
        for place in range(prompt_tokens, text.shape[1]):
            step = model(text[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(step.logits)
    return torch.cat(logits, dim=1)


def test_padded_teacher_forcing_counts_and_decides_as_each_row_alone(model: Any) -> None:
    policy = SkipPolicy(cold_s=0, cold_e=4, threshold=middling_threshold(model), warm_up_tokens=1)
    rows = [torch.randint(3, 97, (n,)).tolist() for n in (9, 14, 6)]
    alone = [teacher_forced(model, torch.tensor([row]), policy, 3) for row in rows]
    for side in ("left", "right"):
        width = max(map(len, rows))
        ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), 1
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with skipping(model, policy=policy, teacher_forced=True, prompt_tokens=3) as run:
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        summed = [sum(each) for each in zip(*(r.skipped_per_layer for _, r in alone), strict=True)]
        assert list(run.report.skipped_per_layer) == summed
        assert run.report.decode_steps == sum(r.decode_steps for _, r in alone)
        for i, row in enumerate(rows):
            mine = logits[i, -len(row) :] if side == "left" else logits[i, : len(row)]
            torch.testing.assert_close(mine, alone[i][0][0], atol=1e-4, rtol=1e-4)
