"""Greedy decoding by plain generate(), the same for calibration and evaluation."""

from __future__ import annotations

from typing import Any


def greedy_settings(config: Any) -> dict[str, Any]:
    """Overrides that make generate() plain greedy decoding, whatever a model's configuration adds."""
    settings: dict[str, Any] = {
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 50,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "min_length": 0,
        "return_dict_in_generate": False,
    }
    if config.pad_token_id is None:
        stops = final_ids(config)
        settings["pad_token_id"] = min(stops) if stops else 0
    return settings


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
