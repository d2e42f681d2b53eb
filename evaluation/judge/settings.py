"""Which judge is asked, and how."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from skipcal.errors import ConfigError

OPENAI_URL = "https://api.openai.com/v1"


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
