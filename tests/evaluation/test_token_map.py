"""The token map against the naive decoder, against generate(), and against the text."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import lively, word_tokenizer
from gated import PROMPT, gates_for, generated, surrogates_for
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import skipcal
from skipcal.arch.loading import LoadedModel
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.gate import GatePolicy
from skipcal.core.policy import SkipPolicy
from skipcal.core.substituted import Substituted
from skipcal.core.whole_layers import ShortGPT
from skipcal.errors import ConfigError, ProfileMismatch, SessionError
from skipcal.evaluation.token_map import TokenMap, token_map
from skipcal.profiles.methods import skipdecode_for
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping

NEW = 14
FULL = SkipPolicy(cold_s=0, cold_e=4, threshold=2.0, warm_up_tokens=0)


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.no_grad():
        torch.manual_seed(0)
        return lively("llama")


def middling(model: Any) -> float:
    """A cosine that some tokens reach in some layers."""
    return float(np.quantile(oracle.decode(model, PROMPT, FULL, NEW).cosines, 0.7))


def policies(model: Any) -> dict[str, Any]:
    cosine = SkipPolicy(cold_s=1, cold_e=4, threshold=middling(model), warm_up_tokens=3)
    static = ChosenFFNs(method="static", layers=(0, 2), probability=1.0, warm_up_tokens=2)
    maps = surrogates_for(model, (0, 1, 2))
    gate = GatePolicy(gates=gates_for(model), surrogates=maps, threshold=0.0, warm_up_tokens=1)
    return {
        "cosine": cosine,
        "bounded": SkipPolicy(cold_s=0, cold_e=4, threshold=-1.0, warm_up_tokens=0, max_skips=2),
        "gate": gate,
        "static": static,
        "static+surrogates": Substituted(static, maps),
        "cosine+surrogates": Substituted(cosine, maps),
    }


@pytest.mark.parametrize(
    "name", ["cosine", "bounded", "gate", "static", "static+surrogates", "cosine+surrogates"]
)
def test_each_token_skips_what_the_naive_decoder_skips(model: Any, name: str) -> None:
    policy = policies(model)[name]
    expected = oracle.decode(model, PROMPT, policy, NEW)
    found = token_map(
        model, word_tokenizer(), policy, PROMPT + expected.tokens[:-1], prompt_tokens=len(PROMPT)
    )
    rows = [np.flatnonzero(row).tolist() for row in found.skipped]
    assert rows == [[]] * len(PROMPT) + expected.skipped
    assert 0 < sum(map(len, rows)) < 4 * NEW  # neither all nor nothing, or little was tested
    free = len(PROMPT) + policy.warm_up_tokens
    assert found.parts == tuple(
        "prompt" if n < len(PROMPT) else "warm-up" if n < free else "decoded" for n in range(len(rows))
    )
    steps = NEW - 1 - policy.warm_up_tokens
    assert found.skip_ratio == found.report.skip_ratio == pytest.approx(sum(map(len, rows)) / (4 * steps))


@pytest.mark.parametrize("name", ["cosine", "bounded", "gate", "random", "no-input-adaptive", "shortgpt"])
def test_the_map_of_generated_text_has_the_counts_of_generate(model: Any, name: str) -> None:
    made = {
        **policies(model),
        "random": ChosenFFNs(method="random", layers=(0, 1, 2, 3), probability=0.4, warm_up_tokens=2, seed=7),
        "no-input-adaptive": ChosenFFNs(
            method="no-input-adaptive", layers=(1, 2), probability=0.5, warm_up_tokens=0
        ),
        "shortgpt": ShortGPT(removed=(1, 3)),
    }[name]
    output, report = generated(model, made, NEW)
    found = token_map(
        model, word_tokenizer(), made, output.sequences[0, :-1].tolist(), prompt_tokens=len(PROMPT)
    )
    assert tuple(found.skipped.sum(axis=0)) == report.skipped_per_layer
    assert found.skip_ratio == report.skip_ratio > 0
    assert found.report.decode_steps == report.decode_steps == NEW - 1


def test_skipdecode_passes_by_what_its_schedule_says(model: Any) -> None:
    policy = skipdecode_for(0.3, 4, NEW)
    found = token_map(model, word_tokenizer(), policy, list(range(3, 3 + NEW + 1)))
    run = [policy.layers_run(step) for step in range(NEW)]
    # the first layer and the topmost ones run
    expected = [[layer for layer in range(4) if 0 < layer <= 4 - count] for count in run]
    assert [np.flatnonzero(row).tolist() for row in found.skipped] == [[], *expected]
    assert len({*run}) > 1
    assert found.layers == tuple(sorted({layer for layers in expected for layer in layers}))


def test_cosines_are_those_of_the_full_model(model: Any) -> None:
    expected = oracle.decode(model, PROMPT, FULL, NEW)
    policy = SkipPolicy(cold_s=0, cold_e=4, threshold=-1.0, warm_up_tokens=0)
    ids = PROMPT + expected.tokens[:-1]
    found = token_map(model, word_tokenizer(), policy, ids, prompt_tokens=len(PROMPT))
    np.testing.assert_allclose(found.cosine[len(PROMPT) :], expected.cosines, atol=2e-6)
    assert found.skipped[len(PROMPT) :, 1:].all() and not found.skipped[:, 0].any()


def test_most_skips_and_shares_are_of_what_the_policy_can_skip(model: Any) -> None:
    made = policies(model)
    ids = list(range(3, 20))
    for name, layers, most in (
        ("cosine", (1, 2, 3), 2),  # the first FFN of the region arms the token
        ("bounded", (0, 1, 2, 3), 2),
        ("gate", (1, 2), 2),
        ("static+surrogates", (0, 2), 2),
        ("cosine+surrogates", (1, 2, 3), 2),
    ):
        found = token_map(model, word_tokenizer(), made[name], ids, warm_up_tokens=0)
        assert (found.layers, found.most_skips, found.warm_up_tokens) == (layers, most, 0)
        assert found.shares.tolist() == [sum(row) / most for row in found.skipped.tolist()]
    full = token_map(model, word_tokenizer(), FULL, ids)
    assert (full.layers, full.skip_ratio, full.shares.max()) == ((), 0.0, 0.0)


def test_a_frame_has_a_row_for_each_token_and_layer(model: Any) -> None:
    found = token_map(model, word_tokenizer(), policies(model)["cosine"], list(range(3, 12)))
    frame = found.to_frame()
    assert list(frame.columns) == ["token", "piece", "id", "part", "layer", "cosine", "skipped"]
    assert len(frame) == 9 * 4
    row = frame[(frame["token"] == 6) & (frame["layer"] == 2)].iloc[0]
    assert (row["piece"], row["id"], row["part"]) == (" w9", 9, "decoded")
    assert row["cosine"] == found.cosine[6, 2] and row["skipped"] == found.skipped[6, 2]
    assert frame["skipped"].sum() == found.skipped.sum() > 0


def bytes_tokenizer() -> Any:
    """A token for each byte, and a special one before the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(BPE({"<s>": 0, **{c: n + 1 for n, c in enumerate(alphabet)}}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


def test_pieces_join_to_the_text_and_a_character_belongs_to_its_last_token() -> None:
    model = lively("llama", vocab_size=300)
    text = "a é\n🦊\ufffd<s>"
    found = token_map(model, bytes_tokenizer(), FULL, text)
    assert found.text == f"<s>{text}"
    assert found.pieces == (
        "<s>", "a", " ", "", "é", "\n", "", "", "", "🦊", "\ufffd", "", "", "<s>",
    )  # fmt: skip
    cut = found.ids[:-5]  # ends within a character, and the decoder puts a sign for it
    assert token_map(model, bytes_tokenizer(), FULL, cut).pieces[-4:] == ("\n", "\ufffd", "", "")


def test_a_profile_brings_its_policy_and_its_other_points(
    worded: LoadedModel, worded_profile: SkipProfile, gated: SkipProfile
) -> None:
    text = " ".join(f"w{n}" for n in range(3, 40))
    for profile in (worded_profile, gated):
        point = (profile.gate or profile).operating_points[0]
        found = token_map(
            worded.model, worded.tokenizer, profile, text, target_skip_ratio=point.target_skip_ratio
        )
        same = token_map(
            worded.model, worded.tokenizer, profile.policy_for(point.target_skip_ratio), found.ids
        )
        assert found.text == text
        assert found.warm_up_tokens == profile.policy.warm_up_tokens == 2
        np.testing.assert_array_equal(found.skipped, same.skipped)
        free = token_map(worded.model, worded.tokenizer, profile, text, warm_up_tokens=0)
        assert free.parts[:2] == ("prompt", "decoded")
        assert free.report.decode_steps_after_warm_up == 36


def test_what_cannot_be_mapped_is_refused(
    model: Any, worded_profile: SkipProfile, caplog: pytest.LogCaptureFixture
) -> None:
    words = word_tokenizer()

    def wrong(message: str, text: Any = "w3 w4", policy: Any = FULL, **options: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            token_map(model, words, policy, text, **options)

    wrong("has 1 tokens, and 1 of them are the prompt", text="w3")
    wrong("has 2 tokens, and 2 of them", prompt_tokens=2)
    wrong("prompt_tokens 0 is below 1", prompt_tokens=0)
    wrong("pass a profile", target_skip_ratio=0.2)
    wrong("warm_up_tokens -1 is negative", warm_up_tokens=-1)
    wrong("shortgpt has no warm-up", policy=ShortGPT(removed=(1,)), warm_up_tokens=4)
    wrong(r"shape \[1, 3\]", text=torch.tensor([[3, 4, 5]]))
    wrong("token 97 is not within the model's vocabulary of 97", text=[3, 97])
    wrong("the model's context", text=[3] * 5000)
    with pytest.raises(ProfileMismatch):
        token_map(model, words, worded_profile, "w3 w4")
    with skipping(model, policy=FULL, teacher_forced=True), pytest.raises(SessionError, match="already"):
        token_map(model, words, FULL, "w3 w4")
    assert not caplog.records
    found = token_map(model, words, FULL, "w3 w4 w5", warm_up_tokens=5)
    assert found.parts == ("prompt", "warm-up", "warm-up")
    assert np.isnan(found.skip_ratio)
    assert "all 3 tokens lie within the prompt of 1 and the warm-up of 5" in caplog.text


def test_only_known_text_can_be_watched(model: Any) -> None:
    with (
        skipping(model, policy=FULL, teacher_forced=True),
        pytest.raises(SessionError, match="teacher_forced=True"),
    ):
        skipping(model, policy=FULL).watch(lambda layer, skip: None)


def test_public_names() -> None:
    assert skipcal.token_map is token_map and skipcal.TokenMap is TokenMap
