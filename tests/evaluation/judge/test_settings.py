"""A judge's settings, and how its words are read; no endpoint is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from judge_endpoint import requests

from skipcal.errors import ConfigError
from skipcal.evaluation.judge.settings import JudgeSettings
from skipcal.evaluation.judge.verdicts import read_rating, read_winner


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[7]]", 7),
        ("[[7.5]]", 7.5),
        ("Rating: [[8/10]]", 8),
        ("[[ 8 / 10 ]].", 8),
        ("first [[3]], no: **[[9]]**", 9),
        ("[[0]]", 0),
        ("[[10]]", 10),
        ("[[11]]", None),
        ("[[7]] or rather [[70]]", None),
        ("[[-3]]", None),
        ("[[rating]]", None),
        ("[[7/100]]", None),
        ("[7] 7/10", None),
        ("", None),
    ],
)
def test_the_last_rating_counts_if_it_is_in_bounds(text: str, rating: float | None) -> None:
    assert read_rating(text) == rating


@pytest.mark.parametrize(
    ("text", "winner"), [("[[A]]", "A"), ("[[A]] no, [[B]]", "B"), ("[[C]]", "tie"), ("[[D]] [A]", None)]
)
def test_the_last_pair_verdict_counts(text: str, winner: str | None) -> None:
    assert read_winner(text) == winner


def test_the_hash_tells_prompts_apart() -> None:
    request = requests(1)[0]
    others = [replace(request, form="pair"), replace(request, system=""), replace(request, user="q")]
    assert len({r.prompt_sha256 for r in (request, *others)}) == 4
    assert replace(request, id="other").prompt_sha256 == request.prompt_sha256


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", " "),
        ("api_key_env", ""),
        ("base_url", "localhost:8000"),
        ("base_url", "http://"),
        ("base_url", "http://[::1/v1"),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens_option", "tokens"),
        ("timeout_s", 0),
        ("timeout_s", "60"),
        ("retries", -1),
        ("retry_wait_s", -1),
        ("concurrency", 0),
        ("concurrency", True),
    ],
)
def test_settings_no_run_could_use_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        JudgeSettings(**{"model": "m", name: value})
    message = str(caught.value)
    assert name in message and repr(value) in message and "expected" in message and "\n" not in message


def test_a_password_in_the_address_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        JudgeSettings("m", "http://me:secret@localhost/v1")
    assert "secret" not in str(caught.value)
