"""Calibration prompts in a chat template."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import word_tokenizer

from skipcal.arch.loading import LoadedModel
from skipcal.calibrate.pipeline import calibrate_model
from skipcal.configs.run import ProfileConfig, load_config
from skipcal.errors import ConfigError
from skipcal.evaluation.transfer import calibration_prompts
from skipcal.text.chat import sample_prompts
from skipcal.text.corpora import resolve_corpora, sample_corpus

TEMPLATE = (
    "{% for m in messages %}w1 w2 {{ m['content'] }} w3 {% endfor %}"
    "{% if add_generation_prompt %}w4 w5{% endif %}"
)


@pytest.fixture
def chatty() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_prompts_are_what_the_template_makes_of_the_text(chatty: Any, worded_text: Path) -> None:
    corpus = resolve_corpora([], [str(worded_text)])[0]
    sample = sample_prompts(
        corpus, chatty, prompt_tokens=12, chat_template=True, prompts=4, seed=0, held_out=2
    )
    bare = sample_corpus(corpus, chatty, prompt_tokens=7, prompts=4, seed=0, held_out=2)
    for framed, text in zip(sample.prompts + sample.held_out, bare.prompts + bare.held_out, strict=True):
        message = [{"role": "user", "content": chatty.decode(text)}]
        naive = chatty.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        assert framed == naive["input_ids"] and len(framed) == 12
    off = sample_prompts(corpus, chatty, prompt_tokens=7, chat_template=False, prompts=4, seed=0, held_out=2)
    assert off.prompts == bare.prompts


def test_special_tokens_come_from_the_template_alone(chatty: Any, worded_text: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    chatty.backend_tokenizer.post_processor = TemplateProcessing(single="w9 $A", special_tokens=[("w9", 9)])
    assert chatty("w20")["input_ids"] == [9, 20]
    corpus = resolve_corpora([], [str(worded_text)])[0]
    sample = sample_prompts(corpus, chatty, prompt_tokens=12, chat_template=True, prompts=2, seed=0)
    assert all(row[:2] == [1, 2] and row[-3:] == [3, 4, 5] and 9 not in row[:3] for row in sample.prompts)


def test_a_profile_of_chats_says_so_and_measures_answers(
    worded: LoadedModel, chatty: Any, worded_text: Path
) -> None:
    config = ProfileConfig(
        data_files=[str(worded_text)], prompts=4, prompt_tokens=12, new_tokens=8, warm_up_tokens=2,
        closed_loop_prompts=2, cold_s=1, cold_e=4,
    )  # fmt: skip
    loaded = replace(worded, tokenizer=chatty)
    bare = calibrate_model(loaded, config)
    chat = calibrate_model(loaded, config.model_copy(update={"chat_template": True}))
    assert chat.profile.calibration.chat_template and not bare.profile.calibration.chat_template
    assert chat.profile.config["chat_template"] is True
    assert chat.traces[0].position.min() == bare.traces[0].position.min() == 12
    assert chat.profile.layers["pooled"] != bare.profile.layers["pooled"]
    corpus = resolve_corpora([], [str(worded_text)])[0]
    again = calibration_prompts(chat.profile, corpus, chatty)  # what `compare` keeps apart
    assert len(again) == 4 and all(row[:2] == [1, 2] and row[-3:] == [3, 4, 5] for row in again)


def test_what_cannot_be_a_chat_is_refused(chatty: Any, worded_text: Path) -> None:
    corpus = resolve_corpora([], [str(worded_text)])[0]
    settings: dict[str, Any] = {"chat_template": True, "prompts": 2, "seed": 0}
    with pytest.raises(ConfigError, match="has no chat template; leave out --chat-template"):
        sample_prompts(corpus, word_tokenizer(), prompt_tokens=12, **settings)
    with pytest.raises(ConfigError, match="leave no room for text beside the 5 of the chat template"):
        sample_prompts(corpus, chatty, prompt_tokens=5, **settings)
    loud = copy.deepcopy(chatty)
    loud.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ConfigError, match="changes a message"):
        sample_prompts(corpus, loud, prompt_tokens=12, **settings)
    with pytest.raises(ConfigError, match="chat_template has no effect on mode prefill"):
        load_config(None, {"chat_template": True, "mode": "prefill"})
