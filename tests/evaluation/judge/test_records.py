"""What a judge has said is kept: through kills, and against changed questions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from judge_endpoint import OK, Endpoint, Step, requests

from skipcal.errors import ConfigError
from skipcal.evaluation.judge.judge import ask


@contextmanager
def running(endpoint: Endpoint, count: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that asks `count` requests, when five are finished and two under way."""
    code = (
        "import signal, sys; from pathlib import Path\n"
        "from skipcal.evaluation.judge.judge import ask\n"
        "from skipcal.evaluation.judge.settings import JudgeSettings\n"
        "from skipcal.evaluation.judge.verdicts import JudgeRequest\n"
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
