"""Where generate() meets an engine of prepared steps: the cache it makes, its passes of one token.

Both methods are set on the model's instance. The cache is ours wherever the engine can run the
call; then each pass of one token a row is a prepared step, and sampling, processors, streaming and
stopping stay those of transformers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from skipcal.arch.patch import InstancePatches
from skipcal.runtime.engines.step_engine import StepEngine
from skipcal.runtime.generate_call import call_arguments
from skipcal.runtime.tokens import DecodeTokens

_MODES = ("greedy_search", "sample")
# Arguments that a step knows; `None` and False values of others do no harm.
_KNOWN = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep",
    "return_dict", "cache_position",
}  # fmt: skip


class GenerateSeam:
    """Hands decode steps of generate() to `engine`. `stepping`: a pass belongs to the engine."""

    def __init__(self, model: PreTrainedModel, engine: StepEngine, tokens: DecodeTokens) -> None:
        """Nothing is set yet."""
        self.stepping = False
        self._model, self._engine, self._tokens = model, engine, tokens
        self._forward: Callable[..., Any] = model.forward
        self._signature = inspect.signature(model.forward)

    def attach(self, patches: InstancePatches) -> None:
        """Set both methods on the instance."""
        model: Any = self._model
        patches.set(model, "forward", self._stepping(model.forward))
        name = "_prepare_cache_for_generation"
        patches.set(model, name, self._with_our_cache(getattr(model, name)))

    def _with_our_cache(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def prepare_cache(*args: Any, **kwargs: Any) -> Any:
            if self._tokens.clock is None:  # somebody else's wrapper has outlived the session
                return original(*args, **kwargs)
            given = call_arguments(signature, args, kwargs)
            config, kept = given["generation_config"], given["model_kwargs"]
            reason = _unfit(config, kept, given["generation_mode"])
            if reason is not None:
                self._engine.fall_back(reason)
                return original(*args, **kwargs)
            cache = self._engine.cache_for(
                self._forward,
                given["batch_size"] * config.num_return_sequences,
                given["max_cache_length"],
                handed_out=bool(config.return_dict_in_generate),
            )
            if cache is None:
                return original(*args, **kwargs)
            kept["past_key_values"] = cache
            return None

        return prepare_cache

    def _stepping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = call_arguments(self._signature, args, kwargs)
            if not self._is_step(given) or not self._ready(given):
                return original(*args, **kwargs)
            clock, ids = self._tokens.clock, given["input_ids"]
            assert clock is not None
            tokens = self._tokens.of_step(clock.emitted - 1, len(ids), ids.device, ids[:, 0])
            self.stepping = True
            try:
                logits = self._engine.run_no_sync(given, tokens)
            finally:
                self.stepping = False
            return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=given["past_key_values"])

        return forward

    def _is_step(self, given: dict[str, Any]) -> bool:
        """Whether the pass decodes one token a row with the engine's cache, inside generate()."""
        clock, ids = self._tokens.clock, given.get("input_ids")
        if clock is None or clock.emitted == 0 or ids is None or ids.shape[1] != 1:
            return False
        if not self._engine.takes(given.get("past_key_values")):
            return False
        if more := sorted(
            k for k, v in given.items() if k not in _KNOWN and v is not None and v is not False
        ):
            self._engine.fall_back(f"the model is given {', '.join(more)}")
            return False
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        plain = (mask is None or mask.dim() == 2) and (positions is None or positions.dim() == 2)
        if not plain or (mask is not None and positions is None):
            self._engine.fall_back("the model wants masks or positions of its own")
            return False
        return True

    def _ready(self, given: dict[str, Any]) -> bool:
        self.stepping = True
        try:
            return self._engine.prepare(given)
        finally:
            self.stepping = False


def _unfit(config: Any, kept: dict[str, Any], mode: Any) -> str | None:
    """Why a generate() call cannot decode by captured steps."""
    if str(getattr(mode, "value", mode)) not in _MODES:
        return f"{mode.value.replace('_', ' ')} reorders the cache"
    if kept.get("past_key_values") is not None:
        return "generate() was given a cache"
    if config.cache_implementation not in (None, "dynamic"):
        return f"cache_implementation={config.cache_implementation!r} was asked for"
    if config.output_attentions or config.output_hidden_states:
        return "attentions or hidden states were asked for"
    return None
