"""Adapters of peft: on the model by `--adapter`, or around it as a PeftModel; never merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lively, quick_profile, saved, word_tokenizer
from gated import PROMPT, generated
from oracle import decode

from skipcal.arch.loading import LoadedModel, fingerprint, load_model
from skipcal.arch.locate import locate
from skipcal.calibrate.capture import capture
from skipcal.core.policy import SkipPolicy
from skipcal.errors import ConfigError, Unavailable, UnsupportedModel
from skipcal.runtime.session import skipping

peft = pytest.importorskip("peft", reason="the extra peft is not installed")
# peft 0.21 asks transformers 5.23 by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))
SOME = SkipPolicy(cold_s=0, cold_e=4, threshold=0.6, warm_up_tokens=1)
RANK, ALPHA = 4, 6


def around(model: Any) -> Any:
    """A PeftModel with a random adapter on attention and FFN."""
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "gate_proj", "down_proj"],
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(2)
    return peft.get_peft_model(model, settings).eval()


@pytest.fixture(scope="module")
def base() -> Any:
    with torch.no_grad():
        return lively("llama")


@pytest.fixture(scope="module")
def folders(base: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    place = tmp_path_factory.mktemp("adapted")
    around(copy.deepcopy(base)).save_pretrained(place / "lora")
    return saved(base, place / "base"), str(place / "lora")


@pytest.fixture(scope="module")
def loaded(folders: tuple[str, str]) -> LoadedModel:
    return load_model(folders[0], adapter=folders[1], device="cpu")


@pytest.fixture
def wrapped(base: Any) -> Any:
    return around(copy.deepcopy(base))


def test_an_adapter_is_added_to_the_weights(base: Any, loaded: LoadedModel, wrapped: Any) -> None:
    added = copy.deepcopy(base)
    for name, parameter in added.named_parameters():
        place = name.rpartition(".")[0]
        if place.endswith(("q_proj", "gate_proj", "down_proj")):
            a = loaded.model.get_parameter(f"{place}.lora_A.default.weight")
            b = loaded.model.get_parameter(f"{place}.lora_B.default.weight")
            parameter.add_(ALPHA / RANK * b @ a)
    mine = loaded.model(IDS).logits
    assert torch.equal(mine, wrapped(IDS).logits)
    assert (mine - added(IDS).logits).abs().max() < 1e-5
    assert (mine - base(IDS).logits).abs().max() > 0.1


def test_an_adapter_has_its_own_fingerprint_and_its_own_bytes(
    base: Any, loaded: LoadedModel, wrapped: Any
) -> None:
    assert fingerprint(loaded.model) == fingerprint(wrapped) != fingerprint(base)
    added = 4 * RANK * ((32 + 48) + (48 + 32))  # of gate_proj and down_proj, A and B
    for model in (loaded.model, wrapped):
        grown = [b.weight_bytes - p.weight_bytes for b, p in zip(*_blocks(model, base), strict=True)]
        assert grown == [added] * 4


def _blocks(*models: Any) -> tuple[Any, ...]:
    return tuple(locate(model).blocks for model in models)


@pytest.mark.parametrize("form", ["injected", "wrapped"])
def test_skipping_on_an_adapted_model_is_the_rule(loaded: LoadedModel, wrapped: Any, form: str) -> None:
    model: Any = loaded.model if form == "injected" else wrapped
    expected = decode(loaded.model, PROMPT, SOME, 12)
    output, report = generated(model, SOME)
    assert output.sequences[0, len(PROMPT) :].tolist() == expected.tokens
    counts = [sum(layer in step for step in expected.skipped) for layer in range(4)]
    assert list(report.skipped_per_layer) == counts and 0 < sum(counts) < 40
    assert decode(loaded.model, PROMPT, SOME, 12).tokens != decode_plain(loaded)


def decode_plain(loaded: LoadedModel) -> list[int]:
    return decode(loaded.model, PROMPT, SkipPolicy(cold_s=0, cold_e=4, threshold=2.0), 12).tokens


def test_teacher_forcing_and_capture_take_a_peft_model(loaded: LoadedModel, wrapped: Any) -> None:
    taken, forced = [], []
    for model in (loaded.model, wrapped):
        with capture(model) as recorder:
            model(IDS)
        taken.append(recorder.take()[0])
        with skipping(model, policy=SOME, teacher_forced=True) as run:
            forced.append((model(input_ids=IDS).logits, run.report.skipped_per_layer))
    assert (taken[0] == taken[1]).all()
    assert torch.equal(forced[0][0], forced[1][0]) and forced[0][1] == forced[1][1]
    assert sum(forced[0][1]) > 0


def test_nothing_is_left_on_a_peft_model(wrapped: Any) -> None:
    def state() -> list[Any]:
        return [
            (name, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in wrapped.named_modules()
        ]

    logits = wrapped(IDS).logits
    generated(wrapped, None)  # peft itself leaves something at the first call of generate()
    before = state()
    generated(wrapped, SOME)
    with pytest.raises(RuntimeError, match="on purpose"), skipping(wrapped, policy=SOME):
        raise RuntimeError("on purpose")
    assert state() == before
    assert torch.equal(wrapped(IDS).logits, logits)


def test_a_profile_is_of_the_adapted_model_and_says_so(
    base: Any, loaded: LoadedModel, wrapped: Any, worded_text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = quick_profile(loaded, worded_text)
    assert mine.model.adapter == "lora" and '"adapter": "lora"' in mine.to_json()
    handed = quick_profile(LoadedModel(wrapped, word_tokenizer(), "tiny", None), worded_text)
    assert handed.model.adapter == "default"  # peft does not tell where it came from
    assert handed.layers == mine.layers and handed.operating_points == mine.operating_points

    mine.check_fits(loaded.model)
    mine.check_fits(wrapped)
    assert "adapter" not in caplog.text
    mine.check_fits(base.to(torch.bfloat16))  # fingerprints of two dtypes are not compared
    assert "was made with the adapter lora, the model has none" in caplog.text
    base.float()
    plain = quick_profile(LoadedModel(base, word_tokenizer(), "tiny", None), worded_text)
    assert "adapter" not in json.loads(plain.to_json())["model"]
    assert plain.layers != mine.layers
    plain.check_fits(loaded.model)
    assert "was made without an adapter, the model has one" in caplog.text


def test_an_adapter_that_does_not_fit_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    shallow = saved(lively("llama", num_hidden_layers=3), tmp_path / "shallow")
    narrow = saved(lively("llama", intermediate_size=64), tmp_path / "narrow")
    other = saved(lively("gpt2"), tmp_path / "other")
    for place in (shallow, narrow, other):
        with pytest.raises(
            Unavailable, match=r"adapter .*lora' (does not fit|could not be put on)"
        ) as refused:
            load_model(place, adapter=folders[1], device="cpu")
        assert "\n" not in str(refused.value)
    with pytest.raises(Unavailable, match="'nobody/none' could not be put on"):
        load_model(folders[0], adapter="nobody/none", device="cpu")


def test_an_adapter_in_a_models_place_says_what_to_type(folders: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=rf"no model; give both: --model BASE --adapter {folders[1]}"):
        load_model(folders[1], device="cpu")


def test_an_adapter_does_not_go_with_offloaded_weights(folders: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="does not go with weights that are offloaded"):
        load_model(folders[0], adapter=folders[1], device_map="auto", max_memory={"cpu": "110KB"})


def test_learnt_prompts_are_refused(base: Any) -> None:
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(copy.deepcopy(base), settings).eval()
    for use in (locate, lambda m: skipping(m, policy=SOME)):
        with pytest.raises(UnsupportedModel, match="puts tokens of its own before a text"):
            use(model)
