"""A language model as judge: ratings and pair verdicts from any OpenAI-compatible endpoint.

Verdicts are paid for, so each one is on disk as soon as it is there: a run that was killed, or
that the endpoint refused half way, goes on where it stopped and sends nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from skipcal.errors import ConfigError, JudgeError, first_words
from skipcal.evaluation.records import RecordFile

Winner = Literal["A", "B", "tie"]

OPENAI_URL = "https://api.openai.com/v1"
LONGEST_WAIT_S = 60.0  # between two attempts; a server may ask for more with Retry-After
LONGEST_RETRY_AFTER_S = 300.0  # beyond it a quota is used up: waiting is for the user to decide
GRACE_S = 1.0  # after a failure, for answers that are on their way
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_RETRIED_STATUS = (408, 409, 429)  # and all of 5xx
_RATING = re.compile(r"\[\[\s*(-?[0-9]+(?:\.[0-9]+)?)\s*(?:/\s*10)?\s*\]\]")
_WINNER = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_WINNERS: dict[str, Winner] = {"A": "A", "B": "B", "C": "tie"}


@dataclass(frozen=True)
class JudgeSettings:
    """Which judge is asked, and how.

    base_url:     of the endpoint; None is $OPENAI_BASE_URL where it is set, else OpenAI.
    api_key_env:  the environment variable that holds the key. A server on this machine needs none.
    max_tokens_option: the name the server knows the limit by; OpenAI's reasoning models want
                  max_completion_tokens.
    timeout_s:    without a sign of the server.
    retries:      of one item, after the first attempt; malformed answers count like failures.
    retry_wait_s: before the first retry, doubled for each further one; a server's Retry-After wins.
    """

    model: str
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    max_tokens: int = 1024
    max_tokens_option: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    timeout_s: float = 60
    retries: int = 5
    retry_wait_s: float = 1.0
    concurrency: int = 8

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that no run could use."""
        for name in ("model", "api_key_env"):
            value = getattr(self, name)
            _expect(isinstance(value, str) and value.strip() != "", name, value, "a name")
        for name, least in (("max_tokens", 1), ("retries", 0), ("concurrency", 1)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _expect(whole and value >= least, name, value, f"a whole number of at least {least}")
        for name in ("temperature", "retry_wait_s"):
            value = getattr(self, name)
            _expect(_is_finite(value) and value >= 0, name, value, "a number of at least 0")
        _expect(
            _is_finite(self.timeout_s) and self.timeout_s > 0, "timeout_s", self.timeout_s, "seconds above 0"
        )
        options = ("max_tokens", "max_completion_tokens")
        _expect(
            self.max_tokens_option in options,
            "max_tokens_option",
            self.max_tokens_option,
            " or ".join(options),
        )
        if self.base_url is not None:
            _check_url("base_url", self.base_url)

    @property
    def endpoint(self) -> str:
        """The address requests go to, without a slash at its end."""
        url = self.base_url
        if url is None:
            url = os.environ.get("OPENAI_BASE_URL", "").strip() or OPENAI_URL
            _check_url("$OPENAI_BASE_URL", url)
        return url.rstrip("/")


@dataclass(frozen=True)
class JudgeRequest:
    """One question to the judge. `form` says which verdict its answer must hold."""

    id: str
    form: Literal["rating", "pair"]
    system: str
    user: str

    @property
    def prompt_sha256(self) -> str:
        """Of form and both messages: what an answer on disk must have been given to."""
        return hashlib.sha256("\0".join((self.form, self.system, self.user)).encode()).hexdigest()


@dataclass(frozen=True)
class Verdict:
    """What the judge said. `rating` in [0, 10] or `winner`; neither where no attempt gave one."""

    id: str
    rating: float | None
    winner: Winner | None
    raw: str
    attempts: int  # requests sent for it


def read_rating(text: str) -> float | None:
    """The last rating of an answer, as in [[7]], [[7.5]] or [[8/10]]; None if it is not in [0, 10]."""
    marks = _RATING.findall(text)
    return float(marks[-1]) if marks and 0 <= float(marks[-1]) <= 10 else None


def read_winner(text: str) -> Winner | None:
    """The last pair verdict of an answer: [[A]], [[B]], or [[C]] for a tie."""
    marks = _WINNER.findall(text)
    return _WINNERS[marks[-1]] if marks else None


def ask(requests: Sequence[JudgeRequest], settings: JudgeSettings, records: Path) -> dict[str, Verdict]:
    """The verdict on every request, by id; those that `records` holds already are not asked for again.

    An answer without a verdict after all retries gives a Verdict of neither rating nor winner.
    Raises ConfigError for ids that repeat and for records of other prompts or another judge,
    JudgeError when the endpoint cannot be used. Finished verdicts stay on disk in every case.
    """
    url = settings.endpoint
    ids = [request.id for request in requests]
    repeated = [key for key, times in Counter(ids).items() if times > 1]
    if repeated:
        raise ConfigError(f"the judge requests hold the id {repeated[0]!r} twice; expected an id for each")
    file = RecordFile(records, _header(settings, url))
    pending = [request for request in requests if not _is_answered(request, file)]
    with tqdm(
        total=len(ids), initial=len(ids) - len(pending), desc="judge", unit="verdict", disable=None
    ) as bar:

        def keep(record: dict[str, Any]) -> None:
            file.append(record)
            bar.update()

        try:
            if pending:
                _ask_all(pending, _Endpoint(settings, url), settings.concurrency, keep)
        except _EndpointFailed as failure:
            finished = sum(key in file.done for key in ids)
            raise JudgeError(
                f"judge endpoint {url}: {failure.reason}; {finished} of {len(ids)} verdicts are finished "
                f"and kept in {records}; {failure.advice}, then run the same command again"
            ) from failure.__cause__
    return {key: _verdict(file.done[key]) for key in ids}


def _header(settings: JudgeSettings, url: str) -> dict[str, Any]:
    return {
        "kind": "judge",
        "judge_model": settings.model,
        "base_url": url,
        "temperature": float(settings.temperature),
        "max_tokens": settings.max_tokens,
    }


def _is_answered(request: JudgeRequest, file: RecordFile) -> bool:
    record = file.done.get(request.id)
    if record is not None and record.get("prompt_sha256") != request.prompt_sha256:
        raise ConfigError(
            f"{file.path} holds a verdict on {request.id!r} for another prompt: the answers or the judge "
            "prompts have changed; name another output, or pass --overwrite to start over"
        )
    return record is not None


def _verdict(record: dict[str, Any]) -> Verdict:
    names = ("id", "rating", "winner", "raw", "attempts")
    return Verdict(*(record[name] for name in names))


def _ask_all(
    requests: Sequence[JudgeRequest],
    endpoint: _Endpoint,
    concurrency: int,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Ask `concurrency` requests at a time; `keep` gets each answer, in this thread.

    Daemon threads rather than an executor: the interpreter waits for an executor's threads, so that
    Ctrl-C would last as long as the slowest request.
    """
    todo: SimpleQueue[JudgeRequest | None] = SimpleQueue()
    finished: SimpleQueue[dict[str, Any] | Exception] = SimpleQueue()
    for request in requests:
        todo.put(request)
    workers = []
    for _ in range(min(concurrency, len(requests))):
        todo.put(None)
        workers.append(threading.Thread(target=_work, args=(endpoint, todo, finished), daemon=True))
    try:
        for worker in workers:
            worker.start()
        for _ in requests:
            answer = finished.get()
            if isinstance(answer, Exception):
                raise answer
            keep(answer)
    except (_EndpointFailed, KeyboardInterrupt):
        endpoint.stopped.set()
        deadline = time.monotonic() + GRACE_S
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        while not finished.empty():
            if isinstance(late := finished.get(), dict):
                keep(late)
        raise
    finally:
        endpoint.close()


def _work(
    endpoint: _Endpoint,
    todo: SimpleQueue[JudgeRequest | None],
    finished: SimpleQueue[dict[str, Any] | Exception],
) -> None:
    """One thread's share. Its first error is the last thing anyone sends."""
    try:
        while (request := todo.get()) is not None and not endpoint.stopped.is_set():
            finished.put(endpoint.record(request))
    except Exception as error:
        finished.put(error)  # before the others are stopped: the first error is the one to report
        endpoint.stopped.set()


class _EndpointFailed(Exception):
    """The endpoint cannot be used: what happened, and what the user can do about it."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.advice = advice


class _TryLater(_EndpointFailed):
    """It may work at the next attempt, after `wait_s` where the server said how long."""

    def __init__(self, reason: str, advice: str, wait_s: float | None = None) -> None:
        super().__init__(reason, advice)
        self.wait_s = wait_s


class _Endpoint:
    """One client of the judge's server, shared by all threads."""

    def __init__(self, settings: JudgeSettings, url: str) -> None:
        """Make the client; nothing is sent. Raises _EndpointFailed without a key."""
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ConfigError(
                'the judge needs the openai client; install it with: pip install "skipcal[judge]"'
            ) from error
        self.settings = settings
        self.stopped = threading.Event()
        # The client's own retries would hide how often a request was sent.
        self.client = OpenAI(
            api_key=_api_key(settings, url), base_url=url, timeout=settings.timeout_s, max_retries=0
        )

    def close(self) -> None:
        """Stop the threads at their next step, and drop the connections."""
        self.stopped.set()
        self.client.close()

    def record(self, request: JudgeRequest) -> dict[str, Any]:
        """Ask until an answer holds a verdict, or the attempts are used up.

        The last attempt decides: when it was answered, its text is recorded, verdict or none.
        """
        for attempt in range(1, self.settings.retries + 2):
            if self.stopped.is_set():
                break
            last = attempt > self.settings.retries
            try:
                raw, model = self._complete(request)
            except _TryLater as failure:
                if last:
                    raise _EndpointFailed(f"{failure.reason}, {attempt} times", failure.advice) from failure
                self.stopped.wait(self._wait_s(attempt, failure))
                continue
            verdict: dict[str, Any] = {
                "rating": read_rating(raw) if request.form == "rating" else None,
                "winner": read_winner(raw) if request.form == "pair" else None,
            }
            if last or any(value is not None for value in verdict.values()):
                asked = {"id": request.id, "form": request.form, "prompt_sha256": request.prompt_sha256}
                return {**asked, **verdict, "raw": raw, "model": model, "attempts": attempt}
        raise _EndpointFailed("stopped", "")  # never seen: what stopped it is reported

    def _complete(self, request: JudgeRequest) -> tuple[str, str | None]:
        """One request: the answer's text, and the name of the model that gave it."""
        import openai

        settings = self.settings
        try:
            completion = self.client.chat.completions.create(
                model=settings.model,
                messages=[
                    {"role": "system", "content": request.system},
                    {"role": "user", "content": request.user},
                ],
                temperature=settings.temperature,
                extra_body={settings.max_tokens_option: settings.max_tokens},
            )
        except openai.APITimeoutError as error:
            raise _TryLater(f"no answer within {settings.timeout_s:g} s", "raise timeout_s") from error
        except openai.APIConnectionError as error:
            reason = first_words(error.__cause__ or error)
            raise _TryLater(f"no connection ({reason})", "check that it runs and its address") from error
        except openai.APIStatusError as error:
            raise self._refusal(error.status_code, error) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise _no_completion(first_words(error)) from error
        return _answer(completion)

    def _refusal(self, status: int, error: Any) -> _EndpointFailed:
        """What an HTTP error means. error: the client's APIStatusError."""
        reason = f"HTTP {status} ({first_words(error)})"
        if status in _RETRIED_STATUS or status >= 500:
            wait_s = _retry_after_s(error.response.headers)
            used_up = error.code == "insufficient_quota" or (wait_s or 0) > LONGEST_RETRY_AFTER_S
            advice = "lower concurrency or wait" if status == 429 else "look at the server's log or wait"
            if used_up:
                until = "" if wait_s is None else f", and asks to wait {wait_s:.0f} s"
                return _EndpointFailed(reason + until, "check the account's quota or wait")
            return _TryLater(reason, advice, wait_s)
        if status in (401, 403):
            return _EndpointFailed(reason, f"check the key in {self.settings.api_key_env}")
        if status == 404:
            return _EndpointFailed(reason, f"check base_url and the model name {self.settings.model!r}")
        if "max_completion_tokens" in str(error):
            return _EndpointFailed(reason, "set max_tokens_option to max_completion_tokens")
        return _EndpointFailed(reason, "change what it refuses")

    def _wait_s(self, attempt: int, failure: _TryLater) -> float:
        if failure.wait_s is not None:
            return failure.wait_s
        longest = min(self.settings.retry_wait_s * 2.0 ** min(attempt - 1, 30), LONGEST_WAIT_S)
        return longest * random.uniform(0.75, 1.0)  # threads that failed together come back apart


def _answer(completion: Any) -> tuple[str, str | None]:
    """Text and model of a completion. Servers send error pages and empty choices with status 200, too."""
    try:
        message = completion.choices[0].message
        text = message.content or getattr(message, "refusal", None) or ""
    except (AttributeError, LookupError, TypeError) as error:
        found = completion if isinstance(completion, str) else getattr(completion, "error", "no choices")
        raise _no_completion(repr(found)[:100]) from error
    return str(text), cast("str | None", getattr(completion, "model", None))


def _no_completion(found: str) -> _TryLater:
    return _TryLater(f"expected a chat completion, got {found}", "check base_url (most end in /v1)")


def _retry_after_s(headers: Any) -> float | None:
    """Seconds a server asks to wait: a number, or a date. None where it says nothing usable."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        wait_s = float(value)
    except ValueError:
        try:
            wait_s = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(wait_s, 0.0) if math.isfinite(wait_s) else None


def _api_key(settings: JudgeSettings, url: str) -> str:
    name = settings.api_key_env
    key = os.environ.get(name, "").strip()
    if not key and name not in os.environ and urlsplit(url).hostname in _LOCAL_HOSTS:
        return "none"  # the client insists on one
    if not key:
        raise _EndpointFailed(f"no key, the environment variable {name} is unset or empty", f"set {name}")
    if not (key.isascii() and key.isprintable()):
        raise _EndpointFailed(f"the key in {name} has characters no key has", f"set {name} again")
    return key


def _check_url(name: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
    except (ValueError, AttributeError):
        good = False
    _expect(good, name, url, "an address like http://localhost:8000/v1")
    if parts.username is not None:  # it would be written into every result
        raise ConfigError(f"judge {name} holds a user name; expected none, set the key in the environment")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _expect(good: bool, name: str, value: object, expected: str) -> None:
    if not good:
        raise ConfigError(f"judge {name} is {value!r}; expected {expected}")
