"""Random and static FFN choices: a pure function of the token, checked against the naive choice."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import left_padded

from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.runtime.session import skipping

PROMPT = [5, 9, 31, 7]
NEW = 12


def policy(**values: Any) -> ChosenFFNs:
    defaults: dict[str, Any] = {
        "method": "random", "layers": (0, 1, 2, 3), "probability": 0.4, "warm_up_tokens": 2,
    }  # fmt: skip
    return ChosenFFNs(**{**defaults, **values})


def decoded(model: Any, chosen: ChosenFFNs, rows: list[list[int]], new: int = NEW) -> Any:
    with skipping(model, policy=chosen) as run:
        output = model.generate(**left_padded(rows), max_new_tokens=new, do_sample=False)
    return output[:, -new:], run.report


def test_a_static_set_is_the_model_without_these_ffns(tiny: Any) -> None:
    chosen = policy(method="static", layers=(1, 3), probability=1.0, warm_up_tokens=0)
    with skipping(tiny, policy=chosen, teacher_forced=True, prompt_tokens=1) as run:
        got = tiny(torch.tensor([PROMPT]), use_cache=False).logits
    zeroed = copy.deepcopy(tiny)
    for i in (1, 3):
        zeroed.model.layers[i].mlp.down_proj.weight.zero_()
    # The first position is the prefill: with the whole model's keys and values.
    stepped = tiny(torch.tensor([PROMPT[:1]]), use_cache=True).past_key_values
    expected = zeroed(torch.tensor([PROMPT[1:]]), past_key_values=stepped).logits
    torch.testing.assert_close(got[:, 1:], expected, atol=1e-5, rtol=1e-5)
    assert run.report.skipped_per_layer == (0, 3, 0, 3)
    assert run.report.skip_ratio == 0.5


def test_the_byte_share_is_that_of_the_ffns(tiny: Any) -> None:
    _, report = decoded(tiny, policy(method="static", layers=(1, 3), probability=1.0), [PROMPT])
    layer = tiny.model.layers[0]
    ffn = sum(p.numel() for part in (layer.post_attention_layernorm, layer.mlp) for p in part.parameters())
    assert report.skip_ratio_bytes == pytest.approx(0.5 * ffn / sum(p.numel() for p in layer.parameters()))


def test_random_choices_teacher_forced_equal_those_of_decoding(tiny: Any) -> None:
    chosen = policy(seed=3)
    output, stepped = decoded(tiny, chosen, [PROMPT])
    text = torch.tensor([PROMPT + output[0].tolist()[:-1]])
    with skipping(tiny, policy=chosen, teacher_forced=True, prompt_tokens=len(PROMPT)) as run:
        logits = tiny(text, use_cache=False).logits
    assert run.report.skipped_per_layer == stepped.skipped_per_layer
    assert logits[0, len(PROMPT) - 1 :].argmax(-1).tolist() == output[0].tolist()


def test_rows_of_a_batch_choose_as_each_does_alone(tiny: Any) -> None:
    rows = [PROMPT, [3, 8], [40, 2, 2, 60, 11, 12, 13]]
    together, report = decoded(tiny, policy(), rows)
    alone = [decoded(tiny, policy(), [row]) for row in rows]
    assert [row.tolist() for row in together] == [tokens[0].tolist() for tokens, _ in alone]
    assert report.skipped_blocks == sum(each.skipped_blocks for _, each in alone)


def test_the_seed_decides_and_nothing_else(tiny: Any) -> None:
    first, report = decoded(tiny, policy(seed=1), [PROMPT])
    torch.manual_seed(99)
    again, _ = decoded(tiny, policy(seed=1), [PROMPT])
    _, other = decoded(tiny, policy(seed=2), [PROMPT])
    assert torch.equal(first, again)
    assert report.skipped_per_layer != other.skipped_per_layer


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.35, 1.0])
def test_the_realised_ratio_is_the_probability(tiny: Any, probability: float) -> None:
    ids = torch.randint(3, 97, (40, 200))
    chosen = policy(probability=probability, warm_up_tokens=0)
    with skipping(tiny, policy=chosen, teacher_forced=True) as run:
        tiny(ids, use_cache=False)
    blocks = 4 * 40 * 199
    spread = 4 * (probability * (1 - probability) / blocks) ** 0.5  # four standard deviations
    assert run.report.skip_ratio == pytest.approx(probability, abs=spread + 1e-12)
    per_layer = [n / (40 * 199) for n in run.report.skipped_per_layer]
    assert per_layer == pytest.approx([probability] * 4, abs=2 * spread + 1e-12)


def test_layers_draw_independently(tiny: Any) -> None:
    """Equal draws in all layers would skip whole tokens: the pairs must be as rare as chance."""
    ids = torch.randint(3, 97, (1, 200))
    seen = {}
    for layers in ((1,), (2,), (1, 2)):
        with skipping(tiny, policy=policy(layers=layers, probability=0.5), teacher_forced=True) as run:
            tiny(ids, use_cache=False)
        seen[layers] = run.report.skipped_per_layer
    assert seen[(1, 2)][1] == seen[(1,)][1] and seen[(1, 2)][2] == seen[(2,)][2]
    from skipcal.core.chosen_ffns import ChoiceRule
    from skipcal.core.host import PassTokens

    rule = ChoiceRule(policy(probability=0.5))
    tokens = PassTokens(
        active=torch.ones(20000, dtype=torch.bool), step=torch.arange(20000), ids=torch.arange(20000) % 97
    )
    state = rule.start(tokens, torch.device("cpu"))
    unseen = torch.empty(0)
    one, two = rule.before(1, state, unseen)[0], rule.before(2, state, unseen)[0]
    assert float((one & two).double().mean()) == pytest.approx(0.25, abs=0.015)
