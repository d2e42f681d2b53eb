"""Hypothesis: the same examples in every run, no folder left behind; and a profile with tensors."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest
from gated import with_gate
from hypothesis import configuration
from tensor_files import SHIPPED

from skipcal.profiles.schema import SkipProfile

_folder = tempfile.mkdtemp()
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
configuration.set_hypothesis_home_dir(_folder)
hypothesis.settings.register_profile("same", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="module")
def gated() -> SkipProfile:
    return with_gate(SHIPPED)


@pytest.fixture
def saved(gated: SkipProfile, tmp_path: Path) -> Path:
    gated.save(tmp_path / "made.json")
    return tmp_path / "made.json"
