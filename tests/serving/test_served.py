"""vLLM's server: what clients get is what they would get alone, and the counts are told in three ways."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from served import NEW, PROMPTS, Served
from vllm_process import environment

from skipcal.errors import TargetOutOfReach

START_S = 300
ASKED = [None, 0.4, 0, 0.1, 1, 0.4]  # by prompt
Ask = Callable[..., tuple[int, Any]]


ENVIRONMENT = environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_PLUGINS": "skipcal"}


def command(llama: Served, settings: Any, port: int) -> list[str]:
    """Starts a server of the model."""
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", llama.folder,
        "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager",
        "--no-enable-prefix-caching", "--max-model-len", "64", "--max-num-seqs", "4", "--port", str(port),
        "--host", "127.0.0.1", "--shutdown-timeout", "20",
        "--additional-config", json.dumps({"skipcal": settings}),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ask(llama: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Status and answer of a request to a server with the gate."""
    known = [found.name for found in entry_points(group="vllm.endpoint_plugins")]
    assert "skipcal" in known, "the environment is older than pyproject.toml: make vllm"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("server") / "log").open("w+")
    server = subprocess.Popen(
        command(llama, llama.settings("gate"), port), env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip

    def asked(path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        data = None if body is None else json.dumps({"model": "tiny", **body}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json", **headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read().decode()
                return answer.status, json.loads(text) if text.startswith(("[", "{")) else text
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    try:
        _wait(server, lambda: asked("/health"), Path(log.name))
        yield asked
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    finally:
        server.kill()
        server.wait()
        log.close()
    assert "skipcal, gate: skip ratio" in Path(log.name).read_text()  # the line at the end


def _wait(server: Any, health: Callable[[], Any], log: Path) -> None:
    for _ in range(START_S):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            health()
        except urllib.error.URLError:
            time.sleep(1)
        else:
            return
    raise AssertionError(log.read_text()[-4000:])


@pytest.fixture(scope="module")
def answers(ask: Ask) -> list[Any]:
    """Every prompt at once, each with what it asks for and an id."""

    def one(n: int) -> Any:
        wanted = {} if ASKED[n] is None else {"vllm_xargs": {"skipcal": ASKED[n]}}
        body = {
            "prompt": PROMPTS[n], "max_tokens": NEW[n], "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, **wanted,
        }  # fmt: skip
        status, answer = ask("/v1/completions", body, **{"X-Request-Id": f"p-{n}"})
        assert status == 200, answer
        return answer

    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        return list(clients.map(one, range(len(PROMPTS))))


@pytest.fixture(scope="module")
def alone(llama: Served) -> dict[float | None, tuple[list[list[int]], list[list[int]]]]:
    """By target."""
    return {
        0: llama.alone("full"),
        1: llama.alone("gate"),
        None: llama.alone("gate"),
        **{target: llama.alone("gate", target=target) for target in (0.1, 0.4)},
    }


def test_clients_get_what_they_would_get_alone(answers: list[Any], alone: Any) -> None:
    got = [answer["choices"][0]["token_ids"] for answer in answers]
    assert got == [alone[target][0][n] for n, target in enumerate(ASKED)]


def test_the_counts_of_each_request_are_those_alone_and_add_up(
    ask: Ask, answers: list[Any], alone: Any
) -> None:
    each = []
    for n, target in enumerate(ASKED):
        status, [found] = ask(f"/skipcal/requests/{answers[n]['id']}")
        assert (status, found["skipped_per_layer"]) == (200, alone[target][1][n])
        assert found["decode_steps"] == NEW[n] - 1
        assert found["target_skip_ratio"] == (None if target == 1 else target)
        each.append(found)
    skipping = [found for found in each if found["target_skip_ratio"] != 0]
    status, report = ask("/skipcal")
    assert status == 200
    assert report["decode_steps"] == sum(found["decode_steps"] for found in skipping)
    assert report["opted_out_steps"] == NEW[2] - 1
    sums = zip(*(found["skipped_per_layer"] for found in skipping), strict=True)
    assert report["skipped_per_layer"] == [sum(layer) for layer in sums]
    _, kept = ask("/skipcal/requests")
    assert sorted(kept, key=_name) == sorted(each, key=_name)


def _name(found: dict[str, Any]) -> str:
    return str(found["request_id"])


def test_prometheus_reads_the_same_counts(ask: Ask, answers: list[Any]) -> None:
    _, report = ask("/skipcal")
    _, text = ask("/metrics")
    labels = '{method="gate",model_name="tiny"}'
    for name, value in {
        "decode_steps_total": report["decode_steps"],
        "decode_steps_after_warm_up_total": report["decode_steps_after_warm_up"],
        "opted_out_steps_total": report["opted_out_steps"],
        "passes_total": report["passes"],
        "ffn_skipped_total": sum(report["skipped_per_layer"]),
        "ffn_unread_total": sum(report["unread_per_layer"]),
        "skip_ratio": report["skip_ratio"],
        "skip_ratio_all": report["skip_ratio_all"],
        "unread_ratio": report["unread_ratio"],
    }.items():
        assert value > 0
        assert f"\nskipcal:{name}{labels} {float(value)}\n" in text
        kind = "counter" if name.endswith("_total") else "gauge"
        assert f"\n# TYPE skipcal:{name} {kind}\n" in text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"vllm_xargs": {"skipcal": 0.9}}, "target skip ratio 0.9 is out of reach"),
        ({"vllm_xargs": {"skipcal": "0.4"}}, "skipcal of a request is '0.4'; expected a target"),
        ({"vllm_xargs": {"skipcal_ratio": 0.4}}, "the key 'skipcal_ratio' of a request is not known there"),
        ({"skipcal": 0.4}, 'did you mean "vllm_xargs": {"skipcal": 0.25}?'),
        ({"use_beam_search": True, "n": 2}, "skipcal does not go with beam search"),
    ],
)
def test_what_cannot_be_served_is_the_clients_mistake(body: Any, message: str, ask: Ask) -> None:
    status, answer = ask("/v1/completions", {"prompt": [5, 6], "max_tokens": 4, **body})
    assert (status, message in answer["error"]["message"]) == (400, True), answer
    assert ask("/health")[0] == 200


def test_a_request_that_nobody_made_is_not_known(ask: Ask) -> None:
    status, answer = ask("/skipcal/requests/cmpl-nobody")
    assert status == 404
    assert answer["error"]["message"].startswith("there are no counts of a request 'cmpl-nobody': kept are")


def test_a_mistake_at_the_start_is_told_in_a_line(llama: Served) -> None:
    wrong = command(llama, llama.settings("gate", target_skip_ratio=0.9), 1)
    done = subprocess.run(wrong, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == TargetOutOfReach.exit_code
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.splitlines()[-1].startswith("TargetOutOfReach: target skip ratio 0.9 is out of reach")
