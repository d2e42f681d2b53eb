"""What tests of the graph engine share."""

from __future__ import annotations

import pytest

from skipcal.runtime.engines import graph_step


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference of the attention op reads the whole cache, and a thousand places take time."""
    monkeypatch.setattr(graph_step, "FIRST_SLOTS", 32)
