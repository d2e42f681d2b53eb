"""vLLM with many requests at once, against transformers with one: tokens and counts are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapters import RANK, adapted
from gated import with_gate
from served import METHODS, NEW, PROMPTS, Served
from vllm_process import in_vllm

from skipcal.serving.blocks import LAID_OUT

TOGETHER: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 64}
CHUNKED = {
    "max_num_seqs": 4,
    "max_model_len": 64,
    "max_num_batched_tokens": 4,
    "enable_chunked_prefill": True,
}
EMBEDDED = {**TOGETHER, "enable_prompt_embeds": True}
# 32 tokens a block, one of the blocks is vLLM's own: four requests begin, and cannot all go on to a second.
SHORT_OF_MEMORY = {"max_num_seqs": 4, "max_model_len": 64, "block_size": 32, "num_gpu_blocks_override": 6}
LONG = [40, 46, 34, 50, 42, 37]  # tokens that need one


@pytest.fixture(scope="module")
def models(
    vllm: None, llama: Served, tmp_path_factory: pytest.TempPathFactory, worded_text: Path
) -> dict[str, Served]:
    return {
        name: llama if name == "llama" else Served(name, tmp_path_factory.mktemp(name), worded_text)
        for name in LAID_OUT
    }


WHOLE = "static, in whole graphs"
# What is said where it cannot be, for its FFN is another.
IN_PIECES = {
    "gemma": "GemmaMLP computes something else than skipcal's op",
    "gemma2": "Gemma2MLP is followed by a norm",
    "gemma3_text": "Gemma3MLP is followed by a norm",
    "glm4": "LlamaMLP is followed by a norm",
    "granite": "what GraniteMLP makes is scaled as it is added",
    "mixtral": "MixtralMoE has no gate_up_proj and down_proj",
    "qwen2_moe": "Qwen2MoeSparseMoeBlock has no gate_up_proj and down_proj",
    "qwen3_moe": "Qwen3MoeSparseMoeBlock has no gate_up_proj and down_proj",
    "nemotron": "NemotronMLP has no gate_up_proj and down_proj",
}


def methods_of(name: str) -> tuple[str, ...]:
    return tuple(METHODS) if name == "llama" else ("ffn-skip", "static")


def answered(models: dict[str, Served], options: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """By family and method, what vLLM made of it."""
    job = [
        {
            "model": model.folder, "options": options,
            "runs": [*map(model.run, methods_of(name)), {**model.run("static"), "on_device": True}],
        }
        for name, model in models.items()
    ]  # fmt: skip
    return {
        name: dict(zip((*methods_of(name), WHOLE), answers, strict=True))
        for name, answers in zip(models, in_vllm({"engines": job}, folder), strict=True)
    }


@pytest.fixture(scope="module")
def eager(models: dict[str, Served], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return answered(models, TOGETHER, tmp_path_factory.mktemp("families"))


def summed(skipped: list[list[int]]) -> list[int]:
    return [sum(layer) for layer in zip(*skipped, strict=True)]


def assert_equal(
    got: dict[str, Any], expected: tuple[list[list[int]], list[list[int]]], warm_up: int
) -> None:
    texts, skipped = expected
    report = got["report"]
    assert got["tokens"] == texts
    assert report["skipped_per_layer"] == summed(skipped)
    assert report["decode_steps"] == sum(len(text) - 1 for text in texts)
    assert report["decode_steps_after_warm_up"] == sum(len(text) - 1 - warm_up for text in texts)
    each = [request for [request] in got["requests"]]
    assert [request["skipped_per_layer"] for request in each] == skipped
    assert [request["decode_steps"] for request in each] == [len(text) - 1 for text in texts]


@pytest.mark.parametrize("name", LAID_OUT)
def test_every_family_decodes_and_skips_as_alone_in_transformers(
    name: str, models: dict[str, Served], eager: dict[str, Any]
) -> None:
    for method, got in eager[name].items():
        expected = models[name].alone(method.removesuffix(", in whole graphs"))
        assert not got["compiled"]
        assert_equal(got, expected, warm_up=3)
        assert (sum(summed(expected[1])) > 0) == (method != "full")
        if method == WHOLE:
            assert bool(got["replays"]) == (name not in IN_PIECES)
            assert IN_PIECES.get(name, "decided within") in got["graphs"]


COMPILED = {**TOGETHER, "enforce_eager": False}
TRACED = {**COMPILED, "compilation_config": {"mode": 2, "backend": "eager"}}  # by dynamo alone: quick


AS_A_WHOLE = "ernie4_5"  # compiled with its head, others without
ENDS_IN_NORM = "gemma2"  # its FFN block does


def test_compiled_passes_decide_and_skip_as_eager_ones(models: dict[str, Served], tmp_path: Path) -> None:
    some = {name: models[name] for name in ("llama", AS_A_WHOLE, ENDS_IN_NORM)}
    for name, answers in answered(some, TRACED, tmp_path).items():
        for method, got in answers.items():  # what was compiled for the first serves all of them
            assert got["compiled"]
            assert_equal(got, models[name].alone(method.removesuffix(", in whole graphs")), warm_up=3)


def test_what_compilers_keep_on_disk_serves_another_profile_under_the_same_settings(
    llama: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    file = tmp_path / "profile.json"
    found = []
    for layers in ((1, 2, 3), (2, 4, 5, 6)):  # vLLM hashes the settings, which are the same
        with_gate(llama.profile, layers=layers, model=llama.model).save(file, overwrite=True)
        run = llama.run("gate", profile=str(file))
        job = {"engines": [{"model": llama.folder, "options": COMPILED, "runs": [run]}]}
        [[got]] = in_vllm(job, tmp_path)
        assert got["compiled"]
        assert_equal(got, llama.alone("gate", profile=file), warm_up=3)
        found.append(got)
    assert any((tmp_path / "cache").rglob("*.so"))
    assert found[0]["report"]["skipped_per_layer"] != found[1]["report"]["skipped_per_layer"]


PER_TOKEN = ("ffn-skip", "gate")  # methods by which a token's own stream decides


@pytest.fixture(scope="module")
def pressed(llama: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By name of the engine and method: prompts in chunks, too little memory, prompts as embeddings."""
    engines = {
        "chunked": (CHUNKED, NEW), "preempted": (SHORT_OF_MEMORY, LONG), "embedded": (EMBEDDED, NEW)
    }  # fmt: skip
    job = [
        {
            "model": llama.folder, "options": options,
            "runs": [{**llama.run(m, new=new), "embedded": name == "embedded"} for m in PER_TOKEN],
        }
        for name, (options, new) in engines.items()
    ]  # fmt: skip
    answers = in_vllm({"engines": job}, tmp_path_factory.mktemp("pressed"))
    return {
        name: dict(zip(PER_TOKEN, found, strict=True)) for name, found in zip(engines, answers, strict=True)
    }


@pytest.mark.parametrize("method", PER_TOKEN)
@pytest.mark.parametrize("how", ["chunked", "embedded"])
def test_prompts_in_chunks_and_as_embeddings_change_nothing(
    how: str, method: str, llama: Served, pressed: dict[str, Any]
) -> None:
    assert_equal(pressed[how][method], llama.alone(method), warm_up=3)


@pytest.mark.parametrize("method", PER_TOKEN)
def test_preempted_requests_decide_as_they_did_and_count_once(
    method: str, llama: Served, pressed: dict[str, Any]
) -> None:
    assert pressed["preempted"][method]["preemptions"] > 0
    assert_equal(pressed["preempted"][method], llama.alone(method, new=LONG), warm_up=3)


def test_a_request_that_opts_out_gets_the_full_model_beside_others_that_skip(
    llama: Served, tmp_path: Path
) -> None:
    out = (1, 3)
    extra = [{"skipcal": 0} if n in out else None for n in range(len(PROMPTS))]
    wrong = [{"skipcal": "off"}, {"skipcal": 0.9}, {"skipcal_target_skip_ratio": 0.2}]
    runs = [llama.run("gate", extra=extra), {**llama.run("gate", warm_up_tokens=0), "refused": wrong}]
    [[some, early]] = in_vllm(
        {"engines": [{"model": llama.folder, "options": TOGETHER, "runs": runs}]}, tmp_path
    )
    full, _ = llama.alone("full")
    texts, skipped = llama.alone("gate")
    assert [texts[n] for n in out] != [full[n] for n in out]
    assert some["tokens"] == [full[n] if n in out else texts[n] for n in range(len(PROMPTS))]
    assert some["report"]["skipped_per_layer"] == summed([s for n, s in enumerate(skipped) if n not in out])
    assert some["report"]["opted_out_steps"] == sum(NEW[n] - 1 for n in out)
    assert some["report"]["decode_steps"] == sum(new - 1 for n, new in enumerate(NEW) if n not in out)
    assert_equal(early, llama.alone("gate", warm_up=0), warm_up=0)  # other settings than the profile's
    said = [
        "VLLMValidationError: skipcal of a request is 'off'; expected a target skip ratio between 0 and 1",
        "VLLMValidationError: target skip ratio 0.9 is out of reach",
        "VLLMValidationError: the key 'skipcal_target_skip_ratio' of a request is not known there",
        "ConfigError: skipcal does not go with beam search",
        "VLLMValidationError: skipcal: input that is streamed is refused",
        "VLLMValidationError: prompt_logprobs of a request that skips",
    ]
    wrong, other_weights = early["refused"][:-2], early["refused"][-2:]  # and the engine goes on
    assert [got[: len(text)] for got, text in zip(wrong, said, strict=True)] == said
    for answer in other_weights:
        assert answer.startswith("ConfigError: skipcal: other weights are refused while a model skips")


ASKED = {"ffn-skip": (0.1, 0.3), "gate": (0.1, 0.4), "static": (0.4, 0.6), "static+surrogates": (0.4, 0.6)}


def test_requests_with_targets_of_their_own_decode_as_alone_with_that_target(
    llama: Served, tmp_path: Path
) -> None:
    runs = [
        llama.run(method, extra=[None, *({"skipcal": x} for x in (low, high, 0, high, low))])
        for method, (low, high) in ASKED.items()
    ]
    job = {"engines": [{"model": llama.folder, "options": TOGETHER, "runs": runs}]}
    [answers] = in_vllm(job, tmp_path)
    nothing, _ = llama.alone("full")
    for (method, (low, high)), got in zip(ASKED.items(), answers, strict=True):
        by_target = {target: llama.alone(method, target=target) for target in (None, low, high)}
        asked = [None, low, high, 0, high, low]
        assert got["tokens"] == [
            by_target[target][0][n] if target != 0 else nothing[n] for n, target in enumerate(asked)
        ]
        skipped = [by_target[target][1][n] for n, target in enumerate(asked) if target != 0]
        assert got["report"]["skipped_per_layer"] == summed(skipped)
        assert got["report"]["opted_out_steps"] == NEW[3] - 1
        each = [request for [request] in got["requests"]]
        assert [request["target_skip_ratio"] for request in each] == asked
        assert [
            request["skipped_per_layer"] for request in each if request["target_skip_ratio"] != 0
        ] == skipped
        lone = [sum(summed(skips)) for _, skips in by_target.values()]
        assert len(set(lone)) == 3  # so that the wrong rule would show


ON_DEVICE = tuple(method for method in METHODS if method != "full")


def test_decisions_on_the_device_decode_and_skip_as_alone(llama: Served, tmp_path: Path) -> None:
    """Passes that only decode, as graphs hold them: the ops' references, in vLLM's eager mode."""
    low, high = ASKED["gate"]
    asked = [None, low, high, 0, None, high]
    extra = [None if x is None else {"skipcal": x} for x in asked]
    alone_at_the_end = [14, 30, 9, 24, 16, 11]
    runs = [llama.run(method, new=alone_at_the_end) for method in ON_DEVICE]
    runs += [llama.run("gate", extra=extra)]
    job = [{"model": llama.folder, "options": TOGETHER, "runs": [{**run, "on_device": True} for run in runs]}]
    [answers] = in_vllm({"engines": job}, tmp_path)
    for method, got in zip(ON_DEVICE, answers, strict=False):
        assert {1, 4} <= {*got["replays"]}
        assert_equal(got, llama.alone(method, new=alone_at_the_end), warm_up=3)
    by_target = {target: llama.alone("gate", target=target) for target in (None, low, high)}
    nothing, _ = llama.alone("full")
    got, each = answers[-1], [request for [request] in answers[-1]["requests"]]
    for n, target in enumerate(asked):
        texts, skipped = by_target[target] if target != 0 else (nothing, [[0] * 8] * len(asked))
        assert got["tokens"][n] == texts[n]
        assert each[n]["skipped_per_layer"] == skipped[n]
    assert 4 in got["replays"]


# One place more than adapters: on CPUs vLLM 0.32 gives requests without one what its last place holds.
WITH_ADAPTERS = {**TOGETHER, "enable_lora": True, "max_loras": 3, "max_lora_rank": RANK}


def test_each_request_gets_its_own_adapter_beside_others(llama: Served, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    merged = [adapted(llama.model, folder, seed) for seed, folder in enumerate(folders)]
    whose = [0, 1, None, 0, 1, None]  # of four that run together, two share one
    runs = [
        {**llama.run(method), "adapters": [None if n is None else str(folders[n]) for n in whose]}
        for method in METHODS
    ]
    [answers] = in_vllm(
        {"engines": [{"model": llama.folder, "options": WITH_ADAPTERS, "runs": runs}]}, tmp_path
    )
    models = [llama.model if n is None else merged[n] for n in whose]
    for method, got in zip(METHODS, answers, strict=True):
        expected = llama.alone(method, models=models)
        assert expected[0] != llama.alone(method)[0]
        assert_equal(got, expected, warm_up=3)


def test_processes_that_share_the_layers_decide_as_one(llama: Served, tmp_path: Path) -> None:
    options = {**TOGETHER, "tensor_parallel_size": 2}
    job = {"engines": [{"model": llama.folder, "options": options, "runs": [llama.run("ffn-skip")]}]}
    [[got]] = in_vllm(job, tmp_path)
    assert_equal(got, llama.alone("ffn-skip"), warm_up=3)
