"""vLLM without the plug-in runs exported checkpoints as transformers runs models whose FFNs add zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import lively, saved
from exporting import LEFT_OUT, profile_file, without, written
from served import NEW, PROMPTS
from vllm_process import in_vllm

from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.export.checkpoint import export_checkpoint
from skipcal.export.layout import LAYOUTS
from skipcal.profiles.schema import SkipProfile

FAMILIES = sorted(LAYOUTS)
COMPILED = "llama, compiled"
POLICY = ChosenFFNs(method="static", layers=LEFT_OUT, probability=1.0, warm_up_tokens=0)
SHAPE = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
@torch.no_grad()
def models(vllm: None) -> dict[str, Any]:
    return {
        family: lively(family, **SHAPE, sliding_window=None, tie_word_embeddings=family == "llama")
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def answers(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By family in eager mode, and one as vLLM runs it by itself: compiled."""
    folder = tmp_path_factory.mktemp("exported")
    for family, model in models.items():
        profile = SkipProfile.load(profile_file(folder, model))
        name = saved(model, folder / f"{family}-model")
        export_checkpoint(profile, POLICY, name, folder / family)
    engines = {
        name: {"model": str(folder / family), "prompts": PROMPTS, "new": NEW, "compiled": name == COMPILED}
        for name, family in {**dict(zip(FAMILIES, FAMILIES, strict=True)), COMPILED: "llama"}.items()
    }
    found = in_vllm({"stock": list(engines.values())}, folder, VLLM_PLUGINS="")
    return dict(zip(engines, found, strict=True))


@pytest.mark.parametrize("name", [*FAMILIES, COMPILED])
def test_without_the_plug_in_it_writes_what_the_oracle_writes(
    name: str, models: dict[str, Any], answers: dict[str, Any]
) -> None:
    model, found = models["llama" if name == COMPILED else name], answers[name]
    oracle = without(model, LEFT_OUT)
    expected = [written(oracle, prompt, new) for prompt, new in zip(PROMPTS, NEW, strict=True)]
    assert found["plugged"] is False
    assert (found["mode"] > 0) == (name == COMPILED)
    assert found["kind"] in ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
    assert found["tokens"] == expected
    assert expected != [written(model, prompt, new) for prompt, new in zip(PROMPTS, NEW, strict=True)]
