"""Greedy decoding by plain generate(), the same for calibration and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from skipcal.runtime.patch import InstancePatches


@contextmanager
def greedy_decoding(model: Any) -> Iterator[set[int]]:
    """Inside, `model.generate()` decodes greedily, whatever the model's own configuration adds.

    Of that only the special tokens stay; penalties, minimal lengths, suppressed words, sampling and
    a switched-off cache do not. Yields the end-of-sequence ids. Afterwards all is as it was.
    """
    own = model.generation_config
    stops = final_ids(own)
    pad = own.pad_token_id
    if pad is None:
        pad = min(stops) if stops else 0
    plain = GenerationConfig(
        do_sample=False,
        use_cache=True,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=pad,
    )
    patches = InstancePatches()
    patches.set(model, "generation_config", plain)
    try:
        yield stops
    finally:
        patches.restore()


def final_ids(config: Any) -> set[int]:
    """End-of-sequence ids of a generation configuration."""
    ends = config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def until_stop(tokens: list[int], stops: set[int]) -> list[int]:
    """The tokens up to and with the first end-of-sequence; what follows is padding."""
    for place, token in enumerate(tokens):
        if token in stops:
            return tokens[: place + 1]
    return tokens
