"""Models from which FFNs are left out: profiles that say which, and the naive way to do it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from documents import document, write

LEFT_OUT = (1, 3)  # of four layers


def profile_file(folder: Path, model: Any, **changes: Any) -> Path:
    """A profile of the model whose static set of a half is LEFT_OUT."""
    found = document(**changes)
    config = model.config
    found["model"] |= {
        "name": "org/tiny", "model_type": config.model_type, "hidden_size": config.hidden_size,
        "dtype": str(model.dtype).removeprefix("torch."),
    }  # fmt: skip
    found["layers"]["pooled"]["mean"] = [0.1, 0.9, 0.2, 0.8]
    return write(folder / "profile.json", found)


def without(model: Any, layers: Sequence[int]) -> Any:
    """A copy of the model in which the FFNs of some layers return zeros."""
    found = copy.deepcopy(model)
    for n in layers:
        found.model.layers[n].mlp.forward = torch.zeros_like
    return found


def written(model: Any, prompt: list[int], new: int) -> list[int]:
    """What the model goes on with, greedily, one pass over all tokens each."""
    row = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            row.append(int(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    return row[len(prompt) :]
