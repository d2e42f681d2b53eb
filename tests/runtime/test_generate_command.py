"""`skipcal generate` on checkpoints that say more, or know less, than the command asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import refused, run
from conftest import saved, word_tokenizer

from skipcal.arch.limits import check_ids, check_length
from skipcal.arch.loading import LoadedModel, load_model
from skipcal.arch.locate import locate
from skipcal.core.policy import SkipPolicy
from skipcal.errors import ConfigError, Unavailable
from skipcal.evaluation.tasks.answers import Subject, answers
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.greedy import greedy_decoding, overruled, sampled_decoding
from skipcal.text.chat import chat_frame

PROMPT = "w5 w6 w7 w8"
RAISES = "{{ raise_exception('needs a system message') }}"


@pytest.fixture
def folder(worded: LoadedModel, tmp_path: Path) -> Path:
    return Path(saved(worded.model, tmp_path / "model"))


@pytest.fixture
def profile(worded_profile: SkipProfile, tmp_path: Path) -> Path:
    worded_profile.save(tmp_path / "profile.json")
    return tmp_path / "profile.json"


def edit(file: Path, **settings: Any) -> None:
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**found, **settings}))


def command(folder: Path, profile: Path, *more: str) -> tuple[str | Path, ...]:
    return ("generate", "--model", folder, "--profile", profile, "--prompt", PROMPT, *more)


def generated(folder: Path, profile: Path, *more: str) -> tuple[str, str]:
    done = run(*command(folder, profile, "--new-tokens", "12", "--json", *more))
    return json.loads(done.stdout)["text"], done.stderr


# Inputs


def test_inputs_that_a_forward_does_not_take_are_not_made(folder: Path, profile: Path) -> None:
    plain, _ = generated(folder, profile)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    edit(folder / "tokenizer_config.json", model_input_names=names)
    assert generated(folder, profile) == (plain, "")
    loaded = load_model(str(folder))
    assert set(loaded.tokenizer(PROMPT)) == {"input_ids", "attention_mask"}


def test_a_tokenizer_of_ones_own_is_not_changed(worded: LoadedModel) -> None:
    own = word_tokenizer()
    own.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    loaded = LoadedModel(model=worded.model, tokenizer=own, name="tiny", revision=None)
    assert set(loaded.tokenizer(PROMPT)) == {"input_ids", "attention_mask"}
    assert "token_type_ids" in own(PROMPT)
    own.model_input_names = ["input_ids", "attention_mask"]
    assert LoadedModel(worded.model, own, "tiny", None).tokenizer is own


# Settings of the checkpoint


def test_greedy_decoding_is_what_the_command_says_and_what_it_overrules_is_named(
    folder: Path, profile: Path
) -> None:
    plain, said = generated(folder, profile)
    assert said == ""
    settings = {"num_beams": 4, "repetition_penalty": 9.0, "min_new_tokens": 3, "num_return_sequences": 2}
    edit(folder / "generation_config.json", **settings, temperature=0.1, do_sample=True, max_length=20)
    text, said = generated(folder, profile)
    assert text == plain
    assert said == (
        "warning: decoding is greedy; settings of the model that are not used: min_new_tokens 3, "
        "num_beams 4, num_return_sequences 2, repetition_penalty 9.0\n"
    )


def test_sampling_takes_the_distribution_and_nothing_else(folder: Path, profile: Path) -> None:
    plain, _ = generated(folder, profile)
    edit(folder / "generation_config.json", num_beams=4, top_k=1)
    text, said = generated(folder, profile, "--do-sample")
    assert text == plain  # of one token alone
    assert said == "warning: one text is sampled; settings of the model that are not used: num_beams 4\n"
    edit(folder / "generation_config.json", top_k=50, temperature=100.0)
    assert generated(folder, profile, "--do-sample")[0] != plain


def test_the_models_own_settings_are_back_afterwards(worded: LoadedModel) -> None:
    own: Any = worded.model.generation_config
    for decoding in (greedy_decoding, sampled_decoding):
        with pytest.raises(KeyboardInterrupt), decoding(worded.model):
            assert worded.model.generation_config is not own
            raise KeyboardInterrupt
        assert worded.model.generation_config is own
    assert overruled(worded.model) == ""


# Vocabulary, context


def words_up_to(count: int) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{n}": n for n in range(count)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def test_a_tokenizer_that_is_larger_than_the_embeddings_is_refused_with_both_sizes(
    folder: Path, profile: Path
) -> None:
    words_up_to(120).save_pretrained(folder)
    message = "has embeddings of 97 tokens and a tokenizer of 120"
    assert message in refused(*command(folder, profile), code=4)
    with pytest.raises(Unavailable, match=message):
        load_model(str(folder))


def test_a_special_token_beyond_the_embeddings_is_refused_only_where_a_text_has_it(
    folder: Path, profile: Path
) -> None:
    tokenizer = words_up_to(97)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    assert generated(folder, profile)[0]
    message = refused("generate", "--model", folder, "--profile", profile, "--prompt", "w5 <image>", code=2)
    assert "token 97 is not within the model's vocabulary of 97" in message


@pytest.mark.parametrize("stray", [97, -1])
def test_ids_without_an_embedding_are_refused(worded: LoadedModel, stray: int) -> None:
    check_ids(worded.model, [[0, 96]])
    with pytest.raises(ConfigError, match=f"token {stray} is not within the model's vocabulary of 97"):
        check_ids(worded.model, [[0], [1, stray]])
    subject = Subject(worded, locate(worded.model), chat_template=False)
    policy = SkipPolicy(cold_s=1, cold_e=5, threshold=0.0)
    with pytest.raises(ConfigError, match=f"token {stray} "):
        next(answers(subject, policy, {"a": [stray]}, new_tokens=2, batch_size=1))


def test_a_text_that_grows_out_of_the_context_is_refused_before_it_begins(
    folder: Path, profile: Path
) -> None:
    context = load_model(str(folder)).model.config.max_position_embeddings
    message = refused(*command(folder, profile, "--new-tokens", str(context - 3)), code=2)
    assert (
        f"a prompt of 4 tokens and {context - 3} new ones do not fit the model's context of {context}; lower "
        "--new-tokens, or shorten the prompt" in message
    )


def test_a_row_may_fill_the_context(worded: LoadedModel) -> None:
    context = worded.model.config.max_position_embeddings
    check_length(worded.model, context, "it does", lower="it")
    with pytest.raises(ConfigError, match=f"it does not fit the model's context of {context}; lower it"):
        check_length(worded.model, context + 1, "it does", lower="it")


# Chat templates


def test_a_template_that_raises_is_one_line_that_says_how_to_go_on(folder: Path, profile: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template=RAISES)
    message = refused(*command(folder, profile), code=2)
    assert (
        "refuses the conversation (needs a system message); leave the template out with --no-chat" in message
    )
    assert generated(folder, profile, "--no-chat-template")[0]


@pytest.mark.parametrize("template", [RAISES, "{{ messages[0]['content'] / 2 }}", "{% if %}"])
def test_whatever_a_template_raises_is_explained_wherever_one_is_used(
    worded: LoadedModel, template: str
) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    loaded = LoadedModel(worded.model, tokenizer, "tiny", None)
    subject = Subject(loaded, locate(worded.model), chat_template=True)
    with pytest.raises(
        ConfigError, match=r"refuses the conversation .*; leave the template out with --no-chat"
    ):
        subject.encode([{"role": "user", "content": PROMPT}])
    with pytest.raises(ConfigError, match=r"refuses the conversation .*; leave out --chat-template"):
        chat_frame(tokenizer)


# What is typed


def test_a_prompt_file_that_an_editor_marked_is_its_text(folder: Path, profile: Path, tmp_path: Path) -> None:
    plain, _ = generated(folder, profile)
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf" + PROMPT.encode())
    done = run("generate", "--model", folder, "--profile", profile, "--prompt-file", tmp_path / "prompt.txt",
               "--new-tokens", "12", "--json")  # fmt: skip
    assert json.loads(done.stdout)["text"] == plain
