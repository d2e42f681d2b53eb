"""The judge against a real endpoint: a server process that misbehaves by plan (judge_server.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from judge_endpoint import OK, Endpoint, Step, serving

from skipcal.errors import JudgeError
from skipcal.evaluation.judge.verdicts import Verdict


def test_verdicts_come_in_the_order_of_the_requests_and_say_where_they_are_from(endpoint: Endpoint) -> None:
    endpoint.plan(q0=[{"do": "ok", "content": "Good. [[8.5]]", "wait_s": 0.1}])
    verdicts = endpoint.ask(3)
    assert list(verdicts) == ["item0", "item1", "item2"]
    assert verdicts["item0"] == Verdict("item0", 8.5, None, "Good. [[8.5]]", 1)
    assert {line["model"] for line in endpoint.on_disk()} == {"served-model"}
    header = json.loads(endpoint.records.read_text().splitlines()[0])
    assert (header["kind"], header["judge_model"], header["max_tokens"]) == ("judge", "judge-model", 1024)


def test_pair_verdicts_are_read_as_such(endpoint: Endpoint) -> None:
    endpoint.plan(q0=[{"do": "ok", "content": "[[8]] [[C]]"}], q1=[{"do": "ok", "content": "[[A]]"}])
    verdicts = endpoint.ask(2, "pair")
    assert [(v.winner, v.rating) for v in verdicts.values()] == [("tie", None), ("A", None)]


@pytest.mark.parametrize("option", ["max_tokens", "max_completion_tokens"])
def test_the_request_holds_what_the_settings_say(endpoint: Endpoint, option: Any) -> None:
    endpoint.ask(temperature=0.3, max_tokens=77, max_tokens_option=option)
    line = endpoint.log()[0]
    assert line["body"] == {
        "model": "judge-model",
        "messages": [{"role": "system", "content": "Be a judge."}, {"role": "user", "content": "q0"}],
        "temperature": 0.3,
        option: 77,
    }
    assert line["path"].endswith("/v1/chat/completions")
    assert line["authorization"] == "Bearer none"


PASSING_FAILURES: list[Step] = [
    {"do": "status", "status": 408},
    {"do": "status", "status": 409},
    {"do": "status", "status": 429},
    {"do": "status", "status": 500},
    {"do": "status", "status": 503, "headers": {"Retry-After": "soon"}},
    {"do": "drop"},
    {"do": "page"},
    {"do": "json", "text": '{"choices": []}'},
    {"do": "json", "text": '{"choices": "none"}'},
    {"do": "json", "text": "[]"},
    {"do": "json", "text": '{"error": {"message": "overloaded"}}'},
    {"do": "json", "text": '{"choi'},
    {"do": "ok", "content": "I would rather not say."},
    {"do": "ok", "content": None},
    {"do": "ok", "content": "[[42]]"},
]


def test_a_failure_that_passes_is_asked_again(endpoint: Endpoint) -> None:
    endpoint.plan(**{f"q{n}": [failure, OK] for n, failure in enumerate(PASSING_FAILURES)})
    verdicts = endpoint.ask(len(PASSING_FAILURES))
    assert {(v.rating, v.raw, v.attempts) for v in verdicts.values()} == {(7, "Rating: [[7]]", 2)}
    assert {*endpoint.sent().values()} == {2}


def test_a_timeout_is_asked_again(endpoint: Endpoint) -> None:
    endpoint.plan(q0=[{"do": "hang", "wait_s": 1}, OK])
    assert endpoint.ask(timeout_s=0.2)["item0"].attempts == 2


def test_retry_after_is_honoured(endpoint: Endpoint) -> None:
    endpoint.plan(q0=[{"do": "status", "status": 429, "headers": {"Retry-After": "0.3"}}, OK])
    assert endpoint.ask()["item0"].attempts == 2
    first, second = endpoint.log()
    assert second["at"] - first["at"] >= 0.3


def test_retry_after_may_be_a_date(endpoint: Endpoint) -> None:
    headers = {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}
    endpoint.plan(q0=[{"do": "status", "status": 503, "headers": headers}, OK])
    assert endpoint.ask(retry_wait_s=60)["item0"].attempts == 2  # the server says now, not in a minute


def test_waits_grow_from_retry_to_retry(endpoint: Endpoint) -> None:
    endpoint.plan(q0=[{"do": "status", "status": 500}] * 3 + [OK])
    endpoint.ask(retries=3, retry_wait_s=0.05)
    at = [line["at"] for line in endpoint.log()]
    waits = [later - earlier for earlier, later in pairwise(at)]
    assert all(wait >= 0.75 * least for wait, least in zip(waits, (0.05, 0.1, 0.2), strict=True))


def test_a_quota_that_is_used_up_is_not_waited_for(endpoint: Endpoint) -> None:
    endpoint.plan(q0=[{"do": "status", "status": 429, "headers": {"Retry-After": "86400"}}])
    with pytest.raises(JudgeError, match="asks to wait 86400 s"):
        endpoint.ask()
    assert endpoint.sent() == {"q0": 1}


def test_malformed_to_the_end_is_null_and_finished(endpoint: Endpoint) -> None:
    endpoint.plan(q0=[{"do": "ok", "content": "No grade from me. \ud83d"}])
    expected = Verdict("item0", None, None, "No grade from me. \ud83d", 3)
    assert endpoint.ask()["item0"] == expected
    assert endpoint.on_disk()[0]["rating"] is None
    assert endpoint.ask()["item0"] == expected
    assert endpoint.sent() == {"q0": 3}


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"do": "status", "status": 500}, "HTTP 500 .*scripted 500.*, 3 times"),
        ({"do": "status", "status": 429}, "HTTP 429 .*lower concurrency"),
        ({"do": "drop"}, "no connection"),
        ({"do": "page"}, "expected a chat completion, got .<html>.*base_url"),
        ({"do": "json", "text": '{"error": {"message": "overloaded"}}'}, "overloaded"),
        ({"do": "status", "status": 401}, "HTTP 401 .*check the key in OPENAI_API_KEY"),
        ({"do": "status", "status": 403}, "HTTP 403"),
        ({"do": "status", "status": 404}, "HTTP 404 .*'judge-model'"),
        (
            {"do": "status", "status": 400, "body": {"error": {"message": "use max_completion_tokens"}}},
            "set max_tokens_option to max_completion_tokens",
        ),
        ({"do": "status", "status": 429, "body": {"error": {"code": "insufficient_quota"}}}, "quota"),
    ],
    ids=lambda value: "-".join(map(str, value.values()))[:40] if isinstance(value, dict) else "",
)
def test_a_lasting_failure_keeps_what_is_finished(endpoint: Endpoint, step: Step, says: str) -> None:
    endpoint.plan(q2=[step])
    with pytest.raises(JudgeError, match=says) as caught:
        endpoint.ask(5, concurrency=1)
    assert caught.value.exit_code == 5
    message = str(caught.value)
    assert "\n" not in message
    assert "2 of 5 verdicts are finished and kept in" in message and "run the same command again" in message
    assert endpoint.settings.base_url is not None and endpoint.settings.base_url.rstrip("/") in message
    assert [line["id"] for line in endpoint.on_disk()] == ["item0", "item1"]
    assert not {"q3", "q4"} & {*endpoint.sent()}


def test_answers_on_their_way_are_kept_when_another_item_fails(endpoint: Endpoint) -> None:
    endpoint.plan(q0=[{"do": "ok", "wait_s": 0.4}], q1=[{"do": "status", "status": 401}])
    with pytest.raises(JudgeError, match="1 of 2"):
        endpoint.ask(2)
    assert [line["id"] for line in endpoint.on_disk()] == ["item0"]


def test_nothing_is_sent_after_a_failure(endpoint: Endpoint) -> None:
    endpoint.plan(
        q0=[{"do": "ok", "content": "malformed", "wait_s": 0.3}], q1=[{"do": "status", "status": 401}]
    )
    with pytest.raises(JudgeError, match="HTTP 401"):
        endpoint.ask(9)
    assert endpoint.sent() == {"q0": 1, "q1": 1}


def test_an_endpoint_that_goes_away_gives_a_judge_error_and_the_rest_later(
    tmp_path: Path, endpoint: Endpoint
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "plan.json").write_text("{}")
    with serving(tmp_path) as port:
        own = Endpoint(folder, port)
        own.ask(2)
    with pytest.raises(JudgeError, match=r"no connection \(.*refused.*2 of 4") as caught:
        own.ask(4)
    assert caught.value.exit_code == 5
    assert len(own.ask(2)) == 2  # all there: the endpoint is not needed


def test_a_wrong_address_can_be_put_right(endpoint: Endpoint) -> None:
    with pytest.raises(JudgeError, match="no connection"):
        endpoint.ask(base_url="http://127.0.0.1:1/v1")
    assert endpoint.ask()["item0"].rating == 7


def test_without_a_key_nothing_is_sent(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JudgeError, match=r"OPENAI_API_KEY is unset or empty.*0 of 1") as caught:
        endpoint.ask(base_url="https://judge.invalid/v1")
    assert caught.value.exit_code == 5
    monkeypatch.setenv("OPENAI_API_KEY", "")
    with pytest.raises(JudgeError, match="unset or empty"):
        endpoint.ask()
    assert endpoint.sent() == {}


def test_the_key_comes_from_the_variable_that_is_named(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "k-1\n")
    endpoint.ask(api_key_env="MY_KEY")
    assert endpoint.log()[0]["authorization"] == "Bearer k-1"


def test_openai_base_url_is_resolved_and_recorded(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert endpoint.settings.base_url is not None
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.settings.base_url)
    endpoint.ask(base_url=None)
    header = json.loads(endpoint.records.read_text().splitlines()[0])
    assert header["base_url"] == endpoint.settings.base_url.rstrip("/")


@pytest.mark.parametrize("concurrency", [1, 3])
def test_concurrency_is_reached_and_never_exceeded(endpoint: Endpoint, concurrency: int) -> None:
    endpoint.plan(rest=[{"do": "ok", "wait_s": 0.1}])
    endpoint.ask(3 * concurrency, concurrency=concurrency)
    assert max(line["in_flight"] for line in endpoint.log()) == concurrency


def test_without_the_client_the_install_command_is_named(endpoint: Endpoint) -> None:
    code = (
        "import sys; sys.modules['openai'] = None\n"
        "from pathlib import Path\n"
        "from skipcal.evaluation.judge.judge import ask\n"
        "from skipcal.evaluation.judge.settings import JudgeSettings\n"
        "from skipcal.evaluation.judge.verdicts import JudgeRequest\n"
        "from skipcal.errors import ConfigError\n"
        "try:\n"
        "    ask([JudgeRequest('i', 'rating', 's', 'u')], JudgeSettings('m'), Path(sys.argv[1]))\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(endpoint.records)], capture_output=True, text=True, check=True
    )
    assert 'pip install "skipcal[judge]"' in result.stdout
