"""An exported checkpoint is the model whose FFNs of the set add zero, and nothing else of it is changed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lively, saved, word_tokenizer
from exporting import LEFT_OUT, profile_file, without
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipcal.arch.locate import locate
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.errors import OutputError, OutputExists, ProfileMismatch, Unavailable, UnsupportedModel
from skipcal.export.checkpoint import Export, export_checkpoint
from skipcal.export.layout import EXPERTS, LAYOUTS
from skipcal.profiles.schema import SkipProfile

POLICY = ChosenFFNs(method="static", layers=LEFT_OUT, probability=1.0, warm_up_tokens=25)
IDS = torch.tensor([[5, 17, 31, 8, 44, 9, 60, 3], [7, 12, 90, 4, 4, 50, 33, 71]])


def kept(model: Any, folder: Path, **options: Any) -> str:
    model.save_pretrained(folder, **options)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def exported(model: Any, folder: Path, name: str | None = None, **options: Any) -> Export:
    name = name or saved(model, folder / "model")
    profile = SkipProfile.load(profile_file(folder, model))
    return export_checkpoint(profile, POLICY, name, folder / "out", target_skip_ratio=0.5, **options)


def by_transformers(folder: Path) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(LAYOUTS))
def test_transformers_runs_it_as_the_model_whose_ffns_add_zero(
    family: str, tied: bool, tmp_path: Path
) -> None:
    model = lively(family, tie_word_embeddings=tied, sliding_window=None)
    got = by_transformers(exported(model, tmp_path).folder)
    expected = without(model, LEFT_OUT)(IDS).logits
    assert torch.equal(got(IDS).logits, expected)
    assert not torch.allclose(model(IDS).logits, expected, atol=1e-2)
    assert [len(locate(got).blocks), got.config.tie_word_embeddings] == [4, tied]


def test_rope_scaling_and_another_dtype_are_kept(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0}
    model: Any = lively("llama", rope_parameters=rope)
    model.to(torch.bfloat16)
    found = exported(model, tmp_path)
    got = by_transformers(found.folder)
    assert got.dtype == torch.bfloat16
    assert {t.dtype for t in tensors(found.folder).values()} == {torch.bfloat16}
    own = by_transformers(tmp_path / "model")  # `to` has rounded the frequencies of `model` too
    assert torch.equal(got(IDS).logits, without(own, LEFT_OUT)(IDS).logits)


def test_other_weights_are_the_models_own_and_left_out_ones_are_gone(tmp_path: Path) -> None:
    model = lively("llama")
    found = exported(model, tmp_path)
    got, own = tensors(found.folder), load_file(tmp_path / "model" / "model.safetensors")
    left_out = {name for name in own if any(f"layers.{n}.mlp." in name for n in LEFT_OUT)}
    assert {name for name, t in own.items() if name in got and torch.equal(got[name], t)} == set(
        own
    ) - left_out
    assert not left_out & set(got)
    zeros = [t for name, t in got.items() if name not in own]
    assert zeros and not any(t.any() for t in zeros)
    assert found.bytes_left_out == sum(own[name].nbytes for name in left_out)
    assert found.bytes_instead == sum(t.nbytes for t in zeros)


def test_the_index_names_every_tensor_and_its_file(tmp_path: Path) -> None:
    folder = exported(lively("llama"), tmp_path).folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert not (folder / "model.safetensors").exists()  # transformers would take it and look no further
    found = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(folder).values())


def test_files_without_a_left_out_tensor_are_links_and_the_others_hold_no_surplus(tmp_path: Path) -> None:
    model = lively("llama")
    name = kept(model, tmp_path / "model", max_shard_size="12KB")
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 3
    found = exported(model, tmp_path, name)
    own = {file.stat().st_ino: load_file(file) for file in files}
    links = [file for file in found.folder.glob("*.safetensors") if file.stat().st_ino in own]
    assert sorted(file.name for file in links) == sorted(found.linked)
    whole = [t for t in own.values() if not any(f"layers.{n}.mlp." in name for n in LEFT_OUT for name in t)]
    assert len(links) == len(whole) > 0
    assert torch.equal(by_transformers(found.folder)(IDS).logits, without(model, LEFT_OUT)(IDS).logits)


def test_tokenizer_generation_settings_and_a_record_go_along(tmp_path: Path) -> None:
    model = lively("llama")
    name = saved(model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found = exported(model, tmp_path, name)
    assert AutoTokenizer.from_pretrained(found.folder)("w5 w6")["input_ids"] == [5, 6]
    for file in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (found.folder / file).read_bytes() == (tmp_path / "model" / file).read_bytes()
    record = json.loads((found.folder / "skipcal_export.json").read_text())
    assert record == found.record
    assert record["layers"] == list(LEFT_OUT) and record["num_layers"] == 4
    assert record["model"] == {"name": "model", "revision": None}
    card = (found.folder / "README.md").read_text()
    assert "the layers 1, 3 (0-based) are left out, for every token" in card.replace("\n", " ")
    assert str(tmp_path) not in json.dumps(record) + card


def test_a_gguf_file_is_exported_as_what_it_is_read_as(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    from gguf_file import write_gguf

    model = lively("llama")
    write_gguf(model, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.F32)
    got = by_transformers(exported(model, tmp_path, str(tmp_path / "tiny.gguf")).folder)
    torch.testing.assert_close(got(IDS).logits, without(model, LEFT_OUT)(IDS).logits, rtol=1e-5, atol=1e-5)


def test_other_weights_than_the_profiles_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "skipcal"):
        exported(lively("llama"), tmp_path)
    assert "the profile was made on other weights of org/tiny" in caplog.text


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_weights_of_the_profile_are_known_again(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from skipcal.arch.loading import fingerprint

    model = lively(family, tie_word_embeddings=True)
    name = saved(model, tmp_path / "model")
    file = profile_file(tmp_path, model)
    profile = json.loads(file.read_text())
    profile["model"]["fingerprint"] = fingerprint(model)
    file.write_text(json.dumps(profile))
    with caplog.at_level(logging.WARNING, "skipcal"):
        export_checkpoint(SkipProfile.load(file), POLICY, name, tmp_path / "out")
    assert caplog.text == ""


# What cannot be written down


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {}, r"models of type 'gpt2' cannot be exported: .* those that can: llama, mistral, qwen2,"),
        ("llama", {"attention_bias": True}, "its attention has biases beyond"),
        ("llama", {"mlp_bias": True}, "its FFNs have biases"),
        ("llama", {"hidden_act": "gelu"}, "its FFNs have the activation 'gelu'"),
        ("llama", {"head_dim": 16}, r"its 4 heads of 16 are not as wide as the model \(32\)"),
        ("mistral", {"sliding_window": 4}, "its attention sees a window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "sees a window"),
        ("llama", {"architectures": ["LlamaForOther"]}, "it is a LlamaForOther"),
    ],
)  # fmt: skip
def test_a_model_without_such_a_layout_is_refused_with_the_reason(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = tmp_path / "model" / "config.json"
    model = lively(family, **{k: v for k, v in changes.items() if k != "architectures"})
    saved(model, config.parent)
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(UnsupportedModel, match=message) as caught:
        exported(model, tmp_path, str(config.parent))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    model = lively("llama")
    config = Path(saved(model, tmp_path / "model")) / "config.json"
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **quantized}))
    with pytest.raises(UnsupportedModel, match="its weights are quantized"):
        exported(model, tmp_path, str(config.parent))


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    name = saved(lively("llama", num_hidden_layers=6), tmp_path / "model")
    with pytest.raises(ProfileMismatch, match="number of layers 4, the model's is 6"):
        exported(lively("llama"), tmp_path, name)


def test_weights_that_are_missing_or_not_in_safetensors_are_refused(tmp_path: Path) -> None:
    model = lively("llama")
    folder = Path(saved(model, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(Unavailable, match="has no weights in safetensors"):
        exported(model, tmp_path, str(folder))
    del weights["model.layers.2.mlp.up_proj.weight"]
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Unavailable, match=r"lacks 1 of its weights \(model.layers.2.mlp.up_proj.weight"):
        exported(model, tmp_path, str(folder))
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(Unavailable, match="is no safetensors file"):
        exported(model, tmp_path, str(folder))


# The folder


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_export_is_replaced_only_where_that_was_asked_for(tmp_path: Path) -> None:
    model = lively("llama")
    first = exported(model, tmp_path)
    (first.folder / "more.txt").write_text("mine")
    with pytest.raises(OutputExists, match="pass --overwrite to replace it"):
        exported(model, tmp_path)
    assert (first.folder / "more.txt").exists()
    exported(model, tmp_path, overwrite=True)
    assert not (first.folder / "more.txt").exists()
    assert entries(tmp_path) == {"model", "out", "profile.json"}


def test_a_folder_of_anything_else_is_never_replaced(tmp_path: Path) -> None:
    model = lively("llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(OutputExists, match=r"holds other files \(no skipcal_export.json\); name another"):
        exported(model, tmp_path, overwrite=True)
    assert entries(tmp_path / "out") == {"thesis.tex"}


def test_an_empty_folder_is_filled_and_a_file_is_refused(tmp_path: Path) -> None:
    model = lively("llama")
    (tmp_path / "out").mkdir()
    exported(model, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        export_checkpoint(
            SkipProfile.load(tmp_path / "profile.json"), POLICY, str(tmp_path / "model"), tmp_path / "file"
        )


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there_and_nothing_else(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively("llama")
    folder = exported(model, tmp_path).folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr("skipcal.export.checkpoint.copied_file", broken)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        exported(model, tmp_path, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert entries(tmp_path) == {"model", "out", "profile.json"}


def test_a_checkpoint_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    model = lively("llama")
    folder = Path(saved(model, tmp_path / "model"))
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-8])
    with pytest.raises(Unavailable, match="is no safetensors file"):
        exported(model, tmp_path, str(folder))
    assert not (tmp_path / "out").exists()


def test_the_width_divides_as_experts_do() -> None:
    from skipcal.export.layout import WIDTH

    assert WIDTH % EXPERTS == 0
