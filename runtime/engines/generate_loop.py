"""Greedy decoding and sampling without waiting for the device between tokens.

transformers' own loop asks after each token whether a row is unfinished, before it launches the
next pass, so the device idles while the host prepares. Here the next pass is launched first and the
answer is read while it runs; the pass after the last token is one too many, of rows that are over,
which count for nothing. Tokens, processors, criteria and streaming are those of `_sample`.

generate() calls the loop as its `custom_generate`. It hands it no streamer: bind that beforehand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GENERATION_MODES_MAPPING

from skipcal.errors import SessionError
from skipcal.runtime.engines.step_cache import StepCache


def decode_ahead(
    model: Any,
    input_ids: Tensor,
    logits_processor: Callable[[Tensor, Tensor], Tensor],
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    *,
    ahead: Callable[[Any], bool],
    **model_kwargs: Any,
) -> Any:
    """The ids [batch, tokens] of prompt and continuation; what only transformers' loops can, they do.

    ahead: whether the next pass with a cache may be launched before it is known to be wanted.
    """
    config, cache = generation_config, model_kwargs.get("past_key_values")
    if synced_gpus or config.return_dict_in_generate or not isinstance(cache, StepCache):
        mode = config.get_generation_mode()
        loop = getattr(model, GENERATION_MODES_MAPPING[mode], None)
        if loop is None:
            raise SessionError(f"{mode.value} is a decoding loop from the hub, which the rule cannot follow")
        return loop(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    ids = input_ids
    ends_rows = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    told = _Told(ids.device, streamer)
    with model._optimize_model_for_decode():
        logits = model._prefill(ids, config, model_kwargs).logits[:, -1]
        following = _Inputs(model_kwargs, len(ids))
        while True:
            scores = logits_processor(ids, logits.to(copy=True, dtype=torch.float32, device=ids.device))
            if config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
            else:
                tokens = scores.argmax(-1)
            if ends_rows:
                tokens = torch.where(running, tokens, config._pad_token_tensor.to(ids.device))
            ids = torch.cat([ids, tokens[:, None]], dim=-1)
            running = running & ~stopping_criteria(ids, None)
            told.tell_no_sync(running, tokens)
            over = None if ahead(cache) else told.is_over()
            if not over and ids.shape[1] < config.max_length:
                logits = model(**following.of(tokens)).logits[:, -1]
            if told.is_over() if over is None else over:
                break
    if streamer is not None:
        streamer.end()
    return ids


def with_decode_ahead(options: dict[str, Any], ahead: Callable[[Any], bool]) -> dict[str, Any]:
    """generate()'s `options` with this loop in them; see `decode_ahead`."""
    if options.get("tokenizer") is not None:  # generate() would not hand it on to the stop strings
        return options
    loop = functools.partial(decode_ahead, streamer=options.get("streamer"), ahead=ahead)
    return {**options, "custom_generate": loop}


class _Inputs:
    """Arguments of the model's forward for one token a row after another."""

    def __init__(self, model_kwargs: dict[str, Any], batch: int) -> None:
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        self._mask: Tensor | None = mask  # [batch, tokens so far]
        self._positions: Tensor | None = None if positions is None else positions[:, -1:].clone()
        self._rest = {
            name: value
            for name, value in model_kwargs.items()
            if name not in ("attention_mask", "position_ids", "inputs_embeds")
        }

    def of(self, tokens: Tensor) -> dict[str, Any]:
        """Those for `tokens` [batch], the next of each row."""
        given = {**self._rest, "input_ids": tokens[:, None], "return_dict": True}
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=-1)
            given["attention_mask"] = self._mask
        if self._positions is not None:
            self._positions = self._positions + 1
            given["position_ids"] = self._positions
        return given


class _Told:
    """What the host is told of each token: whether a row goes on, and for a streamer the tokens."""

    def __init__(self, device: torch.device, streamer: Any) -> None:
        self._streamer = streamer
        self._device = device
        self._waits = torch.cuda.Event() if device.type == "cuda" else None

    def tell_no_sync(self, running: Tensor, tokens: Tensor) -> None:
        """Start copying to the host."""
        there = self._waits is not None
        self._goes_on = running.any().to("cpu", non_blocking=there)
        self._tokens = tokens.to("cpu", non_blocking=there) if self._streamer is not None else None
        if self._waits is not None:
            self._waits.record(torch.cuda.current_stream(self._device))

    def is_over(self) -> bool:
        """Wait for the copy, stream it, and say whether no row goes on."""
        if self._waits is not None:
            self._waits.synchronize()
        if self._streamer is not None:
            self._streamer.put(self._tokens)
        return not bool(self._goes_on)
