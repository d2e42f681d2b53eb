"""How plain generate() decodes: as it is asked to, whatever a checkpoint's own settings say."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from skipcal.arch.patch import InstancePatches

logger = logging.getLogger(__name__)

# Which token is sampled: what a checkpoint says of the distribution.
DISTRIBUTION = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "exponential_decay_length_penalty", "renormalize_logits",
    "remove_invalid_values", "min_length", "min_new_tokens",
)  # fmt: skip
# Nothing to be told of: tokens that are kept, lengths, which are an option, what greedy decoding is without
# by its name, and settings of how, not what, is computed.
_NO_LOSS = frozenset(
    {
        "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length",
        "max_new_tokens", "do_sample", *DISTRIBUTION[:7], "use_cache", "cache_implementation", "cache_config",
        "compile_config", "disable_compile", "return_dict_in_generate", "output_attentions",
        "output_hidden_states", "output_scores", "output_logits", "num_assistant_tokens",
        "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
        "target_lookbehind", "transformers_version", "_from_model_config",
    }
)  # fmt: skip


@contextmanager
def greedy_decoding(model: Any) -> Iterator[set[int]]:
    """Inside, `model.generate()` decodes greedily, whatever the model's own configuration adds.

    Of that only the special tokens stay; penalties, minimal lengths, suppressed words, sampling, beams and
    a switched-off cache do not. Yields the end-of-sequence ids. Afterwards all is as it was.
    """
    with _decoding(model, do_sample=False) as stops:
        yield stops


@contextmanager
def sampled_decoding(model: Any) -> Iterator[set[int]]:
    """Inside, `model.generate()` samples one text a row; else as `greedy_decoding`.

    Of the model's configuration stays what it says of the distribution: temperature, top_p, penalties, ...
    """
    own = model.generation_config
    with _decoding(
        model, do_sample=True, **{name: getattr(own, name, None) for name in DISTRIBUTION}
    ) as stops:
        yield stops


def overruled(model: Any, *, sampled: bool = False) -> str:
    """The settings of the model's own that would change a text and are not used, in words; "" for none."""
    kept: Collection[str] = _NO_LOSS.union(DISTRIBUTION) if sampled else _NO_LOSS
    settings = model.generation_config.to_diff_dict()
    return ", ".join(f"{name} {value}" for name, value in sorted(settings.items()) if name not in kept)


def warn_of_overruled(model: Any, *, sampled: bool = False) -> None:
    """Say in one line which settings of the model's own are not used, where there are any."""
    if left_out := overruled(model, sampled=sampled):
        how = "one text is sampled" if sampled else "decoding is greedy"
        logger.warning("%s; settings of the model that are not used: %s", how, left_out)


@contextmanager
def _decoding(model: Any, **settings: Any) -> Iterator[set[int]]:
    own = model.generation_config
    stops = final_ids(own)
    pad = own.pad_token_id
    if pad is None:
        pad = min(stops) if stops else 0
    plain = GenerationConfig(
        use_cache=True,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=pad,
        **settings,
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
