"""Hypothesis: the same examples in every run, and no folder left behind. Imported for what it does."""

from __future__ import annotations

import atexit
import shutil
import tempfile

import hypothesis
from hypothesis import configuration

_folder = tempfile.mkdtemp()
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
configuration.set_hypothesis_home_dir(_folder)
hypothesis.settings.register_profile("same", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("same")
