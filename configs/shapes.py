"""Shapes by name: sizes of known models, for random weights."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import yaml


@cache
def shapes() -> dict[str, dict[str, Any]]:
    """Configurations by name: configs/tables/shapes.yaml."""
    file = resources.files("skipcal.configs") / "tables" / "shapes.yaml"
    known: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return known
