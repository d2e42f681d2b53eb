"""Policies, prompts and the state of a model, for tests of `skipping`."""

from __future__ import annotations

from typing import Any

import torch
from conftest import left_padded
from transformers.generation.streamers import BaseStreamer

from skipcal.core.policy import SkipPolicy

FULL = SkipPolicy(cold_s=0, cold_e=4, threshold=2.0, warm_up_tokens=0)
SOME = SkipPolicy(cold_s=0, cold_e=4, threshold=0.55, warm_up_tokens=1)
ALWAYS = SkipPolicy(cold_s=1, cold_e=4, threshold=-1.0, warm_up_tokens=0)
ROWS = [[5, 17, 31, 8, 44, 9], [7, 12], [60, 61, 62, 63]]


class Heard(BaseStreamer):
    """Keeps what a streamer is given, and -1 for the end."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        self.seen.append(-1)


def prompt(rows: list[list[int]] = ROWS[:1]) -> dict[str, torch.Tensor]:
    return left_padded(rows)


def state_of(model: Any) -> list[Any]:
    return [
        (name, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks), m.training)
        for name, m in model.named_modules()
    ]
