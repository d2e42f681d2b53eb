"""A profile with tensors; examples are the same in every run."""

from __future__ import annotations

from pathlib import Path

import pytest
import same_examples  # noqa: F401
from gated import with_gate
from tensor_files import SHIPPED

from skipcal.profiles.schema import SkipProfile


@pytest.fixture(scope="module")
def gated() -> SkipProfile:
    return with_gate(SHIPPED)


@pytest.fixture
def saved(gated: SkipProfile, tmp_path: Path) -> Path:
    gated.save(tmp_path / "made.json")
    return tmp_path / "made.json"
