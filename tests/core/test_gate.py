"""The rule `gate`: scores by the formula, thresholds at both ends, what a policy refuses."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from gated import NEW, PROMPT, gates_for, generated, random_gates, surrogates_for

from skipcal.core.gate import NEVER, GatePolicy, GateRule, Gates, GateState
from skipcal.core.surrogates import Surrogates
from skipcal.errors import ConfigError, ProfileMismatch
from skipcal.runtime.session import skipping

HIDDEN = 32


def naive_score(gates: Any, place: int, h: torch.Tensor) -> float:
    """The formula of core/gate.py in float64, one token."""
    token = h.double()
    norm = max(math.sqrt(float(token @ token)), torch.finfo(torch.float32).tiny)
    u = math.sqrt(len(token)) * token / norm
    weight = gates.weight[place].double()
    return float(weight @ u) + float(gates.log_norm_weight[place]) * math.log(norm) + float(gates.bias[place])


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_scores_are_the_formulas_alone_and_in_a_batch(size: float) -> None:
    """Sums of 32 products of about 1 in float32 are off by less than 1e-5."""
    gates = random_gates((1, 3))
    rule = GateRule(gates, 0.0)
    h = size * torch.randn(7, HIDDEN)
    for place, layer in enumerate(gates.layers):
        together = rule.scores(layer, h)
        assert isinstance(together, torch.Tensor)
        for n, token in enumerate(h):
            alone = rule.scores(layer, token[None])
            assert isinstance(alone, float)
            expected = naive_score(gates, place, token)
            assert alone == pytest.approx(expected, abs=1e-5)
            assert float(together[n]) == pytest.approx(expected, abs=1e-5)


def test_streams_of_half_precision_are_scored_in_float32() -> None:
    gates = random_gates((0,))
    h = torch.randn(5, HIDDEN).bfloat16()
    found = GateRule(gates, 0.0).scores(0, h)
    assert isinstance(found, torch.Tensor)
    expected = [naive_score(gates, 0, token) for token in h]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_zero_vector_has_a_score() -> None:
    gates = random_gates((0,))
    rule = GateRule(gates, 0.0)
    zeros = torch.zeros(2, HIDDEN)
    expected = naive_score(gates, 0, zeros[0])
    assert math.isfinite(expected)
    assert rule.scores(0, zeros[:1]) == pytest.approx(expected, rel=1e-6)
    assert torch.as_tensor(rule.scores(0, zeros)).tolist() == pytest.approx([expected] * 2, rel=1e-6)


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_score_at_the_threshold_does_not_skip(tokens: int) -> None:
    gates = random_gates((2,))
    h = torch.randn(1, HIDDEN).expand(tokens, -1)
    # Of a single token it is a Python float, which a tensor in between would round.
    found = GateRule(gates, 0.0).scores(2, h)
    score = found if isinstance(found, float) else found[0].item()
    for threshold, expected in ((score, False), (score + 1e-4, True)):
        rule = GateRule(gates, threshold)
        state = GateState(on_device=False)
        skip, _ = rule.before(2, state, h)
        assert torch.as_tensor(skip).flatten().tolist() == [expected] * tokens


def test_without_candidates_no_layer_is_asked() -> None:
    gates = random_gates((1, 2))
    none = Gates((), gates.weight[:0], gates.log_norm_weight[:0], gates.bias[:0])
    assert not GateRule(none, 0.0).layers


def test_minus_infinity_is_the_full_model_bit_for_bit(tiny: Any) -> None:
    policy = GatePolicy(
        gates=gates_for(tiny), surrogates=surrogates_for(tiny), threshold=NEVER, warm_up_tokens=0
    )
    plain, _ = generated(tiny, None)
    inside, report = generated(tiny, policy)
    assert torch.equal(plain.sequences, inside.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, inside.logits, strict=True))
    assert report.skipped_blocks == 0 and report.decode_steps == NEW - 1
    assert policy.method == report.method == "full"


def test_infinity_skips_every_candidate_and_no_other_layer(tiny: Any) -> None:
    policy = GatePolicy(
        gates=gates_for(tiny), surrogates=surrogates_for(tiny), threshold=math.inf, warm_up_tokens=2
    )
    _, report = generated(tiny, policy)
    after = NEW - 1 - 2
    assert report.skipped_per_layer == (0, after, after, 0)
    assert report.skip_ratio == 0.5
    assert report.method == "gate"


def test_without_surrogates_a_skipped_block_adds_nothing(tiny: Any) -> None:
    """All candidates skipped without surrogates: the same as a model whose FFNs there return zeros."""
    policy = GatePolicy(
        gates=gates_for(tiny), surrogates=Surrogates({}), threshold=math.inf, warm_up_tokens=0
    )
    text = torch.tensor([[*PROMPT, 9, 60, 33]])
    with skipping(tiny, policy=policy, teacher_forced=True, prompt_tokens=1):
        skipped = tiny(text).logits
    for layer in (1, 2):
        tiny.model.layers[layer].mlp.down_proj.weight.zero_()
    # The first position is the prefill, and later ones attend to it.
    first = tiny(text).logits
    assert not torch.allclose(skipped, first)
    with skipping(tiny, policy=policy, teacher_forced=True, prompt_tokens=1):
        torch.testing.assert_close(tiny(text).logits, first)


def test_policies_refuse_what_no_score_can_be_compared_with(tiny: Any) -> None:
    parts: Any = {"gates": gates_for(tiny), "surrogates": surrogates_for(tiny)}
    with pytest.raises(ConfigError, match="nan is no number"):
        GatePolicy(**parts, threshold=math.nan, warm_up_tokens=0)
    with pytest.raises(ConfigError, match="warm_up_tokens -1 is negative"):
        GatePolicy(**parts, threshold=0.0, warm_up_tokens=-1)
    foreign = GatePolicy(
        gates=random_gates((1, 7)), surrogates=surrogates_for(tiny), threshold=0.0, warm_up_tokens=0
    )
    with (
        pytest.raises(ProfileMismatch, match="layer 7 lies beyond the model's 4"),
        skipping(tiny, policy=foreign),
    ):
        pass


def test_a_policys_words_tell_it_from_others(tiny: Any) -> None:
    def words(**changes: Any) -> str:
        parts = {
            "gates": gates_for(tiny),
            "surrogates": surrogates_for(tiny),
            "threshold": 0.5,
            "warm_up_tokens": 3,
        }
        return json.dumps(GatePolicy(**{**parts, **changes}).to_dict(), sort_keys=True, allow_nan=False)

    shifted = gates_for(tiny)
    shifted.bias[0] += 0.1
    other = surrogates_for(tiny)
    other.maps[1].bias[0] += 0.1
    moved = Surrogates({1: other.maps[1], 3: other.maps[2]})
    told = [
        words(), words(threshold=0.6), words(threshold=NEVER), words(threshold=math.inf),
        words(warm_up_tokens=4), words(gates=shifted), words(gates=random_gates((1, 3))),
        words(surrogates=other), words(surrogates=moved), words(surrogates=Surrogates({})),
    ]  # fmt: skip
    assert len(set(told)) == len(told)
    assert words() == told[0]
