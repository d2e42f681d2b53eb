"""The judge against a real endpoint: a server process that misbehaves by plan (judge_server.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from skipcal.errors import ConfigError, JudgeError
from skipcal.evaluation.judge import ask
from skipcal.evaluation.judge_settings import JudgeSettings
from skipcal.evaluation.verdicts import JudgeRequest, Verdict, read_rating, read_winner

Step = dict[str, Any]
OK: Step = {"do": "ok"}


@dataclass
class Endpoint:
    """One test's own endpoint: a folder of the server, an address, a file of records."""

    folder: Path
    port: int

    @property
    def settings(self) -> JudgeSettings:
        url = f"http://127.0.0.1:{self.port}/{self.folder.name}/v1/"
        return JudgeSettings("judge-model", url, timeout_s=20, retries=2, retry_wait_s=0.001, concurrency=2)

    @property
    def records(self) -> Path:
        return self.folder / "records.jsonl"

    def plan(self, **steps: list[Step]) -> None:
        (self.folder / "plan.json").write_text(
            json.dumps({k.replace("rest", "*"): v for k, v in steps.items()})
        )

    def ask(self, count: int = 1, form: Any = "rating", **changes: Any) -> dict[str, Verdict]:
        return ask(requests(count, form), replace(self.settings, **changes), self.records)

    def log(self) -> list[dict[str, Any]]:
        path = self.folder / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def sent(self) -> Counter[str]:
        return Counter(line["user"] for line in self.log())

    def on_disk(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.records.read_bytes().split(b"\n")[1:-1]]


def requests(count: int, form: Any = "rating") -> list[JudgeRequest]:
    return [JudgeRequest(f"item{n}", form, "Be a judge.", f"q{n}") for n in range(count)]


@contextmanager
def serving(root: Path) -> Iterator[int]:
    """A server process with its endpoints under `root`; its port."""
    script = Path(__file__).with_name("judge_server.py")
    server = subprocess.Popen([sys.executable, str(script), str(root)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield int(server.stdout.readline())
    finally:
        server.kill()
        server.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    root = tmp_path_factory.mktemp("judge")
    with serving(root) as port:
        yield root, port


@pytest.fixture
def endpoint(
    server: tuple[Path, int], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Endpoint:
    root, port = server
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    folder = root / f"test{len(list(root.iterdir()))}"
    folder.mkdir()
    (folder / "plan.json").write_text("{}")
    return Endpoint(folder, port)


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


@contextmanager
def running(endpoint: Endpoint, count: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that asks `count` requests, when five are finished and two under way."""
    code = (
        "import signal, sys; from pathlib import Path\n"
        "from skipcal.evaluation.judge import JudgeRequest, JudgeSettings, ask\n"
        # a shell's background job inherits that Ctrl-C is ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "numbers = range(int(sys.argv[3]))\n"
        "requests = [JudgeRequest(f'item{n}', 'rating', 'Be a judge.', f'q{n}') for n in numbers]\n"
        "ask(requests, JudgeSettings('judge-model', sys.argv[1], concurrency=2), Path(sys.argv[2]))\n"
    )
    arguments = [str(endpoint.settings.base_url), str(endpoint.records), str(count)]
    run = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 30
        while len(endpoint.log()) < 7 or len(endpoint.on_disk()) < 5:
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.01)
        yield run
    finally:
        run.kill()
        run.communicate()


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_run_that_ends_in_the_middle_loses_nothing_and_repeats_nothing(
    endpoint: Endpoint, blow: signal.Signals
) -> None:
    hang: Step = {"do": "hang", "wait_s": 15}
    endpoint.plan(**{f"q{n}": [hang, OK] for n in (5, 6)})
    with running(endpoint, 10) as run:
        started = time.monotonic()
        run.send_signal(blow)
        last_words = run.stderr.read() if run.stderr else b""
        assert run.wait() != 0 and time.monotonic() - started < 8  # the requests would hang for 15 s
    assert b"KeyboardInterrupt" in last_words or blow == signal.SIGKILL
    kept = endpoint.records.read_bytes()
    assert {line["id"] for line in endpoint.on_disk()} == {f"item{n}" for n in range(5)}

    verdicts = endpoint.ask(10)
    assert [v.rating for v in verdicts.values()] == [7] * 10
    assert endpoint.records.read_bytes().startswith(kept)
    assert endpoint.sent() == {f"q{n}": 2 if n in (5, 6) else 1 for n in range(10)}


def test_answers_that_changed_are_refused(endpoint: Endpoint) -> None:
    endpoint.ask(2)
    changed = [requests(1)[0], replace(requests(2)[1], user="another answer")]
    with pytest.raises(ConfigError, match=r"'item1' for another prompt.*--overwrite"):
        ask(changed, endpoint.settings, endpoint.records)
    assert len(endpoint.log()) == 2


def test_another_judge_is_refused(endpoint: Endpoint) -> None:
    endpoint.ask()
    with pytest.raises(ConfigError, match="judge_model 'judge-model', now it is 'other'"):
        endpoint.ask(model="other")


def test_repeated_ids_are_refused(endpoint: Endpoint) -> None:
    with pytest.raises(ConfigError, match="'item0' twice"):
        ask(requests(1) * 2, endpoint.settings, endpoint.records)
    assert not endpoint.records.exists()


def test_no_requests_are_no_verdicts(endpoint: Endpoint) -> None:
    assert ask([], endpoint.settings, endpoint.records) == {}


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


def test_without_the_client_the_install_command_is_named(endpoint: Endpoint) -> None:
    code = (
        "import sys; sys.modules['openai'] = None\n"
        "from pathlib import Path\n"
        "from skipcal.evaluation.judge import JudgeRequest, JudgeSettings, ask\n"
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
