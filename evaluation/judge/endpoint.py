"""The judge's server: requests, what its errors mean, and when to try again."""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
from email.utils import parsedate_to_datetime
from typing import Any, cast
from urllib.parse import urlsplit

from skipcal.errors import ConfigError, first_words
from skipcal.evaluation.judge.settings import JudgeSettings
from skipcal.evaluation.judge.verdicts import JudgeRequest, read_rating, read_winner

LONGEST_WAIT_S = 60.0  # between two attempts; a server may ask for more with Retry-After
LONGEST_RETRY_AFTER_S = 300.0  # beyond it a quota is used up: waiting is for the user to decide
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_RETRIED_STATUS = (408, 409, 429)  # and all of 5xx


class EndpointFailed(Exception):
    """The endpoint cannot be used: what happened, and what the user can do about it."""

    def __init__(self, reason: str, advice: str) -> None:
        """advice: what to do, as part of a sentence."""
        super().__init__(reason)
        self.reason = reason
        self.advice = advice


class _TryLater(EndpointFailed):
    """It may work at the next attempt, after `wait_s` where the server said how long."""

    def __init__(self, reason: str, advice: str, wait_s: float | None = None) -> None:
        super().__init__(reason, advice)
        self.wait_s = wait_s


class Endpoint:
    """One client of the judge's server, shared by all threads."""

    def __init__(self, settings: JudgeSettings, url: str) -> None:
        """Make the client; nothing is sent. Raises EndpointFailed without a key."""
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
                    raise EndpointFailed(f"{failure.reason}, {attempt} times", failure.advice) from failure
                self.stopped.wait(self._wait_s(attempt, failure))
                continue
            verdict: dict[str, Any] = {
                "rating": read_rating(raw) if request.form == "rating" else None,
                "winner": read_winner(raw) if request.form == "pair" else None,
            }
            if last or any(value is not None for value in verdict.values()):
                asked = {"id": request.id, "form": request.form, "prompt_sha256": request.prompt_sha256}
                return {**asked, **verdict, "raw": raw, "model": model, "attempts": attempt}
        raise EndpointFailed("stopped", "")  # never seen: what stopped it is reported

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

    def _refusal(self, status: int, error: Any) -> EndpointFailed:
        """What an HTTP error means. error: the client's APIStatusError."""
        reason = f"HTTP {status} ({first_words(error)})"
        if status in _RETRIED_STATUS or status >= 500:
            wait_s = _retry_after_s(error.response.headers)
            used_up = error.code == "insufficient_quota" or (wait_s or 0) > LONGEST_RETRY_AFTER_S
            advice = "lower concurrency or wait" if status == 429 else "look at the server's log or wait"
            if used_up:
                until = "" if wait_s is None else f", and asks to wait {wait_s:.0f} s"
                return EndpointFailed(reason + until, "check the account's quota or wait")
            return _TryLater(reason, advice, wait_s)
        if status in (401, 403):
            return EndpointFailed(reason, f"check the key in {self.settings.api_key_env}")
        if status == 404:
            return EndpointFailed(reason, f"check base_url and the model name {self.settings.model!r}")
        if "max_completion_tokens" in str(error):
            return EndpointFailed(reason, "set max_tokens_option to max_completion_tokens")
        return EndpointFailed(reason, "change what it refuses")

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
        raise EndpointFailed(f"no key, the environment variable {name} is unset or empty", f"set {name}")
    if not (key.isascii() and key.isprintable()):
        raise EndpointFailed(f"the key in {name} has characters no key has", f"set {name} again")
    return key
