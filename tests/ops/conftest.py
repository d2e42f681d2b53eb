"""What the tests of the ops share."""

from __future__ import annotations

import os
from typing import Any

import pytest
from interpreted import Reads


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("only interpreted kernels can be watched")
    from triton.runtime import interpreter

    found = Reads()
    load = interpreter._interpreter.load

    def watched(addresses: Any, mask: Any, *rest: Any) -> Any:
        found.add(addresses, mask)
        return load(addresses, mask, *rest)

    monkeypatch.setattr(interpreter._interpreter, "load", watched)
    return found
