"""Models whose rotary angles depend on the length of the text: generate() prefills them anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import attentive, lively, word_tokenizer
from sessions import Heard
from transformers import DynamicCache, StoppingCriteria

from skipcal.arch.blocks import parallel_limit
from skipcal.arch.loading import LoadedModel
from skipcal.calibrate.pipeline import calibrate_model
from skipcal.configs.run import ProfileConfig
from skipcal.core.policy import SkipPolicy
from skipcal.errors import ConfigError, SessionError
from skipcal.runtime.session import skipping

SWITCH = 16  # tokens up to which the short factors hold
TEXT = torch.tensor([[5, 17, 31, 8, 44, 9]])
FULL = SkipPolicy(cold_s=1, cold_e=4, threshold=2.0, warm_up_tokens=3)
SOME = SkipPolicy(cold_s=0, cold_e=4, threshold=0.5, warm_up_tokens=3)
ALWAYS = SkipPolicy(cold_s=1, cold_e=4, threshold=-1.0, warm_up_tokens=3)


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


@pytest.fixture
def phi() -> Any:
    head_dim = 8
    scaling = rope(
        "longrope", original_max_position_embeddings=SWITCH, factor=8.0,
        short_factor=[1.0] * (head_dim // 2), long_factor=[6.0] * (head_dim // 2),
    )  # fmt: skip
    model: Any = attentive(lively("phi3", original_max_position_embeddings=SWITCH, **scaling))
    assert model.config.hidden_size // model.config.num_attention_heads == head_dim
    return model


@pytest.fixture
def dynamic() -> Any:
    scaling = rope("dynamic", factor=4.0)
    return attentive(lively("llama", max_position_embeddings=SWITCH, **scaling))


def decoded(model: Any, tokens: int, text: torch.Tensor = TEXT, **options: Any) -> torch.Tensor:
    options = {"do_sample": False, **options}
    output: torch.Tensor = model.generate(
        text, attention_mask=torch.ones_like(text), max_new_tokens=tokens, min_new_tokens=tokens, **options
    )
    return output


def by_hand(model: Any, tokens: int, policy: SkipPolicy) -> tuple[list[int], tuple[int, ...]]:
    """A loop that begins anew where generate() does, and gives the rule the steps as they are counted."""
    text, cache = TEXT.clone(), None
    skipped = [0] * 4
    for emitted in range(tokens):
        anew = emitted == 0 or text.shape[1] == SWITCH + 1
        if anew:
            cache = DynamicCache(config=model.config)
            out = model(text, past_key_values=cache, use_cache=True)
        else:
            left = max(0, policy.warm_up_tokens - (emitted - 1))
            step_policy = SkipPolicy(
                cold_s=policy.cold_s, cold_e=policy.cold_e, threshold=policy.threshold, warm_up_tokens=left
            )
            with skipping(model, policy=step_policy, engine="eager") as run:
                out = model(text[:, -1:], past_key_values=cache, use_cache=True)
            skipped = [a + b for a, b in zip(skipped, run.report.skipped_per_layer, strict=True)]
        text = torch.cat([text, out.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return text[0].tolist(), tuple(skipped)


@pytest.mark.parametrize("engine", ["auto", "eager", "recorded", "graph"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_without_skips_it_is_plain_generate_past_the_switch(phi: Any, engine: str, options: Any) -> None:
    torch.manual_seed(1)
    plain = decoded(phi, 20, **options)
    torch.manual_seed(1)
    with skipping(phi, policy=FULL, engine=engine) as run:
        assert torch.equal(decoded(phi, 20, **options), plain)
    rows = options.get("num_beams", options.get("num_return_sequences", 1))
    assert run.report.decode_steps == 19 * rows
    assert run.report.decode_steps_after_warm_up == (19 - 3 - 1) * rows


@pytest.mark.parametrize("policy", [SOME, ALWAYS])
def test_it_skips_before_the_switch_and_after_it(phi: Any, policy: SkipPolicy) -> None:
    """The prefill in between is the full model's; steps and warm-up are not counted anew."""
    tokens, skipped = by_hand(phi, 20, policy)
    with skipping(phi, policy=policy) as run:
        assert decoded(phi, 20)[0].tolist() == tokens
    assert run.report.skipped_per_layer == skipped
    if policy is ALWAYS:
        assert skipped == (0, 0, 15, 15)
        assert run.report.skip_ratio == 0.5
        assert run.report.skip_ratio_all == 30 / (4 * 19)


def test_rows_that_are_over_are_not_counted_at_the_switch(phi: Any) -> None:
    class FirstRowEnds(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.tensor([input_ids.shape[1] >= 6 + 4, False])

    with skipping(phi, policy=FULL) as run:
        decoded(phi, 20, torch.cat([TEXT, TEXT + 20]), stopping_criteria=[FirstRowEnds()])
    assert run.report.decode_steps == 3 + 19


def test_decoding_without_a_cache_is_refused_still(phi: Any) -> None:
    own = type(phi).prepare_inputs_for_generation

    def forgetful(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return own(phi, input_ids, **{**kwargs, "past_key_values": None, "next_sequence_length": None})

    phi.prepare_inputs_for_generation = forgetful
    with skipping(phi, policy=ALWAYS), pytest.raises(SessionError, match="needs a cache"):
        decoded(phi, 6)


# Teacher forcing


def test_one_pass_below_the_switch_is_decoding(phi: Any) -> None:
    with skipping(phi, policy=SOME) as stepped:
        text = decoded(phi, SWITCH + 1 - 6)
    with skipping(phi, policy=SOME, teacher_forced=True, prompt_tokens=6) as forced:
        logits = phi(text[:, :SWITCH], use_cache=False).logits
    assert logits[0, 5:].argmax(-1).tolist() == text[0, 6:].tolist()
    assert forced.report.skipped_per_layer == stepped.report.skipped_per_layer


def test_one_pass_is_decoding_where_the_prompt_is_past_the_switch(phi: Any) -> None:
    prompt = torch.arange(3, 3 + SWITCH + 1)[None]
    with skipping(phi, policy=SOME) as stepped:
        text = decoded(phi, 9, prompt)
    with skipping(phi, policy=SOME, teacher_forced=True, prompt_tokens=SWITCH + 1) as forced:
        logits = phi(text[:, :-1], use_cache=False).logits
    assert logits[0, SWITCH:].argmax(-1).tolist() == text[0, SWITCH + 1 :].tolist()
    assert forced.report.skipped_per_layer == stepped.report.skipped_per_layer


@pytest.mark.parametrize("prompt_tokens", [1, SWITCH, [SWITCH + 1, SWITCH]])
def test_one_pass_over_the_switch_is_refused(phi: Any, prompt_tokens: Any) -> None:
    rows = 1 if isinstance(prompt_tokens, int) else 2
    ids = torch.arange(3, 3 + SWITCH + 2).expand(rows, -1)
    with skipping(phi, policy=SOME, teacher_forced=True, prompt_tokens=prompt_tokens):
        phi(ids[:, :SWITCH], use_cache=False)
        padded = torch.ones(rows, SWITCH + 1, dtype=torch.long)
        padded[:, 0] = 0
        phi(ids[:, : SWITCH + 1], attention_mask=padded, use_cache=False)
        with pytest.raises(SessionError, match=f"{SWITCH + 1} tokens .* past {SWITCH}"):
            phi(ids[:, : SWITCH + 1], use_cache=False)


def test_dynamic_angles_are_those_of_the_prompt_or_of_no_pass(dynamic: Any) -> None:
    ids = torch.arange(3, 3 + SWITCH + 3)[None]
    with skipping(dynamic, policy=ALWAYS, teacher_forced=True, prompt_tokens=4):
        dynamic(ids[:, :SWITCH], use_cache=False)
        with pytest.raises(SessionError, match=f"past {SWITCH}"):
            dynamic(ids[:, : SWITCH + 1], use_cache=False)
    with skipping(dynamic, policy=ALWAYS, teacher_forced=True, prompt_tokens=SWITCH + 2):
        dynamic(ids[:, : SWITCH + 2], use_cache=False)
        with pytest.raises(SessionError, match=f"past {SWITCH + 2}"):
            dynamic(ids, use_cache=False)


@pytest.mark.parametrize("mode", ["generate", "prefill"])
def test_a_profile_of_rows_past_the_switch_is_refused_before_any_text_is_read(phi: Any, mode: str) -> None:
    loaded = LoadedModel(model=phi, tokenizer=word_tokenizer(), name="phi", revision=None)
    cut = SWITCH + 1 if mode == "prefill" else 6
    rows: Any = {"mode": mode, "prompt_tokens": cut, "new_tokens": SWITCH - 5, "warm_up_tokens": 2}
    with pytest.raises(ConfigError, match=f"{SWITCH + 1} tokens .* past {SWITCH}; lower --prompt-tokens"):
        calibrate_model(loaded, ProfileConfig(data_files=["none.txt"], **rows))


def test_the_limit_is_the_narrowest_of_the_layers(phi: Any, dynamic: Any, tiny: Any) -> None:
    assert parallel_limit(tiny.config, 1) is None
    assert parallel_limit(phi.config, SWITCH) == SWITCH
    assert parallel_limit(phi.config, SWITCH + 1) is None
    assert parallel_limit(dynamic.config, 1) == SWITCH
    both = {"full_attention": phi.config.rope_parameters, "sliding_attention": {"rope_type": "default"}}
    phi.config.rope_parameters = both
    assert parallel_limit(phi.config, 1) == SWITCH


def test_a_streamer_sees_each_token_once(phi: Any) -> None:
    streamer = Heard()
    with skipping(phi, policy=SOME):
        output = decoded(phi, 20, streamer=streamer)
    assert streamer.seen == [*output[0].tolist(), -1]
