"""A model to sweep over, and what skipping costs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import attentive, lively
from swept import FIRST, ROWS

from skipcal.arch.locate import locate
from skipcal.fit.damage import FisherDamage, fisher_damage


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.no_grad():
        torch.manual_seed(0)
        return attentive(lively("llama", num_hidden_layers=6))


@pytest.fixture(scope="module")
def damage(model: Any) -> FisherDamage:
    return fisher_damage(model, locate(model), [torch.tensor(ROWS[:4])], first=FIRST, seed=0)
