"""What tests of the graph engine share."""

from __future__ import annotations

import pytest
from gpu_stand_in import StandIn, stand_in

from skipcal.runtime.engines import graph_step


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference of the attention op reads the whole cache, and a thousand places take time."""
    monkeypatch.setattr(graph_step, "FIRST_SLOTS", 32)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Steps believe that they are on a GPU, the second one."""
    return stand_in(monkeypatch)
